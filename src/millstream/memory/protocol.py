"""What the memory room promises. Everything here counts blocks; the bytes in them belong to the KV format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from millstream.core.plan import PrefixHit


class PrefixIndex(Protocol):
    """Remembers which blocks hold the KV of which token prefixes. It owns one reference to every block it remembers.

    `key` separates what must never be shared: model, adapter, tenant salt, KV format. Tokens are compared as they are,
    not by hash.
    """

    def match(self, key: Hashable, tokens: Sequence[int], now: float) -> PrefixHit:
        """The longest held prefix of `tokens`; length 0 when there is none. Changes nothing but last use."""
        ...

    def lock(self, key: Hashable, tokens: Sequence[int], length: int) -> object:
        """Pins the nodes that cover the first `length` tokens, until `unlock` gets the returned ticket back."""
        ...

    def unlock(self, ticket: object) -> None: ...

    def insert(self, key: Hashable, tokens: Sequence[int], blocks: Mapping[str, Sequence[int]], now: float) -> None:
        """Remembers that `blocks` hold `tokens`. Where it knew the same tokens already it keeps its own blocks.

        A block that it newly keeps gets one more reference. The last block may be filled in part.
        """
        ...

    def evict(self, group: str, num_blocks: int, now: float) -> int:
        """Gives back blocks of `group` until `num_blocks` became free or nothing is left to give. Returns how many."""
        ...

    def evictable(self, group: str) -> int:
        """How many blocks of `group` could become free by `evict` now."""
        ...

    def clear(self) -> None:
        """Forgets everything that is not locked."""
        ...

    def check(self) -> None:
        """Raises AssertionError when the index contradicts itself or the block pools."""
        ...


class EvictionOrder(Protocol):
    """Which remembered prefix goes first: the one with the smallest key."""

    def key(self, last_use: float, num_tokens: int, hits: int, now: float) -> tuple[float, ...]: ...
