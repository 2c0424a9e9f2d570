"""Shortest remaining output first, by the true length: what an order by length could come to at best.

For experiments that tell regret: it runs only where an oracle arm set the true length, and says so elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`margin`: tokens less that must remain for a sequence to take the place of another. `patience_s`: seconds without
    a first token after which a request goes first (0: never)."""

    margin: int = 16
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        if self.margin < 1 or self.patience_s < 0:
            raise ValueError("margin must be at least 1, patience_s 0 or more")


class Srpt(Policy):
    preemptive = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        patience = self.config.patience_s
        late = patience > 0 and seq.first_token is None and view.now - seq.arrival > patience
        return (0.0 if late else 1.0, float(_remaining(seq)), seq.arrival)

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        return _remaining(seq) + self.config.margin <= _remaining(other)


def _remaining(seq: SeqView) -> int:
    return max(1, seq.hints.oracle_output_len - seq.num_output)


CARD = Card("srpt", "shortest remaining output first, by its true length (oracle arms of experiments)")
PLUGIN = Srpt
