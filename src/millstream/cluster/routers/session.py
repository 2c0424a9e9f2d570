"""Calls of one program stay where the first of them went: their prompts grow by what was said, and it is held there.

Requests of one affinity (a client's `prompt_cache_key`) stay together too while loads are balanced, where they are of
no program that has a place: there may be very many of them at once, which calls of a program are not. Others go to the
engine with the least work, and so do those whose engine is lost.
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
    """`remember`: programs, and affinities, whose place is kept, the least recently seen forgotten first. Loads are out
    of balance where an affinity's engine has `more` requests more than the idlest, and `times` as many."""

    remember: int = 65_536
    more: int = 32
    times: float = 1.5

    def __post_init__(self) -> None:
        if self.remember < 1 or self.more < 0 or self.times < 1:
            raise ValueError(f"remember and times must be at least 1, more at least 0, got {self}")


class Session(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._programs: OrderedDict[str, int] = OrderedDict()
        self._affinities: OrderedDict[str, int] = OrderedDict()

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        at = {member.place: member for member in members}
        if request.program is not None and (place := self._programs.get(request.program.id, -1)) in at:
            return place
        held, low = at.get(self._affinities.get(request.affinity, -1)), min(member.requests for member in members)
        if held is None:
            # It is lost, or takes nothing more: where this one goes, the others follow.
            self._affinities.pop(request.affinity, None)
            return least_used(members)
        if held.requests - low > self.config.more and held.requests > self.config.times * low:
            return least_used(members)
        return held.place

    def sent(self, request: Request, place: int, now: float) -> None:
        if request.program is not None:
            self._keep(self._programs, request.program.id, place)
        if request.affinity:
            # Those that went elsewhere for its load do not take the others with them.
            self._keep(self._affinities, request.affinity, self._affinities.get(request.affinity, place))

    def _keep(self, places: OrderedDict[str, int], name: str, place: int) -> None:
        places[name] = place
        places.move_to_end(name)
        if len(places) > self.config.remember:
            places.popitem(last=False)


CARD = Card("session", "calls of a program, or of one prompt_cache_key, where the first one went")
PLUGIN = Session
