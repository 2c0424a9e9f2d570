"""How much of a step is for prompts, by what it costs whoever decodes, and by how full the KV cache is.

Nexus (Shi et al., 2025) runs prompts and decodes at once on parts of a GPU whose ratio a cost model picks before each
batch. On one device without such parts the ratio is that of a step: this policy picks the tokens of prompts in it.
While the cache has room, prompts go first: as many of their tokens as a step may take within `decode_slack` times what
the decodes alone would. Above `threshold` of the cache decodes go first, since they free it: as few tokens as still
compute prompts at 1/`prompt_slack` of the best rate. The split is sought by a walk of a few looks from where it is, and
changed only when it is off by more than `buffer`. Prompts go shortest first, `gamma` tokens shorter for each second
that they wait; decodes first come, first served. What the paper does with parts of the machine that run at the same
time is not here. When to want it: prompts of very unlike lengths beside decodes that have to keep a pace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.core.shape import StepShape
from millstream.sched.protocol import Budget, LoadView, Policy, StepCost


@dataclass(frozen=True, slots=True)
class Config:
    """`threshold`: share of the KV blocks in use. `buffer`: share by which a better split must differ to be adopted.
    `least` and `most`: tokens of prompts in a step. `looks`: at most so many predictions on each side of the split."""

    threshold: float = 0.7
    decode_slack: float = 3.0
    prompt_slack: float = 1.5
    buffer: float = 0.3
    gamma: float = 200.0
    least: int = 16
    most: int = 4096
    looks: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or self.buffer < 0 or self.gamma < 0:
            raise ValueError("threshold is above 0 and up to 1, buffer and gamma 0 or more")
        if not self.decode_slack > 1 or not self.prompt_slack > 1:
            raise ValueError("decode_slack and prompt_slack must be above 1")
        if not 1 <= self.least <= self.most or self.looks < 1:
            raise ValueError("least is from 1 to most, looks at least 1")


_STEP = 1.2


class Nexus(Policy):
    needs_cost = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.split = 256
        """Tokens of prompts in a step, as adopted last."""
        self.switches = 0

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if seq.left <= 1 and seq.state is State.RUNNING:
            return (0.0, seq.arrival)
        # Less gamma for each second since its arrival; what is the same for all is left out.
        return (1.0, seq.left + self.config.gamma * seq.arrival)

    def budget(self, view: LoadView) -> Budget:
        """Part of a plan of both kinds only. Keeps the split between plans: that is what the buffer is about."""
        rows = keys = start = 0
        prompts = bool(view.waiting)
        for seq in view.running:
            if seq.gated:
                continue
            if seq.left == 1:
                rows += 1
                keys += seq.next_start + 1
            elif seq.left > 1:
                prompts, start = True, seq.next_start
        if not rows or not prompts or view.cost is None:
            return Budget()
        decodes = StepShape(decode_rows=rows, decode_keys=keys, sampled=rows)
        used = 1 - view.free_blocks / max(1, view.total_blocks)
        cost, roomy = view.cost, used <= self.config.threshold
        within = self._within_decodes if roomy else self._within_prompts
        found = self._walk(lambda tokens: within(cost, decodes, start, tokens), roomy)
        if abs(found - self.split) > self.config.buffer * self.split:
            self.split = found
            self.switches += 1
        return Budget(tokens=rows + self.split)

    def _walk(self, within: Callable[[int], bool], more: bool) -> int:
        """The largest (`more`) or the least split that is within the slack, as far as some looks from here tell."""
        config, split = self.config, float(self.split)
        for _ in range(config.looks):
            further = split * _STEP if more else split / _STEP
            # Towards what is wanted while that is within the slack, else back to where it is.
            if within(round(split)):
                if not config.least <= further <= config.most or not within(round(further)):
                    break
                split = further
            else:
                split = split / _STEP if more else split * _STEP
        return max(config.least, min(config.most, round(split)))

    def _within_decodes(self, cost: StepCost, decodes: StepShape, start: int, tokens: int) -> bool:
        return cost.seconds(_mixed(decodes, start, tokens)) <= self.config.decode_slack * cost.seconds(decodes)

    def _within_prompts(self, cost: StepCost, decodes: StepShape, start: int, tokens: int) -> bool:
        most = self.config.most
        best = most / cost.seconds(_mixed(StepShape(), start, most))
        return tokens / cost.seconds(_mixed(decodes, start, tokens)) >= best / self.config.prompt_slack


def _mixed(decodes: StepShape, start: int, tokens: int) -> StepShape:
    pairs = tokens * start + tokens * (tokens + 1) // 2
    rows, sampled = decodes.decode_rows, decodes.sampled
    return StepShape(1, tokens, pairs, rows, decodes.decode_keys, decodes.shared_keys, sampled)


CARD = Card("nexus", "prompts in a step by what they cost whoever decodes, shortest first", paper=57)
PLUGIN = Nexus
