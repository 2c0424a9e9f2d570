"""A runner whose forward pass is a formula: it says how long a step takes, and when it is done.

Tokens are numbers that no two positions of two sequences have in common, so that the prefix index tells them apart as
it tells real text. How long an output really is stands in its request's seed, which nobody who decides anything sees:
the runner ends it there with a stop token, as a model does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from millstream.core.clock import VirtualClock
from millstream.core.plan import Settled, StepPlan, StepResult
from millstream.core.shape import shape_of
from millstream.runner.protocol import Capacity, Ticket
from millstream.sched.protocol import StepCost

VOCAB = 1 << 40
# Sampled tokens lie above those of prompts.
_SAMPLED = 1 << 39
STOP = VOCAB - 1


@dataclass(slots=True)
class Launched:
    """A plan on its way. Seconds of the virtual clock."""

    plan: StepPlan
    seconds: float
    done_at: float


class SimRunner:
    """Answers on `clock` in the time that `cost` says, and `noise` times a normal deviate more or less (log-normal).

    A block that moves between tiers takes `block_s` seconds.
    """

    def __init__(
        self,
        clock: VirtualClock,
        cost: StepCost,
        blocks: Mapping[str, int],
        block_size: int,
        host_blocks: Mapping[str, int] | None = None,
        *,
        plans: int = 1,
        block_s: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        slowdown: float = 1.0,
    ) -> None:
        self.clock, self.cost, self.block_s, self.noise, self.slowdown = clock, cost, block_s, noise, slowdown
        self._capacity = Capacity(plans, block_size, dict(blocks), dict(host_blocks or {}))
        self._random = random.Random(seed)
        self.free_at = 0.0
        self.serial = _SAMPLED
        self.last: StepPlan | None = None  # the plan that was collected last
        self.launched: list[Launched] = []
        self.busy_s = 0.0

    def capacity(self) -> Capacity:
        return self._capacity

    def launch(self, plan: StepPlan) -> Launched:
        seconds = self.cost.seconds(shape_of(plan, self._capacity.block_size)) if plan.extends else 0.0
        if self.block_s and plan.moves:
            seconds += self.block_s * sum(move.source_tier is not move.target_tier for move in plan.moves)
        if self.noise:
            seconds *= self._random.lognormvariate(0.0, self.noise)
        seconds *= self.slowdown
        done_at = max(self.clock.now(), self.free_at) + seconds
        self.free_at = done_at
        self.busy_s += seconds
        ticket = Launched(plan, seconds, done_at)
        self.launched.append(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        assert self.launched[0] is ticket, "plans are collected in launch order"
        assert isinstance(ticket, Launched)
        del self.launched[0]
        if self.clock.now() < ticket.done_at:
            self.clock.to(ticket.done_at)
        self.last = ticket.plan
        return StepResult(ticket.plan.id, ticket.seconds, self._settle(ticket.plan))

    def _settle(self, plan: StepPlan) -> tuple[Settled, ...]:
        settled: list[Settled] = []
        serial = self.serial
        for extend in plan.extends:
            if extend.sample is None:
                settled.append(Settled(extend.seq, len(extend.tokens)))
            else:
                serial += 1
                ask = extend.sample
                token = STOP if ask.position - ask.num_prompt + 1 >= ask.seed else serial
                settled.append(Settled(extend.seq, len(extend.tokens), (token,)))
        self.serial = serial
        return tuple(settled)

    def close(self) -> None:
        self.launched.clear()
