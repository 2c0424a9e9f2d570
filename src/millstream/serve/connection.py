"""One connection of a client: HTTP/1.1 as uvicorn speaks it, within limits.

Heads of requests are bounded in bytes, number and time, connections in number, silence and slow readers in time. What
is refused here has not become a request yet: it is answered in a line, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from millstream.serve.config import LimitsConfig
from millstream.serve.errors import Told

_log = logging.getLogger("millstream.serve")

Refusal = Callable[[int], None]
# Of an answer, so much at most waits for what else comes in the same turn of the event loop.
JOIN_BYTES = 16 << 10
REST_S = 2.0


class _HeadTooLarge(Exception):
    """Ends the parsing; what is to be told is told already."""


class _Joining:
    """A transport that writes what comes in one turn of the event loop at once: head and body of an answer are one
    packet, which wakes its reader once."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        # Whoever writes much must feel when its reader takes nothing.
        if self._size >= JOIN_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pieces:
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces, self._size = [], 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._pieces, self._size = [], 0
        self._transport.abort()


class Connection(HttpToolsProtocol):
    """`limits`, `idle` (connections that wait for a next request, longest first) and `refused`, which hears the status
    of what is turned away here, are those of one server: see `connections`."""

    limits: LimitsConfig
    idle: dict[Connection, None]
    refused: Refusal

    _in_head = False
    _in_body = False
    _dead = False
    _head_bytes = 0
    _head_count = 0
    _dry_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, _Joining(cast(asyncio.Transport, transport), self.loop)))
        # Paths may hold what clients say; what is to be logged of a request, others log.
        self.access_log = False
        if len(self.connections) > self.limits.connections and not self._make_room():
            self._refuse(503, "too_many_connections", "too many connections are open; try again", "1")
            return
        self.idle[self] = None
        self.timeout_keep_alive_task = self.loop.call_later(self.limits.idle_s, self.timeout_keep_alive_handler)

    def _make_room(self) -> bool:
        for other in list(self.idle)[:1]:
            del self.idle[other]
            other.transport.abort()
            return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.idle.pop(self, None)
        for timer in (self._head_timer, self._stall_timer, self._rest_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._dead:
            return
        self.idle.pop(self, None)
        self._dry_bytes += len(data)
        super().data_received(data)
        if self._dead or self.parser is None:
            return
        # Of a head that is not whole, and of what frames a body, nothing may pile up.
        if (self._in_head or self._in_body) and self._dry_bytes > self.limits.header_bytes:
            self._refuse(431, "headers_too_large", f"headers have at most {self.limits.header_bytes} bytes")
            return
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_s, self._too_slow)

    # -- what the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._in_body = True, False
        self._head_bytes = self._head_count = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4, 1)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._dry_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        self._dry_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self._rest_timer is None:
            # It was answered before its body was there. What is left of it is read over, but not waited for.
            self._rest_timer = self.loop.call_later(REST_S, self.transport.abort)
        if self.transport.is_closing():
            # What is still to be written is not waited for without end.
            self._watch_reader()
        elif self.timeout_keep_alive_task is not None:
            self.idle[self] = None

    def _count(self, size: int, headers: int) -> None:
        self._head_bytes += size
        self._head_count += headers
        limits = self.limits
        if self._head_bytes > limits.header_bytes:
            self._refuse(431, "headers_too_large", f"headers have at most {limits.header_bytes} bytes")
        elif self._head_count > limits.headers:
            self._refuse(431, "headers_too_large", f"a request has at most {limits.headers} headers")
        else:
            return
        raise _HeadTooLarge

    # -- time

    def timeout_keep_alive_handler(self) -> None:
        self.idle.pop(self, None)
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def _too_slow(self) -> None:
        self._head_timer = None
        self._refuse(408, "too_slow", f"the head of a request must be there within {self.limits.header_s:g} s")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch_reader(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_s, self._stalled)

    def _stalled(self) -> None:
        self._stall_timer = None
        _log.info("a connection is cut: its reader took nothing for %g s", self.limits.stall_s)
        self.transport.abort()

    # -- refusals

    def send_400_response(self, msg: str) -> None:
        # Also called when a callback of ours has ended the parsing: then all is said.
        if not self._dead:
            self._refuse(400, "invalid_http", "this is not a valid HTTP request")

    def _refuse(self, status: int, code: str, message: str, retry_after: str = "") -> None:
        self._dead = True
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = msgspec.json.encode(Told(status, code, message).body)
            head = [STATUS_LINE[status], b"content-type: application/json\r\n"]
            head.append(b"content-length: %d\r\nconnection: close\r\n" % len(body))
            if retry_after:
                head.append(b"retry-after: %s\r\n" % retry_after.encode())
            self.transport.write(b"".join([*head, b"\r\n", body]))
        self.refused(status)
        self.transport.close()
        self._watch_reader()


def connections(limits: LimitsConfig, refused: Refusal = lambda status: None) -> type[Connection]:
    """The connections of one server, as uvicorn's `http` takes them."""
    shared: dict[str, Any] = {"limits": limits, "idle": {}, "refused": staticmethod(refused)}
    return type("Connection", (Connection,), shared)
