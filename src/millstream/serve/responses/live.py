"""Responses that are under way on their own, whoever listens: `background` of the Responses API.

Their events are kept while they run and a while after, so that a client can come back to a stream and go on from the
event that it saw last.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable

from millstream.core.errors import MillstreamError
from millstream.serve.responses.events import Event

# Under way at once, of one key; and those that ended whose events are still there.
MAX_PER_OWNER = 256
MAX_ENDED = 64
# Events of one response beyond this many are no longer kept for who comes back.
MAX_EVENTS = 100_000


class TooManyResponses(MillstreamError):
    """A key has as many responses under way in the background as it may."""


class Live:
    """One response under way, or just ended: its events so far."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._events: list[Event] = []
        self._news = asyncio.Event()

    def add(self, events: list[Event]) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events += events
        self._news.set()

    def end(self) -> None:
        self.ended = True
        self._news.set()

    async def follow(self, after: int = -1) -> AsyncIterator[Event]:
        """Events with numbers above `after`, those that are there and those to come. Anybody may follow."""
        at = after + 1
        while True:
            while at < len(self._events):
                yield self._events[at]
                at += 1
            if self.ended:
                return
            self._news.clear()
            await self._news.wait()


class LiveResponses:
    """All of them, by id."""

    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._ended: OrderedDict[str, Live] = OrderedDict()

    def get(self, owner: str, response_id: str) -> Live | None:
        found = self._live.get(response_id) or self._ended.get(response_id)
        return found if found is not None and found.owner == owner else None

    def start(self, owner: str, response_id: str, work: Callable[[Live], Awaitable[None]]) -> Live:
        """Raises TooManyResponses."""
        if sum(live.owner == owner for live in self._live.values()) >= MAX_PER_OWNER:
            raise TooManyResponses(
                f"{MAX_PER_OWNER} responses of this key are under way in the background; wait for some"
            )
        live = self._live[response_id] = Live(owner)

        async def run() -> None:
            try:
                await work(live)
            finally:
                live.end()
                del self._live[response_id]
                self._ended[response_id] = live
                while len(self._ended) > MAX_ENDED:
                    self._ended.popitem(last=False)

        live.task = asyncio.create_task(run(), name=response_id)
        return live

    async def cancel(self, live: Live) -> None:
        """Ends it, and returns when it has ended."""
        if live.task is not None:
            live.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await live.task

    async def stop(self) -> None:
        """Ends all: the server goes away."""
        await asyncio.gather(*(self.cancel(live) for live in list(self._live.values())))
