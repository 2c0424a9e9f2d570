"""Recency, put off by what losing the prefix would cost: prefixes that are long, or hit often, stay longer.

The greedy-dual idea (Cao and Irani, 1997) with seconds as its currency: use sets a prefix's clock to now plus its
worth, and the earliest clock goes first. Want it where a few system prompts serve many users beside much that is
never asked again; with both weights at 0 it is LRU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from millstream.core.registry import Card

CARD = Card("cost", "evicts by recency plus what recomputing would cost (prefix length, hits)")


@dataclass(frozen=True, slots=True)
class Config:
    """Each doubling of hits is worth `hit_s` seconds of recency, each token of the prefix `token_s`."""

    hit_s: float = 30.0
    token_s: float = 0.002

    def __post_init__(self) -> None:
        for name in ("hit_s", "token_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value!r}, allowed are finite numbers from 0")


class Cost:
    """Last use plus worth in seconds."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def key(self, last_use: float, num_tokens: int, hits: int, now: float) -> tuple[float, ...]:
        return (last_use + self._config.hit_s * math.log2(1 + hits) + self._config.token_s * num_tokens, last_use)


PLUGIN = Cost
