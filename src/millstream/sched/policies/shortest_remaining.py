"""Shortest remaining first, by what somebody guesses: mean latency falls as far as the guess is good.

The remaining work is (expected output - tokens made so far), never below one; without a hint it is what max_tokens
leaves. A request that waits longer than `patience_s` goes before all that wait less, so that long ones do not starve.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`patience_s`: seconds without a first token after which a request goes first."""

    patience_s: float = 60.0


class ShortestRemaining(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        expected = seq.hints.expected_output_len
        if expected is None:
            expected = seq.max_len - seq.num_prompt
        starving = seq.first_token is None and view.now - seq.arrival > self.config.patience_s
        return (0.0 if starving else 1.0, max(1, expected - seq.num_output), seq.arrival)


CARD = Card("shortest-remaining", "shortest remaining output first, by a hint")
PLUGIN = ShortestRemaining
