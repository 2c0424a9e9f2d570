"""The block pool: by example, and against a naive model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millstream.memory.blocks import BlockFault, BlockPool, OutOfBlocks


def test_a_fresh_pool_hands_out_the_lowest_ids_first() -> None:
    pool = BlockPool(3)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OutOfBlocks, match="all 3 blocks are held"):
        pool.take()


def test_the_block_that_was_freed_last_is_handed_out_first() -> None:
    pool = BlockPool(3)
    for _ in range(3):
        pool.take()
    pool.release(2)
    pool.release(0)
    assert pool.take() == 0


def test_a_double_free_is_detected_and_changes_nothing() -> None:
    pool = BlockPool(2)
    block = pool.take()
    assert pool.release(block)
    with pytest.raises(BlockFault, match="block 0 is released, but it is free"):
        pool.release(block)
    assert pool.num_free == 2
    pool.check()


def test_a_block_is_free_only_when_its_last_holder_gave_it_up() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.share(block)
    assert not pool.release(block)
    assert pool.release(block)


@pytest.mark.parametrize("block", [-1, 2, 10**9])
def test_a_block_that_does_not_exist_is_named(block: int) -> None:
    with pytest.raises(BlockFault, match=f"there is no block {block}; blocks are 0 to 1"):
        BlockPool(2).references(block)


def test_a_free_block_is_neither_shared_nor_remembered_nor_forgotten() -> None:
    pool = BlockPool(1)
    for use in (pool.share, pool.remember, pool.forget):
        with pytest.raises(BlockFault, match="but it is free"):
            use(0)


def test_the_index_holds_one_reference_at_most_and_only_it_gives_that_up() -> None:
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(BlockFault, match="was not remembered"):
        pool.forget(block)
    pool.remember(block)
    with pytest.raises(BlockFault, match="remembered already"):
        pool.remember(block)
    pool.release(block)
    with pytest.raises(BlockFault, match="only the prefix index holds it"):
        pool.release(block)
    assert pool.idle == 1
    assert pool.forget(block)
    assert (pool.idle, pool.num_free) == (0, 1)


def test_a_block_that_only_the_index_holds_is_announced_as_idle() -> None:
    idle: list[int] = []
    pool = BlockPool(1)
    pool.on_idle = idle.append
    block = pool.take()
    pool.remember(block)
    assert idle == []
    pool.release(block)
    pool.share(block)
    assert (idle, pool.idle) == ([0], 0)


def test_a_run_is_the_lowest_one_that_is_long_enough() -> None:
    pool = BlockPool(8)
    for _ in range(8):
        pool.take()
    for block in (1, 3, 4, 5, 6):
        pool.release(block)
    assert pool.take_run(5) is None
    assert pool.take_run(2) == (3, 4)
    assert pool.take_run(0) == ()
    assert sorted(pool.take() for _ in range(3)) == [1, 5, 6]
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """The model: how often each block is held, and which ones the index remembers."""

    @initialize(size=st.integers(0, 6))
    def start(self, size: int) -> None:
        self.size = size
        self.pool = BlockPool(size)
        self.pool.on_idle = self.announce
        self.holders: Counter[int] = Counter()
        self.remembered: set[int] = set()
        self.announced: list[int] = []

    def announce(self, block: int) -> None:
        self.announced.append(block)

    def is_free(self, block: int) -> bool:
        return not self.holders[block] and block not in self.remembered

    @rule()
    def take(self) -> None:
        if any(self.is_free(block) for block in range(self.size)):
            block = self.pool.take()
            assert self.is_free(block)
            self.holders[block] = 1
        else:
            with pytest.raises(OutOfBlocks):
                self.pool.take()

    @rule(count=st.integers(1, 4))
    def take_run(self, count: int) -> None:
        runs = [
            tuple(range(first, first + count))
            for first in range(self.size - count + 1)
            if all(self.is_free(block) for block in range(first, first + count))
        ]
        got = self.pool.take_run(count)
        assert got == (runs[0] if runs else None)
        self.holders.update(got or ())

    @precondition(lambda self: self.size)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.size - 1))
        if self.is_free(block):
            with pytest.raises(BlockFault):
                self.pool.share(block)
        else:
            self.pool.share(block)
            self.holders[block] += 1

    @precondition(lambda self: self.size)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.size - 1))
        if not self.holders[block]:
            with pytest.raises(BlockFault):
                self.pool.release(block)
            return
        self.announced.clear()
        freed = self.pool.release(block)
        self.holders[block] -= 1
        assert freed == self.is_free(block)
        assert self.announced == ([block] if block in self.remembered and not self.holders[block] else [])

    @precondition(lambda self: self.size)
    @rule(data=st.data(), forget=st.booleans())
    def index(self, data: st.DataObject, forget: bool) -> None:
        block = data.draw(st.integers(0, self.size - 1))
        if forget == (block not in self.remembered) or self.is_free(block):
            with pytest.raises(BlockFault):
                (self.pool.forget if forget else self.pool.remember)(block)
        elif forget:
            self.remembered.discard(block)
            assert self.pool.forget(block) == self.is_free(block)
        else:
            self.pool.remember(block)
            self.remembered.add(block)

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.num_free == sum(self.is_free(block) for block in range(self.size))
        assert self.pool.idle == sum(not self.holders[block] for block in self.remembered)
        for block in range(self.size):
            assert self.pool.references(block) == self.holders[block] + (block in self.remembered)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestThePoolAgreesWithANaiveModel = PoolMachine.TestCase
