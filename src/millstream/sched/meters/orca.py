"""Orca's composition: prompts whole, beside the decodes, as many as come.

Iteration-level scheduling with selective batching, before prompts were cut into chunks: a long prompt makes one long
step that every decode in it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter


@dataclass(frozen=True, slots=True)
class Config:
    """`max_tokens`: prompt tokens of one step; one prompt that is longer by itself goes alone beside the decodes."""

    max_tokens: int = 4096


class Orca(Meter):
    relieved_by_preemption = False

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self._prompt_tokens = 0

    def begin(self, view: LoadView) -> None:
        self._prompt_tokens = 0

    def fit(self, seq: Sequence, n: int) -> int:
        if seq.left == 1:
            return n
        over = self._prompt_tokens and self._prompt_tokens + n > self.config.max_tokens
        return 0 if over or n < seq.left else n

    def take(self, seq: Sequence, n: int) -> None:
        if seq.left > 1:
            self._prompt_tokens += n


CARD = Card("orca", "whole prompts beside decodes")
PLUGIN = Orca
