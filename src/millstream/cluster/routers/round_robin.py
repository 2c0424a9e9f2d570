"""One after the other, whatever they do: the baseline of every router."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.cluster.protocol import Member, Router
from millstream.core.registry import Card
from millstream.core.request import Request


class RoundRobin(Router):
    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        # Places, not positions among those that are up: who comes back takes its turn as before.
        later = [member.place for member in members if member.place >= self._next]
        place = later[0] if later else members[0].place
        self._next = place + 1
        return place


CARD = Card("round-robin", "engines in turn")
PLUGIN = RoundRobin
