"""Earliest due first: by when the next thing that a request wishes for is due.

Due is its first token (`arrival + ttft_s`), then each next one at the pace that it wished for, and in any case the
whole (`arrival + e2e_s`), whichever is earlier. Who wished for nothing is due `default_s` after it came, so that it
does not starve. Under overload the order by due times serves those that are late already; with `late_last` they go
behind all that can still be on time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`default_s`: seconds after its arrival at which a request without wishes is due."""

    default_s: float = 60.0
    late_last: bool = False
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        if not self.default_s > 0 or not self.patience_s > 0:
            raise ValueError("default_s and patience_s must be above 0")


class Edf(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        due = self._due(seq)
        late = self.config.late_last and view.now - due > 0 and view.now - seq.arrival < self.config.patience_s
        return (1.0 if late else 0.0, due)

    def _due(self, seq: SeqView) -> float:
        slo, arrival, first = seq.slo, seq.arrival, seq.first_token
        due = math.inf if slo.e2e_s is None else arrival + slo.e2e_s
        wish = slo.ttft_s
        if first is None:
            if wish is not None and arrival + wish < due:
                due = arrival + wish
        elif slo.tpot_s is not None:
            # Measured from when the first one was to come: who is ahead of its time may wait.
            start = first if wish is None else arrival + wish
            due = min(due, start + slo.tpot_s * seq.num_output)
        return due if due < math.inf else arrival + self.config.default_s


CARD = Card("edf", "earliest due first, by the wishes of requests")
PLUGIN = Edf
