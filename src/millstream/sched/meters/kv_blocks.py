"""KV blocks on demand (PagedAttention, section 4): a sequence gets slots for the tokens it is about to compute.

A newcomer is only let in while a share of the blocks stays free (the watermark), so that it is not thrown out again by
the next tokens of those that run already.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter


@dataclass(frozen=True, slots=True)
class Config:
    """`watermark`: share of all blocks that stays free when a newcomer is let in."""

    watermark: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be from 0 to below 1, got {self.watermark}")


class KvBlocks(Meter):
    relieved_by_preemption = True

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self.ledger = ledger
        self._running: set[int] = set()

    def begin(self, view: LoadView) -> None:
        self._running = {seq.id for seq in view.running}

    def fit(self, seq: Sequence, n: int) -> int:
        n = self.ledger.room(seq, n)
        if n > 0 and self._running and seq.id not in self._running:
            spare = self.ledger.free() - self.ledger.blocks_needed(seq, n)
            if spare < self.config.watermark * self.ledger.total():
                return 0
        return n

    def take(self, seq: Sequence, n: int) -> None:
        self._running.add(seq.id)

    def gave_up(self, seq: Sequence) -> None:
        self._running.discard(seq.id)


CARD = Card("kv-blocks", "KV blocks on demand", paper=11)
PLUGIN = KvBlocks
