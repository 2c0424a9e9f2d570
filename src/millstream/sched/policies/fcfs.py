"""First come, first served: by arrival; the latest gives way when blocks run out.

The order of Orca and vLLM (PagedAttention, section 4.5): fair in the plain sense, and nobody starves.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


class Fcfs(Policy):
    constant_rank = True

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (seq.arrival, seq.request_id)


CARD = Card("fcfs", "first come, first served")
PLUGIN = Fcfs
