"""The routes that generate over a real engine on a tiny random model and a real socket, without keys or limits."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from millstream.core.request import Slo
from millstream.engine.llm import AsyncLLM
from millstream.serve.caller import Caller, Overloaded
from millstream.serve.errors import told
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Observatory
from millstream.serve.openai.routes import routes
from millstream.serve.service import ApiConfig, Service

ENGINE: dict[str, Any] = {
    "cache": {"bytes": "16MB"},
    "runner": {"ops": "ref", "attention": "torch-ref", "threads": 1},
}


class OpenGate:
    """Lets all in until `full`; counts who is inside."""

    def __init__(self) -> None:
        self.full = False
        self.inside = self.waiting = 0
        self.entered: list[tuple[int, int]] = []

    def look(self, caller: Caller) -> None:
        if self.full:
            raise Overloaded("queue_full", "there is no room", 2.5)

    def enter(self, caller: Caller, tokens: int, requests: int, slo: Slo) -> OpenSeat:
        self.look(caller)
        self.entered.append((tokens, requests))
        self.inside += 1
        self.waiting += 1
        return OpenSeat(self)


class OpenSeat:
    def __init__(self, gate: OpenGate) -> None:
        self._gate, self._waits, self._there = gate, True, True

    def first_token(self) -> None:
        if self._waits:
            self._waits = False
            self._gate.waiting -= 1

    def leave(self) -> None:
        self.first_token()
        if self._there:
            self._there = False
            self._gate.inside -= 1


class ApiBench:
    """Serves at `url` until closed. What is sent as X-Tenant is the tenant, with a salt of its own."""

    def __init__(self, model: Path, config: ApiConfig | None = None, **engine: Any) -> None:
        self.llm = AsyncLLM(str(model), {**ENGINE, **engine})
        self.gate = OpenGate()
        self.watched = Observatory(Metrics("tiny", process=False))
        self.records: list[Any] = []
        ended = self.watched.ended
        self.watched.ended = lambda record: (self.records.append(record), ended(record))  # type: ignore[assignment, func-returns-value]
        self.service = Service(self.llm.client, self.watched, self.gate, config or ApiConfig())
        self.chats, found = routes(self.service)

        @contextlib.asynccontextmanager
        async def life(app: Any) -> AsyncIterator[None]:
            self.service.take(await self.llm.client.facts(), self.llm.tokenizer)
            yield
            self.service.close()

        async def handler(request: Request, error: Exception) -> Response:
            return told(request, error)

        inner = Starlette(routes=found, lifespan=life, exception_handlers={Exception: handler})
        # Starlette raises again what is no HTTPException, after it has answered.

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                tenant = dict(scope["headers"]).get(b"x-tenant", b"").decode()
                label = dict(scope["headers"]).get(b"x-request-id", b"").decode()
                scope.setdefault("state", {})["caller"] = Caller(
                    secrets.token_hex(16), tenant, label, tenant and f"salt-{tenant}"
                )
                with contextlib.suppress(Exception):
                    await inner(scope, receive, send)
                return
            await inner(scope, receive, send)

        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def load(self) -> Any:
        return self.llm.assembled.engine.load()

    def idle(self) -> bool:
        """Whether nothing is inside, and all that was held is given back."""
        load = self.load
        return load.running == load.waiting == self.gate.inside == 0

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.llm.thread.close()


def wait(true: Any, limit_s: float = 20.0, what: str = "it never came to be") -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)
