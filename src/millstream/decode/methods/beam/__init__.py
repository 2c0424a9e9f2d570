"""Beam search: the best `width` continuations are kept at every step; their KV is forked, never copied whole.

PagedAttention, section 4.4: beams share blocks by reference, and a block is copied only when two that share it write
to it. The score of a hypothesis is its summed logprob over its length to the power of `length_penalty`.
"""

import math
from dataclasses import dataclass

from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Config:
    """`width` beams; `length_penalty` above 1 favours long outputs; `early_stopping` ends once `width` have ended."""

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 1 <= self.width <= 64:
            raise ValueError(f"width must be an integer from 1 to 64, got {self.width!r}")
        if type(self.length_penalty) not in (int, float) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty!r}")
        if type(self.early_stopping) is not bool:
            raise ValueError(f"early_stopping must be true or false, got {self.early_stopping!r}")


CARD = Card("beam", "beam search over forks of the KV")
