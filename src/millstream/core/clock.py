"""Clocks. Only what drives an engine reads one; the deciding stack is told the time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds from an arbitrary start, never going back."""

    def now(self) -> float: ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: {seconds}")
        self._now += seconds

    def to(self, when: float) -> None:
        """Moves to a moment, which may be now but not before."""
        if when < self._now:
            raise ValueError(f"a clock cannot go back: from {self._now} to {when}")
        self._now = when
