"""Calls of one program stay where the first of them went: their prompts grow by what was said, and it is held there.

A request of no program goes to the engine with the least work. A program whose engine is lost finds another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.cluster.protocol import Member, Router, least_used
from millstream.core.registry import Card
from millstream.core.request import Request


@dataclass(frozen=True, slots=True)
class Config:
    """`remember`: programs whose place is kept, the least recently seen forgotten first."""

    remember: int = 65_536

    def __post_init__(self) -> None:
        if self.remember < 1:
            raise ValueError(f"remember must be at least 1, got {self.remember}")


class Session(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._places: OrderedDict[str, int] = OrderedDict()

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        if request.program is None:
            return least_used(members)
        place = self._places.get(request.program.id)
        if place is None or all(member.place != place for member in members):
            place = least_used(members)
        return place

    def sent(self, request: Request, place: int, now: float) -> None:
        if request.program is not None:
            self._places[request.program.id] = place
            self._places.move_to_end(request.program.id)
            if len(self._places) > self.config.remember:
                self._places.popitem(last=False)


CARD = Card("session", "calls of a program where its first one went")
PLUGIN = Session
