"""The host tier: slots in host memory for the blocks of sequences that were put off.

A sequence copies everything that it holds, also blocks that it shares with others or with the prefix index: its host
copy then depends on nobody, and what the index still remembers becomes evictable at once. Paper: vLLM's swapping
(Kwon et al., 2023), whose host pool is no larger than the device pool; here the bound is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.memory.blocks import BlockFault, BlockPool

CARD = Card("host", "keeps the blocks of preempted sequences in host memory")


@dataclass(frozen=True, slots=True)
class Config:
    """`max_blocks` bounds the slots of each group further than the caller does; None does not."""

    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.max_blocks is not None and (not isinstance(self.max_blocks, int) or self.max_blocks < 0):
            raise ValueError(f"max_blocks is {self.max_blocks!r}, allowed are integers from 0, or none")


class Host:
    """Slots by group. `slots` gives how many blocks of each group there is memory for."""

    def __init__(self, config: Config, slots: Mapping[str, int]) -> None:
        limit = config.max_blocks
        self._pools = {
            group: BlockPool(count if limit is None else min(count, limit)) for group, count in slots.items()
        }
        self._held: dict[int, dict[str, tuple[int, ...]]] = {}

    def free(self, group: str) -> int:
        return self._pools[group].num_free if group in self._pools else 0

    def total(self, group: str) -> int:
        return self._pools[group].num_blocks if group in self._pools else 0

    def holds(self, seq_id: int) -> bool:
        return seq_id in self._held

    def push(self, seq_id: int, counts: Mapping[str, int]) -> Mapping[str, tuple[int, ...]] | None:
        if seq_id in self._held:
            raise BlockFault(f"sequence {seq_id} is in the host tier already")
        if any(count > self.free(group) for group, count in counts.items()):
            return None
        held = {
            group: tuple(self._pools[group].take() for _ in range(count)) if count else ()
            for group, count in counts.items()
        }
        self._held[seq_id] = held
        return held

    def pull(self, seq_id: int) -> None:
        if seq_id not in self._held:
            raise BlockFault(f"sequence {seq_id} is not in the host tier")
        for group, slots in self._held.pop(seq_id).items():
            for slot in slots:
                self._pools[group].release(slot)

    def check(self) -> None:
        for group, pool in self._pools.items():
            pool.check()
            slots = [slot for held in self._held.values() for slot in held.get(group, ())]
            assert len(slots) == len(set(slots)), f"a host slot of {group} belongs to two sequences"
            assert len(slots) == pool.num_blocks - pool.num_free, f"host slots of {group} are lost"


PLUGIN = Host
