"""An HTTP/1.1 client that is cheap enough to load a server from the core beside it.

One Protocol object a connection, no task and no queue a request: what arrives is stamped and handed on in the callback
of the event loop that read it. Connections are kept and used again, the warmest first; as many are opened as requests
are under way, so that a slow server never holds arrivals back.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

from millstream.core.errors import BadRequest

_MAX_HEAD_BYTES = 64 << 10


class Exchange(Protocol):
    """One request under way. Times are `time.perf_counter()`; exactly one `end` comes, after everything else."""

    def sent(self, now: float) -> None:
        """The request was written to a socket."""
        ...

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Status and headers (names in lower case) of the answer."""
        ...

    def data(self, piece: bytes, now: float) -> None:
        """A piece of the answer's body."""
        ...

    def end(self, error: str | None, now: float) -> None:
        """The answer is whole, or `error` says why it never will be."""
        ...


@dataclass(slots=True)
class Whole:
    """An exchange that keeps its answer; `done` is set when it is there."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None

    def sent(self, now: float) -> None:
        pass

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def data(self, piece: bytes, now: float) -> None:
        self.body += piece

    def end(self, error: str | None, now: float) -> None:
        self.error = error
        self.done.set()


class HttpClient:
    """Requests to one origin, such as "http://127.0.0.1:8000" (a path in front of all others may follow).

    `insecure` accepts any certificate. A request without an answer after `timeout_s` ends with an error. Raises
    BadRequest for a URL that is none. For one event loop.
    """

    def __init__(
        self, url: str, headers: dict[str, str] | None = None, *, insecure: bool = False, timeout_s: float = 3600.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest("base_url", url, "http://HOST[:PORT] or https://HOST[:PORT]")
        self.host, self.prefix = parts.hostname, parts.path.rstrip("/")
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.timeout_s = timeout_s
        self._ssl: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._ssl = ssl._create_unverified_context() if insecure else ssl.create_default_context()
        shown = f"[{self.host}]" if ":" in self.host else self.host
        lines = {"Host": f"{shown}:{self.port}", "Connection": "keep-alive", **(headers or {})}
        for name, value in lines.items():
            if any(char in f"{name}{value}" for char in "\r\n"):
                raise BadRequest("header", f"{name}={value}", "one line")
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def post(self, path: str, body: bytes, exchange: Exchange, label: str = "") -> None:
        """Sends a JSON body now; `label` goes along as X-Request-Id. Returns at once."""
        labelled = f"X-Request-Id: {label}\r\n" if label else ""
        self._send(
            f"POST {self.prefix}{path} HTTP/1.1\r\n{self._fixed}{labelled}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body,
            exchange,
        )

    def get(self, path: str, exchange: Exchange) -> None:
        self._send(f"GET {self.prefix}{path} HTTP/1.1\r\n{self._fixed}\r\n".encode(), exchange)

    async def fetch(self, path: str, body: bytes | None = None) -> Whole:
        """The whole answer of a GET, or of a POST of `body`."""
        whole = Whole()
        if body is None:
            self.get(path, whole)
        else:
            self.post(path, body, whole)
        await whole.done.wait()
        return whole

    async def connect(self, count: int) -> None:
        """Opens connections ahead of need. Raises OSError."""
        for _ in range(count):
            self._idle.append(await self._opened())

    async def close(self) -> None:
        """Ends what is under way with an error, and takes nothing more."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for connection in list(self._open):
            connection.transport.abort()
        while self._open or self._tasks:
            await asyncio.sleep(0.001)

    def _send(self, request: bytes, exchange: Exchange) -> None:
        if self._closed:
            exchange.end("the client was closed", time.perf_counter())
            return
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                connection.start(request, exchange, again=True)
                return
        task = asyncio.get_running_loop().create_task(self._connect(request, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, request: bytes, exchange: Exchange) -> None:
        try:
            connection = await self._opened()
        except (OSError, ssl.SSLError) as error:
            exchange.end(f"cannot connect to {self.host}:{self.port}: {error}", time.perf_counter())
            return
        except asyncio.CancelledError:
            exchange.end("the client was closed", time.perf_counter())
            raise
        connection.start(request, exchange)

    async def _opened(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), self.host, self.port, ssl=self._ssl)
        return connection


class _Connection(asyncio.Protocol):
    """One connection and the answer that is read from it: a head, then a body by length, by chunks or to the end."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._exchange: Exchange | None = None
        self._request = b""
        self._again = False
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = b""
        self._in_body = False
        self._left = 0  # of the body, or of the chunk
        self._chunked = self._to_end = self._closes = False
        self._last_chunk = False
        self.transport: asyncio.Transport

    # -- from the client

    def start(self, request: bytes, exchange: Exchange, again: bool = False) -> None:
        """Sends; `again` when the connection has been used before, and so may be on the way to its end."""
        self._exchange, self._request, self._again = exchange, request, again
        self._buffer, self._in_body = b"", False
        self._chunked = self._to_end = self._closes = self._last_chunk = False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._client.timeout_s, self._late)
        self.transport.write(request)
        exchange.sent(time.perf_counter())

    # -- from the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client._open.add(self)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._exchange is None:
            self.transport.abort()
            return
        try:
            if not self._in_body:
                data = self._head(data)
                if not self._in_body:
                    return
            self._body(data, now)
        except ValueError as error:
            self._finish(f"not HTTP: {error}", now)
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        client = self._client
        client._open.discard(self)
        if self in client._idle:
            client._idle.remove(self)
        exchange = self._exchange
        if exchange is None:
            return
        now = time.perf_counter()
        if self._in_body and self._to_end and error is None:
            self._finish(None, now)
        elif self._again and not self._in_body and not self._buffer:
            # The server closed an idle connection while the request was on its way: it was not read.
            self._forget()
            client._send(self._request, exchange)
        else:
            self._finish(f"the connection ended: {error or 'closed by the server'}", now)

    # -- the answer

    def _head(self, data: bytes) -> bytes:
        """Reads the status line and headers; returns what follows them."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise ValueError("the headers do not end")
            return b""
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        rest, self._buffer = self._buffer[end + 4 :], b""
        version, status, *_ = lines[0].split(" ", 2)
        if not version.startswith("HTTP/1"):
            raise ValueError(lines[0][:40])
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if status.startswith("1"):
            return self._head(rest)
        self._closes = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
        self._chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        self._left = 0 if self._chunked else int(headers.get("content-length", -1))
        if status in ("204", "304"):
            self._left = 0
        self._to_end = self._left < 0
        self._in_body = True
        assert self._exchange is not None
        self._exchange.head(int(status), headers)
        return rest

    def _body(self, data: bytes, now: float) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self._chunked:
            self._chunks(data, now, exchange)
        elif self._to_end:
            exchange.data(data, now)
        else:
            if data:
                exchange.data(data[: self._left], now)
            self._left -= len(data)
            if self._left <= 0:
                self._whole(now)

    def _chunks(self, data: bytes, now: float, exchange: Exchange) -> None:
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        pieces, at = [], 0
        while at < len(data):
            if self._left > 0:  # inside of a chunk; 2 more bytes end it
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._left = -2
                continue
            if self._left < 0:
                skipped = min(-self._left, len(data) - at)
                at += skipped
                self._left += skipped
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > _MAX_HEAD_BYTES:
                    raise ValueError("a chunk's size does not end")
                self._buffer = data[at:]
                break
            line = data[at:end]
            at = end + 2
            if self._last_chunk:  # trailers, then an empty line
                if not line:
                    if pieces:
                        exchange.data(b"".join(pieces), now)
                    self._whole(now)
                    return
                continue
            self._left = int(line.split(b";", 1)[0], 16)
            self._last_chunk = self._left == 0
        if pieces:
            exchange.data(b"".join(pieces), now)

    def _whole(self, now: float) -> None:
        exchange = self._exchange
        self._forget()
        # Before `end`, which may send the next request: it takes this connection.
        if self._closes:
            self.transport.close()
        else:
            self._client._idle.append(self)
        assert exchange is not None
        exchange.end(None, now)

    def _late(self) -> None:
        self._finish(f"no answer within {self._client.timeout_s:g} s", time.perf_counter())
        self.transport.abort()

    def _finish(self, error: str | None, now: float) -> None:
        exchange = self._exchange
        self._forget()
        if exchange is not None:
            exchange.end(error, now)

    def _forget(self) -> None:
        self._exchange = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class SseSplitter:
    """Bytes of a text/event-stream -> the data of its events, as they become whole."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> list[bytes]:
        text = self._rest + piece if self._rest else piece
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *events, self._rest = text.split(b"\n\n")
        return [found for event in events if (found := _event_data(event)) is not None]


def _event_data(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
