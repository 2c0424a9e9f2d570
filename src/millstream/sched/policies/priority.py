"""By the priority that a request names, the lower the earlier; put before another order such as fcfs.

The meaning of `priority` in vLLM. Those of a low number go first in every step, and of those that run the last in rank
gives its blocks up. Nothing keeps high numbers from starving: a priority is a statement, not a share.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


class Priority(Policy):
    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (seq.priority,)


CARD = Card("priority", "by the priority that a request names, lower first (stack it before another order)")
PLUGIN = Priority
