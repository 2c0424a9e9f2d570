"""Counts what passes over HTTP: the outermost layer of the API's app."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from millstream.serve.families import OTHER
from millstream.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class HttpWatch:
    """ASGI middleware that gives every exchange to `metrics` once, when its last byte is sent or its client has left.

    `pattern_of` tells the pattern of the route that was taken, from the scope; what was taken by none is "other".
    """

    def __init__(self, app: App, metrics: Metrics, pattern_of: Callable[[Scope], str | None]) -> None:
        self.app, self.metrics, self.pattern_of = app, metrics, pattern_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status, taken, given = 500, 0, 0

        async def counted_receive() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, given
            if message["type"] == "http.response.start":
                status = message["status"]
            given += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            pattern = self.pattern_of(scope) or OTHER
            self.metrics.http(scope["method"], pattern, status, time.monotonic() - started, taken, given)
