"""Where most of the prompt is held, unless that engine has much more to do than the others.

The rule of SGLang's router: by the longest prefix while loads are balanced, else by load. Prefixes are known by what
was sent where (`cluster/prefixes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millstream.cluster.prefixes import PrefixMap
from millstream.cluster.protocol import Member, Router, least_used
from millstream.core.registry import Card
from millstream.core.request import Request


@dataclass(frozen=True, slots=True)
class Config:
    """`least`: share of a prompt that must be held for it to count. Loads are out of balance where the busiest engine
    has `more` requests more than the idlest, and `times` as many. `block`: tokens by which prefixes are compared."""

    least: float = 0.3
    more: int = 32
    times: float = 1.5
    block: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1 or self.more < 0 or self.times < 1 or self.block < 1:
            raise ValueError(f"least is above 0 and up to 1, more from 0, times and block from 1; got {self}")


class PrefixAffinity(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._prefixes = PrefixMap(config.block)
        self._last: tuple[int, tuple[int, ...]] = (-1, ())

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        names = self._prefixes.chain(request.prompt_ids, request.cache_salt)
        self._last = (request.id, names)
        counts = [member.requests for member in members]
        low, high = min(counts), max(counts)
        if high - low > self.config.more and high > self.config.times * low:
            return least_used(members)
        best = max(members, key=lambda one: (self._prefixes.matched(names, one.place), -one.work_s, -one.place))
        held = self._prefixes.matched(names, best.place)
        return best.place if held >= self.config.least * request.num_prompt else least_used(members)

    def sent(self, request: Request, place: int, now: float) -> None:
        if self._last[0] == request.id:
            self._prefixes.insert(self._last[1], place)

    def lost(self, place: int) -> None:
        self._prefixes.lost(place)


CARD = Card("prefix-affinity", "where most of the prompt is held, while loads are balanced")
PLUGIN = PrefixAffinity
