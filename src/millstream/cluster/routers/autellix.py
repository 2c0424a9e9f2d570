"""Short calls anywhere, long ones where their program is; and what a program was served goes with its calls.

Autellix (Luo et al., 2025), its load balancer: calls of at most `short` prompt tokens gain little from a prefix that is
held somewhere and go to the engine that is used least; longer ones go to the engine of their program, which is the
least used one when its first such call comes. The table of programs that all engines share is this router's: a call
carries the service of its program as `Program.service_s`. Service is what engines report of calls that ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from millstream.cluster.protocol import Done, Member, Router, least_used
from millstream.core.registry import Card
from millstream.core.request import Request

Count = Literal["plas", "atlas"]


@dataclass(frozen=True, slots=True)
class Config:
    """`count` as in the policy of the same name: a program's calls add up ("plas"), or their longest path counts."""

    short: int = 2048
    count: Count = "atlas"
    remember: int = 65_536

    def __post_init__(self) -> None:
        if self.count not in get_args(Count):
            raise ValueError(f"count must be one of {', '.join(get_args(Count))}, got {self.count!r}")
        if self.short < 0 or self.remember < 1:
            raise ValueError("short must be 0 or more, remember at least 1")


@dataclass(slots=True)
class _Program:
    service_s: float = 0.0
    place: int | None = None


class Autellix(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._programs: OrderedDict[str, _Program] = OrderedDict()

    def prepare(self, request: Request, members: Sequence[Member], now: float) -> Request:
        if request.program is None:
            return request
        return replace(request, program=replace(request.program, service_s=self._program(request).service_s))

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        if request.program is None or request.num_prompt <= self.config.short:
            return least_used(members)
        program = self._program(request)
        if program.place is None or all(member.place != program.place for member in members):
            program.place = least_used(members)
        return program.place

    def ended(self, request: Request, place: int, done: Done, now: float) -> None:
        if request.program is None:
            return
        program = self._program(request)
        if self.config.count == "plas":
            program.service_s += done.service_s
        else:
            program.service_s = max(program.service_s, request.program.service_s + done.service_s)

    def _program(self, request: Request) -> _Program:
        assert request.program is not None
        name = f"{request.tenant}\0{request.program.id}"
        program = self._programs.setdefault(name, _Program())
        self._programs.move_to_end(name)
        if len(self._programs) > self.config.remember:
            self._programs.popitem(last=False)
        return program


CARD = Card("autellix", "short calls to the least used engine, long ones to their program's", paper=42)
PLUGIN = Autellix
