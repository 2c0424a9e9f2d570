"""Reservation as before PagedAttention: one contiguous run of KV a sequence, claimed when it enters, kept to its end.

How long the run is, is the question that PagedAttention (section 6.1) compares answers to. "max" takes what a sequence
could come to at most, as FasterTransformer does; "pow2" rounds the true output up to a power of two; "oracle" knows the
true output. These two read the true length, so they run only where an experiment's oracle arm set it.

"hint" takes what somebody expects of the output (S3, Jin et al., 2023): a sequence that comes to the end of what was
claimed for it gives up its place, and asks for twice as much. One that comes back from the host gets blocks wherever
there are some, as many as it claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter

Reserve = Literal["max", "pow2", "oracle", "hint"]


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
        self._claimed: dict[int, int] = {}  # by sequence: tokens that were claimed last, where these are a guess
        self.outgrowths = 0

    def begin(self, view: LoadView) -> None:
        if len(self._claimed) > 2 * (len(view.waiting) + len(view.running)) + 64:
            here = {seq.id for seq in (*view.waiting, *view.running)}
            self._claimed = {one: claim for one, claim in self._claimed.items() if one in here}

    def fit(self, seq: Sequence, n: int) -> int:
        if not self.ledger.holds(seq):
            return n if self.ledger.has_run(self._length(seq)) else 0
        if self.config.reserve == "hint":
            more = self._length(seq) - seq.next_start
            # Back from the host it holds less than it claims.
            return min(n, more) if self.ledger.room(seq, more) >= more else 0
        return self.ledger.room(seq, n)

    def take(self, seq: Sequence, n: int) -> None:
        length, new = self._length(seq), not self.ledger.holds(seq)
        if (new or self.config.reserve == "hint") and not self.ledger.reserve(seq, length, 0.0, contiguous=new):
            raise AssertionError(f"sequence {seq.id} was let in, but there is no run for it")
        if self.config.reserve == "hint":
            self._claimed[seq.id] = length

    def outgrown(self, seq: Sequence) -> bool:
        claim = self._claimed.get(seq.id)
        return claim is not None and seq.left > 0 and seq.next_start >= claim

    def gave_up(self, seq: Sequence) -> None:
        if self.outgrown(seq):
            self.outgrowths += 1
            output = self._claimed[seq.id] - seq.num_prompt
            self._claimed[seq.id] = seq.num_prompt + max(2 * output, 1)

    def _length(self, seq: Sequence) -> int:
        """Tokens of the run: no more than the cache has, and without the last token of all, which is never computed."""
        return max(1, min(self._wanted(seq), self.ledger.total() * self.ledger.block_size))

    def _wanted(self, seq: Sequence) -> int:
        most = max(seq.max_len - 1, seq.num_prompt)
        if self.config.reserve == "max":
            return max(self.config.max_tokens, most)
        if self.config.reserve == "hint":
            expected = seq.view.hints.expected_output_len
            guess = most if expected is None else seq.num_prompt + max(1, expected)
            # What it has come to is more than what was expected where another engine began it.
            return min(most, max(self._claimed.get(seq.id, guess), seq.next_start + 1))
        output = seq.request.hints.oracle_output_len
        if self.config.reserve == "pow2":
            output = 1 << max(0, output - 1).bit_length()
        return max(seq.num_prompt + output, seq.known)


CARD = Card("contiguous", "one contiguous run of KV a sequence, claimed when it enters", needs=("prefix:none",))
PLUGIN = Contiguous
