"""Prompts whole and never beside decodes: the step composition of vLLM in 2023 (with the policy of that name)."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter


@dataclass(frozen=True, slots=True)
class Config:
    """`max_tokens`: prompt tokens of one step; one prompt that is longer by itself goes alone."""

    max_tokens: int = 2560


class PrefillFirst(Meter):
    relieved_by_preemption = False

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self._prompt_tokens = 0

    def begin(self, view: LoadView) -> None:
        self._prompt_tokens = 0

    def fit(self, seq: Sequence, n: int) -> int:
        if seq.left == 1:
            return 0 if self._prompt_tokens else n
        over = self._prompt_tokens and self._prompt_tokens + n > self.config.max_tokens
        return 0 if over or n < seq.left else n

    def take(self, seq: Sequence, n: int) -> None:
        if seq.left > 1:
            self._prompt_tokens += n


CARD = Card("prefill-first", "whole prompts, never beside decodes", needs=("policy:prefill-first",))
PLUGIN = PrefillFirst
