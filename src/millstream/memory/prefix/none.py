"""No prefix cache: every prompt is computed from its first token."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from millstream.core.cache import CacheGroup
from millstream.core.plan import PrefixHit
from millstream.core.registry import Card
from millstream.memory.blocks import BlockPool
from millstream.memory.protocol import Insertion

CARD = Card("none", "remembers nothing")

_NOTHING = Insertion(place=None)


class NoPrefix:
    """An index that never keeps a block."""

    def bind(self, pools: Mapping[str, BlockPool], groups: Sequence[CacheGroup], block_size: int) -> None:
        pass

    def match(self, key: Hashable, tokens: Sequence[int], now: float, limit: int | None = None) -> PrefixHit:
        return PrefixHit(0, {})

    def enter(self, key: Hashable, tokens: Sequence[int], length: int, now: float) -> Insertion:
        return _NOTHING

    def insert(
        self,
        key: Hashable,
        tokens: Sequence[int],
        length: int,
        blocks: Mapping[str, Sequence[int]],
        now: float,
        place: object = None,
    ) -> Insertion:
        return _NOTHING

    def above(self, place: object, num_blocks: int) -> object:
        return None

    def evict(self, group: str, num_blocks: int, now: float) -> int:
        return 0

    def evictable(self, group: str) -> int:
        return 0

    def forget(self, key: Hashable) -> int:
        return 0

    def clear(self) -> None:
        pass

    def check(self) -> None:
        pass


PLUGIN = NoPrefix
