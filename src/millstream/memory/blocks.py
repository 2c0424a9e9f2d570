"""Which blocks of one cache group are free, and how many hold each of the others."""

from __future__ import annotations

from collections.abc import Callable

from millstream.core.errors import MillstreamError


class OutOfBlocks(MillstreamError):
    """More blocks were taken than there are. Callers ask first, so this is a fault of the engine."""


class BlockFault(MillstreamError):
    """A block, or a sequence's hold on blocks, was used in a way that cannot be right (a double free, say)."""


class BlockPool:
    """Blocks 0 to num_blocks - 1 with reference counts.

    Free blocks are handed out last in, first out, the lowest ids first at the start; every operation is O(1), except
    `take_run`, which reads the whole pool. One reference of a block may belong to a prefix index (`remember`); a
    block that only the index refers to is idle: not free, but it can be had back by evicting. `on_idle` is called
    with every block that becomes idle. Misuse raises BlockFault and changes nothing.
    """

    __slots__ = ("_free", "_refs", "_remembered", "idle", "num_blocks", "on_idle")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise BlockFault(f"a pool cannot have {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.idle = 0
        self.on_idle: Callable[[int], None] | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._remembered = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block: int) -> int:
        """How many hold `block`, a prefix index included."""
        if not 0 <= block < self.num_blocks:
            self._known(block)
        return self._refs[block]

    def is_single(self, block: int) -> bool:
        """Whether somebody holds `block`, and nobody else; of NO_BLOCK it is false."""
        return block >= 0 and self._refs[block] == 1

    def is_remembered(self, block: int) -> bool:
        if not 0 <= block < self.num_blocks:
            self._known(block)
        return self._remembered[block] == 1

    def is_idle(self, block: int) -> bool:
        """Whether nobody but a prefix index holds `block`."""
        if not 0 <= block < self.num_blocks:
            self._known(block)
        return self._refs[block] == 1 and self._remembered[block] == 1

    def take(self) -> int:
        """A free block, now with one reference. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are held")
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def take_some(self, count: int) -> tuple[int, ...]:
        """So many free blocks, as `take` gives them one by one. Raises OutOfBlocks, and takes none."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks are taken, but {len(self._free)} of {self.num_blocks} are free")
        if count <= 0:
            return ()
        taken = tuple(self._free[: -count - 1 : -1])
        del self._free[-count:]
        for one in taken:
            self._refs[one] = 1
        return taken

    def take_run(self, count: int) -> tuple[int, ...] | None:
        """The lowest `count` free blocks with ids in a row, one reference each; None when there is no such run."""
        if count <= 0:
            return ()
        first = self.find_run(count)
        if first is None:
            return None
        taken = range(first, first + count)
        for one in taken:
            self._refs[one] = 1
        self._free = [one for one in self._free if self._refs[one] == 0]
        return tuple(taken)

    def find_run(self, count: int) -> int | None:
        """Where the lowest `count` free blocks with ids in a row begin; None when there is no such run. Takes none."""
        run = 0
        for block in range(self.num_blocks):
            run = run + 1 if self._refs[block] == 0 else 0
            if run >= count:
                return block - count + 1
        return None

    def share(self, block: int) -> None:
        """One more reference to a block that somebody holds."""
        if not (0 <= block < self.num_blocks and self._refs[block]):
            self._refuse(block, "shared")
        if self._refs[block] == 1 and self._remembered[block]:
            self.idle -= 1
        self._refs[block] += 1

    def release(self, block: int) -> bool:
        """Gives up one reference that is not the index's; True when the block became free."""
        if not (0 <= block < self.num_blocks and self._refs[block]):
            self._refuse(block, "released")
        if self._refs[block] == 1:
            if self._remembered[block]:
                raise BlockFault(f"block {block} is released, but only the prefix index holds it")
            self._refs[block] = 0
            self._free.append(block)
            return True
        self._refs[block] -= 1
        if self._refs[block] == 1 and self._remembered[block]:
            self.idle += 1
            if self.on_idle is not None:
                self.on_idle(block)
        return False

    def remember(self, block: int) -> None:
        """The index takes its one reference to a block that somebody holds."""
        if not (0 <= block < self.num_blocks and self._refs[block]):
            self._refuse(block, "remembered")
        if self._remembered[block]:
            raise BlockFault(f"block {block} is remembered already")
        self._remembered[block] = 1
        self._refs[block] += 1

    def forget(self, block: int) -> bool:
        """The index gives its reference up; True when the block became free."""
        if not (0 <= block < self.num_blocks and self._refs[block]):
            self._refuse(block, "forgotten")
        if not self._remembered[block]:
            raise BlockFault(f"block {block} is forgotten, but was not remembered")
        self._remembered[block] = 0
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self.idle -= 1
            self._free.append(block)
            return True
        return False

    def check(self) -> None:
        """Raises AssertionError when the pool contradicts itself. O(num_blocks)."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(self._refs[block] == 0 for block in self._free), "a free block is held"
        assert sum(1 for refs in self._refs if refs == 0) == len(self._free), "a block is lost: neither held nor free"
        assert all(self._refs[b] > 0 for b in range(self.num_blocks) if self._remembered[b]), (
            "a free block is remembered"
        )
        assert self.idle == sum(self.is_idle(b) for b in range(self.num_blocks)), "idle blocks are miscounted"

    def _known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise BlockFault(f"there is no block {block}; blocks are 0 to {self.num_blocks - 1}")

    def _refuse(self, block: int, what: str) -> None:
        self._known(block)
        raise BlockFault(f"block {block} is {what}, but it is free")
