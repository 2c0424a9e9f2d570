"""By the priority that a request names, the lower the earlier; put before another order such as fcfs.

The meaning of `priority` in vLLM. Those of a low number go first in every step, and of those that run the last in rank
gives its blocks up. Nothing keeps high numbers from starving: a priority is a statement, not a share.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from millstream.core.events import Event
from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import Budget, LoadView, Verdict


class Priority:
    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (seq.priority,)

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        return Verdict.ADMIT

    def budget(self, view: LoadView) -> Budget:
        return Budget()

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        return None

    def observe(self, event: Event) -> None:
        pass


CARD = Card("priority", "by the priority that a request names, lower first (stack it before another order)")
PLUGIN = Priority
