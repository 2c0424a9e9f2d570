"""Locality with shares of every engine: where most of the prompt is held, as long as the tenant has a share left there.

D2LPM (Locality-aware Fair Scheduling in LLM Serving, Cao et al., 2025): the router keeps one tree of which engine holds
which prefix, and for each tenant a deficit at each engine. A request goes to the engine that holds most of it among
those where its tenant's deficit is above zero; when there is none, all deficits of the tenant get `quantum`; where no
engine holds anything of it, to the one that is used least. Tenants are charged when a request is sent (prompt tokens
that are not held) and when it ends (tokens of the output). A small quantum spreads a tenant over engines, a large one
keeps it where its prefixes are. Engines behind it run the policy dlpm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.cluster.prefixes import PrefixMap
from millstream.cluster.protocol import Done, Member, Router, least_used
from millstream.core.registry import Card
from millstream.core.request import Request


@dataclass(frozen=True, slots=True)
class Config:
    """`quantum`: service that a tenant may get of one engine before another is tried, in weighted tokens."""

    quantum: float = 16_384.0
    input_weight: float = 1.0
    output_weight: float = 2.0
    block: int = 64
    remember: int = 4096

    def __post_init__(self) -> None:
        if not self.quantum > 0 or self.input_weight < 0 or self.output_weight < 0:
            raise ValueError("quantum must be above 0, weights 0 or more")
        if self.block < 1 or self.remember < 1:
            raise ValueError("block and remember must be at least 1")


class D2lpm(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._prefixes = PrefixMap(config.block)
        self._deficits: OrderedDict[str, dict[int, float]] = OrderedDict()
        self._asked: tuple[int, tuple[int, ...]] = (-1, ())
        self.refills = 0

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        names = self._prefixes.chain(request.prompt_ids, request.cache_salt)
        self._asked = (request.id, names)
        held = {member.place: self._prefixes.matched(names, member.place) for member in members}
        if not any(held.values()):
            return least_used(members)
        deficits = self._of(request.tenant)
        for _ in range(2):
            able = [one for one in members if deficits.setdefault(one.place, self.config.quantum) > 0]
            if able:
                return min(able, key=lambda one: (-held[one.place], one.work_s, one.requests, one.place)).place
            self.refills += 1
            # As often as it takes for one to come above zero.
            times = int(min(-deficits[one.place] for one in members) // self.config.quantum) + 1
            for one in members:
                deficits[one.place] = min(self.config.quantum, deficits[one.place] + times * self.config.quantum)
        raise AssertionError("a deficit was handed out and nobody has any")

    def sent(self, request: Request, place: int, now: float) -> None:
        number, names = self._asked
        if number != request.id:
            names = self._prefixes.chain(request.prompt_ids, request.cache_salt)
        missing = request.num_prompt - self._prefixes.matched(names, place)
        self._charge(request.tenant, place, self.config.input_weight * missing)
        self._prefixes.insert(names, place)

    def ended(self, request: Request, place: int, done: Done, now: float) -> None:
        self._charge(request.tenant, place, self.config.output_weight * done.num_output)

    def lost(self, place: int) -> None:
        self._prefixes.lost(place)
        for deficits in self._deficits.values():
            deficits.pop(place, None)

    def _of(self, tenant: str) -> dict[int, float]:
        deficits = self._deficits.setdefault(tenant, {})
        self._deficits.move_to_end(tenant)
        if len(self._deficits) > self.config.remember:
            self._deficits.popitem(last=False)
        return deficits

    def _charge(self, tenant: str, place: int, service: float) -> None:
        deficits = self._of(tenant)
        deficits[place] = deficits.get(place, self.config.quantum) - service


CARD = Card("d2lpm", "where the prefix is held, in shares of every engine for every tenant", paper=64)
PLUGIN = D2lpm
