"""Most urgent first: who has least time left beyond what it is expected to take.

HexGen-Text2SQL (local queue): a call has a budget, its part of the deadline of its workflow (`slo.e2e_s`, from its
arrival here), and is expected to take `hints.expected_s` on this engine. Its urgency is

    U = expected_s - (budget - waited)

and at every admission the highest goes first. What waits grows more urgent by one second a second, all alike, so the
order is that of the latest moments at which each could begin, arrival + budget - expected_s, and holds while nothing
happens. What runs keeps its place. When to want it: calls of workflows under deadlines, behind a router that sets
budgets (`cluster/routers/hexgen.py`).

A call without a budget counts as due when it came: without any, this is fcfs. Nobody starves: a budget counts for at
most `patience_s`, so who has waited twice as long is before every newcomer.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`patience_s`: seconds by which a budget, or the lack of it, can put a call back or forward at most."""

    patience_s: float = 600.0

    def __post_init__(self) -> None:
        if isinstance(self.patience_s, bool) or not isinstance(self.patience_s, int | float) or not self.patience_s > 0:
            raise ValueError(f"patience_s must be a number above 0, got {self.patience_s!r}")


class Urgency(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        budget = seq.slo.e2e_s
        spare = 0.0 if budget is None else budget - (seq.hints.expected_s or 0.0)
        patience = self.config.patience_s
        running = 0.0 if seq.state is State.RUNNING else 1.0
        return (running, seq.arrival + max(-patience, min(spare, patience)), seq.arrival, seq.request_id)


CARD = Card("urgency", "least time to spare first, by budgets within a deadline", paper=1)
PLUGIN = Urgency
