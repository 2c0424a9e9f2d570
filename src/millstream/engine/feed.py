"""Events on their way from the engine's thread to a reader on an event loop: in batches, and never without a bound."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Any, Generic, TypeVar, get_args

from millstream.core.events import Event, Stepped
from millstream.core.sequence import SeqView

# Of a reader that falls behind the oldest are let go: some seconds of a busy engine.
MAX_EVENTS = 65_536

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}

T = TypeVar("T")


def covered(kinds: Iterable[type[Event]]) -> frozenset[type[Event]]:
    """The given kinds and those that are kinds of them; all, where none is given."""
    asked = tuple(kinds)
    return frozenset(kind for kind in KINDS.values() if not asked or issubclass(kind, asked))


def still(event: Event) -> Event:
    """The event with a view that stays as it is now."""
    return event if isinstance(event, Stepped) else replace(event, seq=SeqView(event.seq.snapshot()))


class Tap(Generic[T]):
    """Listens to an engine: keeps what `keep` makes of the events of some kinds, hands it on at the end of a turn.

    Everything is called on the engine's thread.
    """

    def __init__(
        self, kinds: tuple[type[Event], ...], keep: Callable[[Event], T], hand_on: Callable[[list[T]], None]
    ) -> None:
        self._kinds = covered(kinds)
        self._keep, self._hand_on = keep, hand_on
        self._kept: list[T] = []

    def open(self, listeners: list[Callable[[Event], None]], on_turn: list[Callable[[], None]]) -> None:
        listeners.append(self._hear)
        on_turn.insert(0, self._flush)

    def close(self, listeners: list[Callable[[Event], None]], on_turn: list[Callable[[], None]]) -> None:
        if self._hear in listeners:
            self._flush()
            listeners.remove(self._hear)
            on_turn.remove(self._flush)

    def _hear(self, event: Event) -> None:
        if type(event) in self._kinds:
            self._kept.append(self._keep(event))

    def _flush(self) -> None:
        if self._kept:
            kept, self._kept = self._kept, []
            self._hand_on(kept)


class EventFeed:
    """What one reader has not read yet. `lost` counts what it was too slow for."""

    def __init__(self, limit: int = MAX_EVENTS) -> None:
        self.lost = 0
        self._events: deque[Event] = deque(maxlen=limit)
        self._news = asyncio.Event()
        self._closed = False

    def put(self, events: list[Event]) -> None:
        self.lost += max(0, len(self._events) + len(events) - (self._events.maxlen or 0))
        self._events.extend(events)
        self._news.set()

    def close(self) -> None:
        """The reader gets what is there, and the end."""
        self._closed = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._news.clear()
            await self._news.wait()


def kinds_named(names: Any) -> tuple[type[Event], ...]:
    """Raises KeyError."""
    return tuple(KINDS[name] for name in names)
