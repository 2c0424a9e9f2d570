"""Longest prefix match: whoever's prompt the prefix cache holds most of goes first.

The order of SGLang (Zheng et al., 2024): what is held is used before it is evicted, and nobody is treated fairly.
`patience_s` bounds what that may cost anybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`patience_s`: seconds without a first token after which a request goes first."""

    patience_s: float = 60.0


class LongestPrefix(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if seq.state is State.RUNNING or seq.admitted is not None:
            return (0.0, 0.0, seq.arrival)
        if view.now - seq.arrival > self.config.patience_s:
            return (1.0, 0.0, seq.arrival)
        return (2.0, -float(view.hit(seq)), seq.arrival)


CARD = Card("longest-prefix", "the longest prefix that is held first")
PLUGIN = LongestPrefix
