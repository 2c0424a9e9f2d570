"""The prefix that was not used for the longest time goes first."""

from __future__ import annotations

from millstream.core.registry import Card

CARD = Card("lru", "evicts the prefix that was not used for the longest time")


class Lru:
    """Least recently used."""

    def key(self, last_use: float, num_tokens: int, hits: int, now: float) -> tuple[float, ...]:
        return (last_use,)


PLUGIN = Lru
