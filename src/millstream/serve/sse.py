"""Server-sent events: a stream of bytes that stops when its reader leaves, or reads too slowly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millstream.core.errors import MillstreamError
from millstream.serve.errors import ClientGone, telling

DONE = b"data: [DONE]\n\n"
# A line that means nothing, for whatever closes connections that say nothing.
KEEP_ALIVE = b": still here\n\n"
KEEP_ALIVE_S = 15.0
# How long a reader may take nothing while there is something to take.
STALL_S = 60.0
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_encode = msgspec.json.encode
_log = logging.getLogger("millstream.serve")

T = TypeVar("T")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def event(value: Any) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


async def guarded(request: Request, steps: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The steps of a stream that has begun: an error is its last event, in OpenAI's shape, and no [DONE] follows."""
    try:
        async for data in steps:
            yield data
    except MillstreamError as error:
        yield event(telling(error).body)
    except Exception as error:
        _log.exception(
            "%s failed on the way", getattr(request.state, "caller", None) and request.state.caller.request_id
        )
        yield event(telling(error).body)
    finally:
        await steps.aclose()


class EventStream(Response):
    """Sends what `steps` gives until it ends, its reader leaves, or its reader takes nothing for `stall_s`.

    `steps` and the `source` that they read are closed in every case, so that what they hold is given back. Nothing is
    queued here: while the reader does not read, `steps` are not asked for more.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        steps: AsyncGenerator[bytes, None],
        source: Primed[Any],
        *,
        stall_s: float = STALL_S,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.status_code, self.background = 200, None
        self.steps, self.source, self.stall_s, self.keep_alive_s = steps, source, stall_s, keep_alive_s
        self.body = b""
        self.init_headers(HEADERS)
        self._sent_s, self._sending = 0.0, False

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        # Its length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while not writer.done() and not gone.done():
                await asyncio.wait({writer, gone}, timeout=self.keep_alive_s / 3, return_when=asyncio.FIRST_COMPLETED)
                now = time.monotonic()
                if self._sending and now - self._sent_s > self.stall_s:
                    _log.info("a stream is cut: its reader took nothing for %g s", self.stall_s)
                    break
                if not self._sending and not writer.done() and now - self._sent_s > self.keep_alive_s:
                    await self._send(send, KEEP_ALIVE)
            if writer.done():
                writer.result()
        finally:
            for task in (writer, gone):
                task.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)
            await self.steps.aclose()
            # Closing a generator that never began closes nothing that it stands on.
            await self.source.aclose()

    async def _write(self, send: Send) -> None:
        self._sent_s = time.monotonic()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self.steps:
            await self._send(send, data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending, self._sent_s = True, time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending, self._sent_s = False, time.monotonic()


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, which is cancelled when whoever asked has left. Raises ClientGone then."""
    working: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        both: set[asyncio.Future[Any]] = {working, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client has left")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class Primed(Generic[T]):
    """Steps whose first one is there already: what is wrong with a request is told by the status."""

    def __init__(self, steps: AsyncGenerator[T, None]) -> None:
        self._steps = steps
        self._first: list[T] = []

    async def prime(self) -> Primed[T]:
        """Waits for the first step. Raises what the steps raise, and closes them then."""
        try:
            self._first.append(await anext(self._steps))
        except BaseException:
            await self._steps.aclose()
            raise
        return self

    def __aiter__(self) -> Primed[T]:
        return self

    async def __anext__(self) -> T:
        return self._first.pop() if self._first else await anext(self._steps)

    async def aclose(self) -> None:
        await self._steps.aclose()
