"""Reservation as before PagedAttention: one contiguous run of KV a sequence, claimed when it enters, kept to its end.

How long the run is, is the question that PagedAttention (section 6.1) compares answers to. "max" takes what a sequence
could come to at most, as FasterTransformer does; "pow2" rounds the true output up to a power of two; "oracle" knows the
true output. The last two read the true length, so they run only where an experiment's oracle arm set it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import Meter

Reserve = Literal["max", "pow2", "oracle"]


@dataclass(frozen=True, slots=True)
class Config:
    """`reserve` says how the run's length is found; `max_tokens` is that of "max" (0: the sequence's own maximum)."""

    reserve: Reserve = "max"
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if self.reserve not in get_args(Reserve):
            raise ValueError(f"reserve must be one of {', '.join(get_args(Reserve))}, got {self.reserve!r}")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {self.max_tokens}")


class Contiguous(Meter):
    relieved_by_preemption = True

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self.ledger = ledger

    def fit(self, seq: Sequence, n: int) -> int:
        if self.ledger.holds(seq):
            return self.ledger.room(seq, n)
        return n if self.ledger.has_run(self._length(seq)) else 0

    def take(self, seq: Sequence, n: int) -> None:
        if not self.ledger.holds(seq) and not self.ledger.reserve(seq, self._length(seq), 0.0, contiguous=True):
            raise AssertionError(f"sequence {seq.id} was let in, but there is no run for it")

    def _length(self, seq: Sequence) -> int:
        if self.config.reserve == "max":
            return max(self.config.max_tokens, seq.max_len)
        output = seq.request.hints.oracle_output_len
        if self.config.reserve == "pow2":
            output = 1 << max(0, output - 1).bit_length()
        return max(seq.num_prompt + output, seq.known)


CARD = Card("contiguous", "one contiguous run of KV a sequence, claimed when it enters", needs=("prefix:none",))
PLUGIN = Contiguous
