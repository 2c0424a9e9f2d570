"""A step takes at most so long, by prediction: prompts and offline work get what online decodes leave of the time.

The second phase of HyGen's scheduling (Sun et al., 2025). Online sequences that decode always go on. Prompts get the
largest chunk that the predicted time of the whole step allows, online ones first because they rank first; offline
decodes cost what they add. The model of step times is the engine's profile (`sched.profile`). Nothing else in the step:
then the first one gets a chunk whatever it takes, or nothing would ever move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.core.shape import StepShape
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter, StepCost


@dataclass(frozen=True, slots=True)
class Config:
    """`step_s`: seconds of a step; `millstream sim --find-step-time` looks for those that keep an SLO.

    `offline_from`: the least number of a priority that is offline, as the policy hygen has it. `least`: tokens of a
    prompt that are computed where nothing else can be. `offline_only`: online work is cut by nothing here.
    """

    step_s: float = 0.1
    offline_from: int = 1
    least: int = 16
    offline_only: bool = False

    def __post_init__(self) -> None:
        if not self.step_s > 0 or self.least < 1:
            raise ValueError(f"step_s must be above 0 and least at least 1, got {self.step_s} and {self.least}")


class LatencyBudget(Meter):
    relieved_by_preemption = False
    needs_cost = True

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self._cost: StepCost | None = None
        self._shape = StepShape()
        self._owed: set[int] = set()  # online decodes that are counted already
        self._cut: tuple[int, int] | None = None  # whose wish was cut last, and to how many tokens
        self._full = self._empty = False

    def begin(self, view: LoadView) -> None:
        self._cost = view.cost
        decodes = [s for s in view.running if s.left == 1 and not s.gated and s.priority < self.config.offline_from]
        self._owed = {seq.id for seq in decodes}
        keys = sum(seq.next_start + 1 for seq in decodes)
        self._shape = StepShape(decode_rows=len(decodes), decode_keys=keys, sampled=len(decodes))
        self._full, self._empty, self._cut = False, not decodes, None

    def fit(self, seq: Sequence, n: int) -> int:
        offline = seq.request.priority >= self.config.offline_from
        if seq.id in self._owed or n <= 0 or (self.config.offline_only and not offline):
            return n
        if self._takes(seq, n) <= self.config.step_s:
            return n
        low, high = 0, n
        if self._takes(seq, 1) > self.config.step_s:
            high = 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._takes(seq, middle) <= self.config.step_s:
                low = middle
            else:
                high = middle
        if low == 0 and self._empty:
            return min(n, self.config.least)
        self._cut = (seq.id, low)
        return low

    def closed(self) -> bool:
        return self._full

    def take(self, seq: Sequence, n: int) -> None:
        self._empty = False
        if seq.id in self._owed:
            self._owed.discard(seq.id)
            return
        self._shape = _with(self._shape, seq, n)
        # Not even one more token of this one, nor of anybody: so nobody else is asked.
        assert self._cost is not None
        if not self.config.offline_only:
            full = self._cut == (seq.id, n) or self._cost.seconds(self._shape) >= self.config.step_s
            self._full = self._full or full

    def gave_up(self, seq: Sequence) -> None:
        if seq.id in self._owed:
            self._owed.discard(seq.id)
            shape, keys = self._shape, seq.next_start + 1
            self._shape = replace(
                shape,
                decode_rows=shape.decode_rows - 1,
                decode_keys=max(0, shape.decode_keys - keys),
                sampled=shape.sampled - 1,
            )

    def _takes(self, seq: Sequence, n: int) -> float:
        assert self._cost is not None, "the scheduler lets nobody in who needs what is not there"
        return self._cost.seconds(_with(self._shape, seq, n))


def _with(shape: StepShape, seq: Sequence, n: int) -> StepShape:
    """The step with `n` more tokens of a sequence."""
    start, sampled = seq.next_start, shape.sampled + (n >= seq.left)
    if n == 1:
        return replace(
            shape, decode_rows=shape.decode_rows + 1, decode_keys=shape.decode_keys + start + 1, sampled=sampled
        )
    return replace(
        shape,
        prefill_rows=shape.prefill_rows + 1,
        prefill_tokens=shape.prefill_tokens + n,
        prefill_pairs=shape.prefill_pairs + n * start + n * (n + 1) // 2,
        sampled=sampled,
    )


CARD = Card("latency-budget", "a step takes at most so long, by prediction", paper=58)
PLUGIN = LatencyBudget
