"""Packs requests into the KV cache by what their outputs are expected to take, the largest first.

S3 (Jin et al., NeurIPS 2023). A request is taken to need its prompt and its expected output; who waits is packed into
what is free by decreasing first fit, so that large ones do not find the cache in pieces. The reservation itself, and
what happens to who outgrows it, is the meter contiguous with `reserve = "hint"`. With `token_s` at most as many run as
keep that pace by the model of step times (the paper's latency SLO, 0.1875 s a token: the speed of reading).
When to want it: runs of KV reserved ahead (no paging) and lengths that can be told.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.events import Admitted, Event, Finished, Preempted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.core.shape import StepShape
from millstream.sched.protocol import Budget, LoadView, Policy, Verdict

# To look up a member of an enum takes longer than to compare with it.
_RUNNING = State.RUNNING


@dataclass(frozen=True, slots=True)
class Config:
    """`patience_s`: seconds without a place after which a request goes first and nobody passes it. `token_s`: seconds
    a token that those that run are to keep (0: no limit), which needs a profile of step times."""

    patience_s: float = 60.0
    token_s: float = 0.0

    def __post_init__(self) -> None:
        if self.patience_s < 0 or self.token_s < 0:
            raise ValueError("patience_s and token_s must be 0 or more")


class S3(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs_cost = config.token_s > 0
        self._packed: dict[int, int] = {}  # of those that entered at one moment: tokens
        self._at = -1.0
        self._rows = 1
        self._places: dict[int, tuple[float, float]] = {}  # ranks of those that never ran

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        arrival = seq.arrival
        if seq.state is _RUNNING:
            return (0.0, arrival)
        if view.now - arrival > self.config.patience_s:
            return (1.0, arrival)
        place = self._places.get(seq.id)
        if place is None:
            place = (2.0, -float(_tokens(seq)))
            # Of one that lost its place a last token may still be under way.
            if not seq.preemptions:
                self._places[seq.id] = place
        return place

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        packed = self._packed.values() if self._at == view.now else ()
        left = view.free_blocks - sum(_blocks(tokens, view) for tokens in packed)
        # Where nobody runs one is tried whatever it takes; the view does not tell of those who entered in this pass.
        if _blocks(_tokens(seq), view) <= left or not (view.running or packed):
            return Verdict.ADMIT
        return Verdict.HOLD if view.now - seq.arrival > self.config.patience_s else Verdict.SKIP

    def budget(self, view: LoadView) -> Budget:
        if not self.config.token_s or view.cost is None:
            return Budget()
        rows = max(1, len(view.running))
        keys = sum(seq.next_start + 1 for seq in view.running) // rows

        def keeps(count: int) -> bool:
            shape = StepShape(decode_rows=count, decode_keys=count * keys, sampled=count)
            return view.cost is None or view.cost.seconds(shape) <= self.config.token_s

        # From where it was: it changes by little from step to step.
        most = self._rows
        while most < 4096 and keeps(most + 1):
            most += 1
        while most > 1 and not keeps(most):
            most -= 1
        self._rows = most
        return Budget(rows=most)

    def observe(self, event: Event) -> None:
        if isinstance(event, Admitted):
            if self._at != event.now:
                self._at, self._packed = event.now, {}
            self._packed[event.seq.id] = _tokens(event.seq)
        elif isinstance(event, Preempted):
            self._places.pop(event.seq.id, None)
        elif isinstance(event, Finished):
            self._packed.pop(event.seq.id, None)
            self._places.pop(event.seq.id, None)


def _tokens(seq: SeqView) -> int:
    expected = seq.hints.expected_output_len
    most = max(seq.max_len - 1, seq.num_prompt)
    return most if expected is None else min(most, seq.num_prompt + max(expected, seq.num_output + 1))


def _blocks(tokens: int, view: LoadView) -> int:
    return -(-tokens // view.block_size)


CARD = Card("s3", "the largest expected length first, into what is free", paper=15)
PLUGIN = S3
