"""The routes of the Messages and Responses APIs over scripted chats, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from millstream.core.errors import BadRequest, RequestFault, UnknownName
from millstream.serve.anthropic import routes as messages_routes
from millstream.serve.chats import Said
from millstream.serve.responses import kept
from millstream.serve.responses import routes as responses_routes
from millstream.serve.responses.kept import Responses
from millstream.serve.responses.live import LiveResponses
from millstream.serve.store import Store
from millstream.text.tools.protocol import CallStart, CallText, Content, Piece, Reasoning


def said(*pieces: Piece, **given: Any) -> Said:
    return Said(pieces, prompt_tokens=10, cached_tokens=4, **given)


def words(text: str, reason: str = "stop", **given: Any) -> list[Said]:
    """A word a step, then the end."""
    parts = text.split(" ")
    steps = [
        said(Content(part if place == 0 else f" {part}"), output_tokens=place + 1) for place, part in enumerate(parts)
    ]
    return [*steps, said(finish=reason, output_tokens=len(parts) + 1, **given)]


def weather() -> list[Said]:
    """Thinking, then a call whose arguments come in two parts."""
    return [
        said(Reasoning("hm")),
        said(CallStart(0, "get_weather")),
        said(CallText(0, '{"city": ')),
        said(CallText(0, '"Bern"}')),
        said(finish="tool_calls", output_tokens=9, reasoning_tokens=2),
    ]


class ScriptedChats:
    """Answers by what the last message says, and keeps what it was asked.

    A step may be a Said, seconds to wait, or an exception to raise.
    """

    def __init__(self, scripts: dict[str, list[Any]]) -> None:
        self.scripts = scripts
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self.left = 0

    async def answer(self, request: Request, body: Any, operation: str) -> AsyncIterator[Said]:
        self.asked.append(dict(body))
        text = str(body["messages"][-1]["content"])
        script = self.scripts.get(text, words(f"you said {text}"))
        self.open += 1
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise
        finally:
            self.open -= 1

    async def count(self, request: Request, body: Any) -> int:
        return sum(len(str(message["content"]).split()) for message in body["messages"])


def told(request: Request, error: Exception) -> Response:
    status = {BadRequest: 400, UnknownName: 404, RequestFault: 500}.get(type(error), 400)
    body = {"message": str(error), "type": "x", "param": getattr(error, "param", None), "code": None}
    return JSONResponse({"error": body}, status, {"X-Request-Id": "req_1"})


@contextlib.contextmanager
def serving(chats: ScriptedChats, folder: Path) -> Iterator[str]:
    """The base URL of a server in a thread; the API key of a request is its owner."""
    store = Store(folder, kept.SCHEMA)
    live = LiveResponses()

    def owner(request: Request) -> str:
        return request.headers.get("authorization", "")

    async def handler(request: Request, error: Exception) -> Response:
        return told(request, error)

    app = Starlette(
        routes=[
            *messages_routes.routes(chats, told),
            *responses_routes.routes(chats, Responses(store), live, owner),
        ],
        exception_handlers={BadRequest: handler, UnknownName: handler, Exception: handler},
    )
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        store.close()


def wait(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    import time

    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)
