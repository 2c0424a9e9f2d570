"""The engine with the least work before it: prompt tokens of what is inside, by its speed."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.cluster.protocol import Member, Router, least_used
from millstream.core.registry import Card
from millstream.core.request import Request


class LeastWork(Router):
    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        return least_used(members)


CARD = Card("least-work", "the engine with the fewest prompt tokens before it, for its speed")
PLUGIN = LeastWork
