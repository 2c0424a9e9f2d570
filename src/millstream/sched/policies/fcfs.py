"""First come, first served: by arrival; the latest gives way when blocks run out.

The order of Orca and vLLM (PagedAttention, section 4.5): fair in the plain sense, and nobody starves.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from millstream.core.events import Event
from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import Budget, LoadView, Verdict


class Fcfs:
    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (seq.arrival, seq.request_id)

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        return Verdict.ADMIT

    def budget(self, view: LoadView) -> Budget:
        return Budget()

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        return running[-1]

    def observe(self, event: Event) -> None:
        pass


CARD = Card("fcfs", "first come, first served")
PLUGIN = Fcfs
