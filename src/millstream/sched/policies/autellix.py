"""Programs first that have had least: calls of agents are scheduled by what their whole program was served.

Autellix (Luo et al., 2025; published as Agentix). A table holds for each program the time for which its calls were
worked on. A call begins at the level of its program, not at the top, and sinks as it is served itself, so that long
programs do not hold up short ones and nothing of the future is known. Two ways to count a program:

- "plas": the sum over its calls that ended, for programs of one thread;
- "atlas": its longest path: a call inherits what its program had come to when it was made, and the program is at least
  what a call inherited and its own time. For programs that fan out, whose calls wait for the slowest.

Levels are powers of `ratio` times `quantum_s`; inside a level calls go first come, first served, and a call may take
the place of one of a deeper level. A call that has waited `starving` times as long as it was served, its program's
waits and service counted in, goes to the top and begins anew there. Calls of no program are programs of their own,
which leaves a multi-level feedback queue. Across engines the service of a program comes with its calls
(`Program.service_s`, set by the router of the same name).
When to want it: agents, tree searches and chats that make many calls each, more than the machine can do at once.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, get_args

from millstream.core.events import Computed, Event, Finished, Preempted, Stepped, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy

Count = Literal["plas", "atlas"]


@dataclass(frozen=True, slots=True)
class Config:
    """`quantum_s`: service of the top level; each of the `levels` below is `ratio` times as wide as the one before.

    `starving`: waiting over service at which a call goes to the top (0: never). `every`: steps between two times at
    which calls may take others' places. `remember`: programs without a call inside whose service is kept.
    """

    count: Count = "atlas"
    quantum_s: float = 0.5
    ratio: float = 2.0
    levels: int = 12
    starving: float = 20.0
    every: int = 4
    remember: int = 16_384

    def __post_init__(self) -> None:
        if self.count not in get_args(Count):
            raise ValueError(f"count must be one of {', '.join(get_args(Count))}, got {self.count!r}")
        if not self.quantum_s > 0 or not self.ratio >= 1 or self.levels < 1:
            raise ValueError("quantum_s must be above 0, ratio and levels at least 1")
        if self.starving < 0 or self.every < 1 or self.remember < 1:
            raise ValueError("starving must be 0 or more, every and remember at least 1")


class _Program:
    """Seconds: `service` by the way of counting, `worked` and `waited` over its calls that ended."""

    __slots__ = ("calls", "service", "waited", "worked")

    def __init__(self) -> None:
        self.service = self.worked = self.waited = 0.0
        self.calls = 0


class _Call:
    """`inherited`: service of the program when it was made. `worked`, `waited`: its own since it was made, or raised
    to the top. `all_worked`, `all_waited`: since it was made. `since`: when it began to wait, None while it runs."""

    __slots__ = ("all_waited", "all_worked", "arrival", "inherited", "level", "program", "since", "waited", "worked")

    def __init__(self, program: _Program, inherited: float, arrival: float) -> None:
        self.program, self.inherited, self.arrival = program, inherited, arrival
        self.worked = self.waited = self.all_worked = self.all_waited = 0.0
        self.since: float | None = arrival
        self.level = 0


class Autellix(Policy):
    preemptive = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._programs: dict[str, _Program] = {}  # with calls inside
        self._idle: OrderedDict[str, _Program] = OrderedDict()
        self._calls: dict[int, _Call] = {}  # by sequence
        self._waiting: dict[int, _Call] = {}
        self._stepping: list[_Call] = []  # had a part in the step that is being settled
        self._ending: list[tuple[SeqView, _Call]] = []  # ended in that step, which counts yet
        self._steps = 0
        self.promotions = 0

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        call = self._calls.get(seq.id)
        return (0.0, seq.arrival) if call is None else (float(call.level), call.arrival)

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        if self._steps % self.config.every:
            return False
        mine, its = self._calls.get(seq.id), self._calls.get(other.id)
        return mine is not None and its is not None and mine.level < its.level

    def observe(self, event: Event) -> None:
        if isinstance(event, Computed):
            call = self._calls.get(event.seq.id)
            if call is not None:
                self._runs(call, event.seq.id, event.now)
                self._stepping.append(call)
        elif isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Submitted):
            self._submitted(event.seq, event.now)
        elif isinstance(event, Preempted):
            call = self._calls.get(event.seq.id)
            if call is not None and call.since is None:
                call.since = event.now
                self._waiting[event.seq.id] = call
        elif isinstance(event, Finished):
            self._finished(event.seq, event.now)

    def _submitted(self, seq: SeqView, now: float) -> None:
        name, told = _name(seq), 0.0 if seq.program is None else seq.program.service_s
        program = self._programs.get(name)
        if program is None:
            program = self._programs[name] = self._idle.pop(name) if name in self._idle else _Program()
        program.service = max(program.service, told)
        program.worked = max(program.worked, told)
        program.calls += 1
        call = _Call(program, program.service, seq.arrival)
        call.level = self._level(call)
        self._calls[seq.id] = self._waiting[seq.id] = call

    def _runs(self, call: _Call, seq_id: int, now: float) -> None:
        if call.since is not None:
            waited = max(0.0, now - call.since)
            call.waited += waited
            call.all_waited += waited
            call.since = None
            self._waiting.pop(seq_id, None)

    def _stepped(self, event: Stepped) -> None:
        self._steps += event.steps
        for call in self._stepping:
            call.worked += event.seconds
            call.all_worked += event.seconds
            call.level = self._level(call)
        self._stepping.clear()
        for seq, call in self._ending:
            self._leave(seq, call)
        self._ending.clear()
        starving = self.config.starving
        if starving:
            for call in self._waiting.values():
                if call.level and call.since is not None:
                    program = call.program
                    waited = program.waited + call.waited + event.now - call.since
                    worked = program.worked + call.worked
                    if waited >= starving * worked and waited > self.config.quantum_s:
                        # At the top it has only what it is served from here on.
                        call.inherited = call.worked = call.waited = 0.0
                        call.since, call.level = event.now, 0
                        call.all_waited += waited
                        self.promotions += 1

    def _finished(self, seq: SeqView, now: float) -> None:
        call = self._calls.pop(seq.id, None)
        if call is None:
            return
        self._runs(call, seq.id, now)
        if call in self._stepping:
            self._ending.append((seq, call))
        else:
            self._leave(seq, call)

    def _leave(self, seq: SeqView, call: _Call) -> None:
        name, program = _name(seq), call.program
        if self.config.count == "plas":
            program.service += call.all_worked
        else:
            program.service = max(program.service, call.inherited + call.all_worked)
        program.worked += call.all_worked
        program.waited += call.all_waited
        program.calls -= 1
        if program.calls <= 0:
            self._programs.pop(name, None)
            if seq.program is not None:
                self._idle[name] = program
                self._idle.move_to_end(name)
                if len(self._idle) > self.config.remember:
                    self._idle.popitem(last=False)

    def _level(self, call: _Call) -> int:
        attained = call.inherited + call.worked
        config = self.config
        if attained < config.quantum_s:
            return 0
        # Level k ends at quantum * (1 + ratio + ... + ratio^k).
        depth = attained / config.quantum_s
        if config.ratio > 1:
            depth = math.log(depth * (config.ratio - 1) + 1, config.ratio)
        # Sums of the same steps may differ in their last digits.
        return min(config.levels - 1, int(depth + 1e-6))


def _name(seq: SeqView) -> str:
    return f"{seq.tenant}\0{seq.program.id}" if seq.program is not None else f"\0{seq.request_id}"


CARD = Card("autellix", "programs that had least service first, calls by levels", paper=42)
PLUGIN = Autellix
