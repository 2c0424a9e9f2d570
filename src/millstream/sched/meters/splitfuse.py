"""Dynamic SplitFuse (DeepSpeed-FastGen): every step computes the same number of tokens.

Each running decode takes its one token first; prompts fill what is left of the budget exactly, long ones cut into
chunks, short ones fused, the last one possibly cut. Because time grows with tokens and throughput is concave in them,
equal steps at the knee are both fastest and steadiest. Only the chunk that ends a prompt samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import Sequence
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter


@dataclass(frozen=True, slots=True)
class Config:
    """`budget`: tokens a step, from the knee of this machine's tokens-against-time curve."""

    budget: int = 256

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")


class SplitFuse(Meter):
    relieved_by_preemption = False

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config = config
        self._left = 0
        self._decodes: set[int] = set()

    def begin(self, view: LoadView) -> None:
        self._left = min(self.config.budget, view.budget.tokens or self.config.budget)
        # Decodes that the loop has not come to yet: a prompt that ranks before them must leave them room.
        self._decodes = {seq.id for seq in view.running if seq.left == 1 and not seq.gated}

    def fit(self, seq: Sequence, n: int) -> int:
        if seq.id in self._decodes:
            return min(n, self._left)
        return max(0, min(n, self._left - len(self._decodes)))

    def closed(self) -> bool:
        return self._left <= len(self._decodes)

    def take(self, seq: Sequence, n: int) -> None:
        self._left -= n
        self._decodes.discard(seq.id)

    def gave_up(self, seq: Sequence) -> None:
        self._decodes.discard(seq.id)


CARD = Card("splitfuse", "a fixed token budget a step, prompts chunked to fill it", paper=19)
PLUGIN = SplitFuse
