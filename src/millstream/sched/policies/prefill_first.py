"""Prompts before decodes: put before an order such as fcfs, it gives the step order of vLLM in 2023.

New requests see their first token soon, and everybody who is already generating waits while they do. With the meter
of the same name (prompts whole, never beside decodes) it is the baseline of DeepSpeed-FastGen's comparison.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


class PrefillFirst(Policy):
    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (0.0 if seq.left > 1 else 1.0,)


CARD = Card("prefill-first", "prompts before decodes (stack it before another order)")
PLUGIN = PrefillFirst
