"""A server for the playground alone: its real routes and a real engine, over a runner that computes nothing.

Chats are answered with numbered words, so that what a page must show is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from watched_bench import WatchedBench

from millstream.core.clock import WallClock
from millstream.core.errors import BadRequest, UnknownName
from millstream.core.request import Request as Ask
from millstream.core.request import SamplingParams, Tokens
from millstream.engine.thread import AsyncEngine, EngineThread
from millstream.serve.watch_routes import OPEN_PATHS, routes


class SlowRunner:
    """The null runner, a step of which takes a while."""

    def __init__(self, runner: Any, step_s: float) -> None:
        self._runner, self.step_s = runner, step_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def collect(self, ticket: Any) -> Any:
        time.sleep(self.step_s)
        return self._runner.collect(ticket)


def _told(status: int) -> Any:
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": {"message": str(error)}}, status)

    return answer


class PlaygroundServer:
    """Serves at `url` until closed. With `key`, everything that holds data asks for it."""

    def __init__(self, key: str = "", step_s: float = 0.01) -> None:
        bench = WatchedBench(num_blocks=2048, budget=32)
        bench.engine.listeners.clear()
        bench.engine.clock = WallClock()
        bench.engine.runner = self.runner = SlowRunner(bench.engine.runner, step_s)
        self.watched, self.key = bench.watched, key
        self.watched.now = self.watched.steps._now = time.monotonic
        self.client = AsyncEngine(EngineThread(bench.engine))
        self.asked: list[dict[str, Any]] = []
        self.refuse: tuple[int, str] | None = None
        own = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        watched = [self._locked(route) for route in routes(self.watched, self.client, lambda request: "me")]
        told = {BadRequest: _told(400), UnknownName: _told(404)}
        app = Starlette(routes=[*map(self._locked, own), *watched], lifespan=self._life, exception_handlers=told)
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.client.thread.close()

    @contextlib.asynccontextmanager
    async def _life(self, app: Any) -> Any:
        self.watched.watch(self.client)
        yield
        await self.watched.close()

    def _locked(self, route: Route) -> Route:
        async def handler(request: Request) -> Response:
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "there is no such key", "type": "authentication_error"}}, 401)
            return await route.endpoint(request)

        return route if route.path in OPEN_PATHS else Route(route.path, handler, methods=list(route.methods or ()))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def _run(self, call_id: str, operation: str, length: int, max_tokens: int) -> Any:
        call = self.watched.begin(call_id, operation, "/v1/x")
        call.tenant, call.model = "me", "tiny"
        number = self.client.new_id()
        call.inside(number)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        prompt = tuple((number * 7 + place) % 50 for place in range(max(1, min(length, 200))))
        try:
            async for chunk in self.client.submit(Ask(number, (Tokens(prompt),), params, tenant="me")):
                call.heard(chunk)
                yield chunk
        finally:
            # Nothing is said when all was: the first word counts.
            call.end(499 if not any(output.ended for output in call._outputs.values()) else 200)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.refuse is not None:
            status, message = self.refuse
            headers = {"Retry-After": "7"} if status == 429 else {}
            return JSONResponse({"error": {"message": message}}, status, headers)
        call_id = f"chatcmpl-{secrets.token_hex(16)}"
        length = sum(len(turn["content"].split()) for turn in body["messages"])

        async def stream() -> Any:
            count = 0
            async for chunk in self._run(call_id, "chat", length, min(body["max_tokens"], 50)):
                text = "".join(f"word{count + place} " for place in range(len(chunk.tokens)))
                count += len(chunk.tokens)
                finish = None if chunk.finish is None else chunk.finish.value
                choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
                yield f"data: {json.dumps({'id': call_id, 'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": length, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 0}}
            yield f"data: {json.dumps({'id': call_id, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def _completions(self, request: Request) -> Response:
        body = await request.json()

        async def one(prompt: str) -> None:
            async for _ in self._run(f"cmpl-{secrets.token_hex(16)}", "text_completion", len(prompt.split()), 40):
                pass

        await asyncio.gather(*map(one, body["prompt"]))
        return JSONResponse({"object": "text_completion", "choices": []})
