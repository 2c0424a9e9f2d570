"""Requests that come from inside: a line of a batch is answered by the route that a client would have asked."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec

from millstream.core.request import Slo
from millstream.serve.batch_lines import Answer
from millstream.serve.caller import Caller
from millstream.serve.errors import telling

Message = MutableMapping[str, Any]


async def ask(app: Any, path: str, body: bytes, caller: Caller) -> Answer:
    """The answer of `app` to `POST path`, in the name of `caller`. What it raises is the body that clients would see.

    Being cancelled ends the request, as a client does that leaves.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {"caller": caller},
    }
    given = False
    status = 500
    parts: list[bytes] = []

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        # Nobody leaves who never came.
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception as error:
        if not parts:
            known = telling(error)
            return Answer(known.status, msgspec.json.encode(known.body), caller.request_id)
    return Answer(status, b"".join(parts), caller.request_id)


class NoSeat:
    """See `Seat`."""

    def first_token(self) -> None:
        pass

    def leave(self) -> None:
        pass


class NoGate:
    """See `Gate`: everybody gets in, where whoever asks bounds it otherwise."""

    def look(self, caller: Caller) -> None:
        pass

    def enter(self, caller: Caller, tokens: int, requests: int, slo: Slo) -> NoSeat:
        return NoSeat()
