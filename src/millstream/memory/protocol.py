"""What the memory room promises. Everything here counts blocks; the bytes in them belong to the KV format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from millstream.core.cache import CacheGroup
from millstream.core.plan import PrefixHit
from millstream.memory.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class Insertion:
    """What an index made of an insert.

    `place` says where in the index the sequence's last known full block is (None: at the start), so that the next
    insert of the same sequence need not begin anew. `known` lists (group, index in the block table, block): the same
    tokens were known already in another block. A caller that goes on holding the sequence holds those blocks instead
    of its own, before the index or the pools change again.
    """

    place: object
    known: tuple[tuple[str, int, int], ...] = ()


class PrefixIndex(Protocol):
    """Remembers which blocks hold the KV of which token prefixes. It owns one reference to every block it remembers.

    `key` separates what must never be shared: model, adapter, tenant salt, KV format. Tokens are compared as they are,
    not by hash. References are the lock: what a sequence holds is never evicted. An index is made unbound; `bind` gives
    it the pools once, before anything else. Methods read no clock: `now` is in engine seconds and never goes back.
    """

    def bind(self, pools: Mapping[str, BlockPool], groups: Sequence[CacheGroup], block_size: int) -> None:
        """Attaches the index to the block pools of one engine. Raises BlockFault when it is bound already."""
        ...

    def match(self, key: Hashable, tokens: Sequence[int], now: float, limit: int | None = None) -> PrefixHit:
        """The longest held prefix of the first `limit` tokens; length 0 when there is none.

        Changes nothing but last use. The hit's blocks are not held: valid until the index or the pools change.
        """
        ...

    def enter(self, key: Hashable, tokens: Sequence[int], length: int, now: float) -> Insertion:
        """Counts a use of the first `length` tokens, a length that `match` just gave; says where they are."""
        ...

    def insert(
        self,
        key: Hashable,
        tokens: Sequence[int],
        length: int,
        blocks: Mapping[str, Sequence[int]],
        now: float,
        place: object = None,
    ) -> Insertion:
        """Remembers that `blocks` (the caller's block tables, which it holds) hold the first `length` tokens.

        Where the index knew the same tokens already it keeps its own blocks. A block that it newly keeps gets one more
        reference. When `length` is no multiple of the block size the last block is filled in part; the caller gives
        such a block up afterwards, it does not write on. `place` is from an earlier insert or enter of the same tokens.
        """
        ...

    def above(self, place: object, num_blocks: int) -> object:
        """The place of the first `num_blocks` of the blocks that lead to `place`."""
        ...

    def evict(self, group: str, num_blocks: int, now: float) -> int:
        """Gives back blocks of `group` until `num_blocks` became free or nothing is left to give. Returns how many."""
        ...

    def evictable(self, group: str) -> int:
        """How many blocks of `group` could become free by `evict` now."""
        ...

    def forget(self, key: Hashable) -> int:
        """Forgets all that it knows under `key`, held or not, because something of it is damaged.

        Sequences keep what they hold. Returns how many blocks were forgotten.
        """
        ...

    def clear(self) -> None:
        """Forgets everything that no sequence holds."""
        ...

    def check(self) -> None:
        """Raises AssertionError when the index contradicts itself or the block pools."""
        ...


class EvictionOrder(Protocol):
    """Which remembered prefix goes first: the one with the smallest key.

    `last_use` is in engine seconds, `num_tokens` the length of the prefix, `hits` how often it was attached to. A key
    must not fall while `last_use`, `hits` and `now` rise: keys are looked at again only when they come up.
    """

    def key(self, last_use: float, num_tokens: int, hits: int, now: float) -> tuple[float, ...]: ...


class TierStore(Protocol):
    """Slots for blocks in another tier. It does bookkeeping only: the bytes are copied by Moves in list order."""

    def free(self, group: str) -> int: ...

    def total(self, group: str) -> int: ...

    def holds(self, seq_id: int) -> bool: ...

    def push(self, seq_id: int, counts: Mapping[str, int]) -> Mapping[str, tuple[int, ...]] | None:
        """Claims `counts[group]` slots for a sequence that holds none here; None, and no change, if there are fewer."""
        ...

    def pull(self, seq_id: int) -> None:
        """Frees all slots of a sequence; what they hold stays readable for Moves ordered before the next push."""
        ...

    def check(self) -> None: ...
