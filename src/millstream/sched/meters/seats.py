"""At most so many sequences at once: rows of a step, and sequences that hold blocks."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter


@dataclass(frozen=True, slots=True)
class Config:
    """`max_rows`: sequences that may run at once."""

    max_rows: int = 256

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}")


class Seats(Meter):
    relieved_by_preemption = False
    counts_places = True

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self._limit = config.max_rows
        self._rows = 0
        self._seated: set[int] = set()

    def begin(self, view: LoadView) -> None:
        self._limit = min(self.config.max_rows, view.budget.rows or self.config.max_rows)
        self._rows = 0
        self._seated = {seq.id for seq in view.running}
        view.full = view.full or len(self._seated) >= self._limit

    def fit(self, seq: Sequence, n: int) -> int:
        newcomer = seq.id not in self._seated
        return 0 if self._rows >= self._limit or (newcomer and len(self._seated) >= self._limit) else n

    def closed(self) -> bool:
        return max(self._rows, len(self._seated)) >= self._limit

    def take(self, seq: Sequence, n: int) -> None:
        self._rows += 1
        self._seated.add(seq.id)

    def gave_up(self, seq: Sequence) -> None:
        self._seated.discard(seq.id)


CARD = Card("seats", "at most so many sequences at once")
PLUGIN = Seats
