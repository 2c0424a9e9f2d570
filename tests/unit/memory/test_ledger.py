"""The ledger and the radix index by example."""

from __future__ import annotations

import time

import pytest
from fake_kv import FULL, FakeKv, sequence, window

from millstream.core import registry
from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError, UnknownName
from millstream.core.plan import NO_BLOCK, Holding, Move, Tier
from millstream.core.registry import Choice
from millstream.core.sequence import Sequence
from millstream.memory.blocks import BlockFault, OutOfBlocks
from millstream.memory.ledger import Ledger


def ledger(
    block_size: int = 4,
    blocks: int = 16,
    groups: tuple[CacheGroup, ...] = (FULL,),
    host: int = 0,
    prefix: Choice | str = "radix",
    **sizes: int,
) -> Ledger:
    num_blocks = {group.name: sizes.get(group.name, blocks) for group in groups}
    index = registry.make("prefix", prefix)
    return Ledger(groups, block_size, num_blocks, index, {group.name: host for group in groups})


def compute(books: Ledger, seq: Sequence, n: int, now: float = 0.0, kv: FakeKv | None = None) -> None:
    """One step of `n` tokens of one sequence, there and back."""
    books.grow(seq, n, now)
    if kv is not None:
        kv.move(books.drain_moves())
        kv.compute(seq.holdings, seq.tokens, seq.request.cache_salt, seq.computed, seq.computed + n)
    seq.computed += n
    books.settle(seq, now)
    books.check()


def remember(books: Ledger, seq_id: int, tokens: list[int], now: float = 0.0, salt: str = "") -> None:
    """A sequence that comes, is computed in one chunk and leaves its tokens to the index."""
    seq = sequence(seq_id, tokens, salt)
    seq.computed = books.attach(seq, now)
    compute(books, seq, len(tokens) - seq.computed, now)
    books.release(seq, now, remember=True)
    books.check()


def found(books: Ledger, tokens: list[int], salt: str = "", now: float = 0.0) -> int:
    return books.match(sequence(-1, [*tokens, 7777], salt), now)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8])
def test_a_hit_is_exact_at_every_remainder_of_the_block_size(block_size: int) -> None:
    prompt = list(range(100, 100 + 3 * block_size))
    for length in range(len(prompt) + 1):
        books = ledger(block_size)
        kv = FakeKv(books.groups, block_size)
        first = sequence(1, prompt)
        compute(books, first, len(prompt), kv=kv)
        books.release(first, 1.0, remember=True)
        second = sequence(2, [*prompt[:length], 7, 8, 9])
        second.computed = books.attach(second, 2.0)
        kv.move(books.drain_moves())
        assert second.computed == length
        kv.verify(second.holdings, second.tokens, "", length, length)
        compute(books, second, 3, 2.0, kv)
        assert found(books, prompt) == len(prompt), "the one that shared has written into what it shared"


@pytest.mark.parametrize("left_over", [1, 2, 3])
def test_a_partly_filled_last_block_is_remembered_at_release_and_copied_at_attach(left_over: int) -> None:
    books = ledger(4)
    tokens = list(range(8 + left_over))
    remember(books, 1, tokens)
    seq = sequence(2, [*tokens, 50])
    assert books.attach(seq, 1.0) == 8 + left_over
    (move,) = books.drain_moves()
    holding = seq.holdings["full"]
    assert move == Move("full", 2, holding.blocks[2])
    assert holding.blocks[:2] == (0, 1)
    assert holding.blocks[2] != 2
    assert books.stats()["prefix_hit_tokens"] == 8 + left_over


def test_at_least_one_token_is_always_computed() -> None:
    books = ledger(2)
    remember(books, 1, [1, 2, 3, 4])
    same = sequence(2, [1, 2, 3, 4])
    assert books.match(same, 1.0) == 3
    assert books.attach(same, 1.0) == 3
    assert books.match(sequence(3, [1]), 1.0) == 0


def test_a_limit_cuts_the_hit() -> None:
    books = ledger(2)
    remember(books, 1, [1, 2, 3, 4, 5])
    assert books.attach(sequence(2, [1, 2, 3, 4, 5]), 1.0, limit=0) == 0
    assert books.attach(sequence(3, [1, 2, 3, 4, 5]), 1.0, limit=3) == 3


def test_salts_and_adapters_are_kept_apart() -> None:
    books = ledger()
    remember(books, 1, [1, 2, 3, 4, 5], salt="one tenant")
    assert found(books, [1, 2, 3, 4, 5]) == 0
    assert found(books, [1, 2, 3, 4, 5], salt="another") == 0
    assert found(books, [1, 2, 3, 4, 5], salt="one tenant") == 5
    assert books.match(sequence(2, [1, 2, 3, 4, 5, 6], "one tenant", adapter="lora"), 0.0) == 0


def test_two_that_compute_the_same_at_once_end_up_with_one_copy() -> None:
    books = ledger(2)
    a, b = sequence(1, [1, 2, 3, 4, 5]), sequence(2, [1, 2, 3, 4, 9])
    compute(books, a, 5)
    before = books.free()
    compute(books, b, 5)
    assert before - books.free() == 1
    assert a.holdings["full"].blocks[:2] == b.holdings["full"].blocks[:2]
    assert books.stats()["deduplicated_blocks"] == 2


def test_the_prefix_used_longest_ago_goes_first() -> None:
    books = ledger(2, blocks=6)
    for i, token in enumerate((10, 20, 30)):
        remember(books, i, [token] * 4, now=float(i))
    assert books.match(sequence(9, [10, 10, 10, 10, 1]), 5.0) == 4
    compute(books, sequence(10, [40, 40]), 2, 6.0)
    assert found(books, [20] * 4) == 2, "leaf first: only the end of the oldest is gone"
    assert found(books, [10] * 4) == found(books, [30] * 4) == 4
    assert books.stats()["evicted_blocks"] == 1


def test_the_cost_order_keeps_what_is_hit_often() -> None:
    for name, kept in (("lru", 20), ("cost", 10)):
        books = ledger(2, blocks=3, prefix=Choice("radix", {"evict": name}))
        remember(books, 1, [10, 10], now=0.0)
        for i in range(3):
            remember(books, 2 + i, [10, 10], now=1.0)
            asker = sequence(50 + i, [10, 10, 99])
            assert books.attach(asker, 1.0) == 2
            books.release(asker, 1.0, remember=False)
        remember(books, 8, [20, 20], now=2.0)
        compute(books, sequence(9, [30, 30, 30, 30]), 4, 3.0)
        assert found(books, [kept] * 2) == 2
        assert found(books, [30 - kept] * 2) == 0


def test_what_a_sequence_holds_is_never_evicted() -> None:
    books = ledger(2, blocks=4)
    holder = sequence(1, [1, 2, 3, 4])
    compute(books, holder, 4)
    assert books.free() == 2
    assert books.index.evict("full", 4, 1.0) == 0
    greedy = sequence(2, list(range(50, 60)))
    assert books.room(greedy, 10) == 4
    with pytest.raises(OutOfBlocks, match="needs 3 blocks of 'full' for tokens 0 to 5; 2 of 4 can be had"):
        books.grow(greedy, 6, 1.0)
    assert not greedy.holdings
    assert books.match(sequence(3, [1, 2, 3, 4, 5]), 1.0) == 4


def test_a_pool_of_one_block_still_makes_progress_and_forgets_what_it_must() -> None:
    books = ledger(4, blocks=1)
    remember(books, 1, [1, 2, 3])
    again = sequence(2, [1, 2, 3])
    assert books.match(again, 1.0) == 2
    # The only block is the one to copy from: the hit is given up rather than the sequence.
    assert books.attach(again, 1.0) == 0
    assert books.room(again, 9) == 4
    compute(books, again, 3, 1.0)
    assert found(books, [1, 2, 3]) == 0


def test_a_write_into_a_shared_block_copies_it_first_whoever_writes() -> None:
    for parent_first in (True, False):
        books = ledger(4)
        kv = FakeKv(books.groups, 4)
        parent = sequence(1, [1, 2, 3, 4, 5, 6])
        compute(books, parent, 6, kv=kv)
        child = sequence(2, [1, 2, 3, 4, 5, 6, 70])
        books.fork(parent, child, 6)
        child.computed = 6
        parent.tokens.append(60)
        assert parent.holdings["full"].blocks == child.holdings["full"].blocks
        assert books.blocks_needed(child, 1) == 1
        for seq in (parent, child) if parent_first else (child, parent):
            compute(books, seq, 1, 1.0, kv)
        assert books.stats()["copied_blocks"] == 1, "the second writer is alone with the block"
        for seq in (parent, child):
            kv.verify(seq.holdings, seq.tokens, "", 7, 7)


def test_beams_that_change_places_all_at_once_read_their_new_pasts() -> None:
    books = ledger(2)
    kv = FakeKv(books.groups, 2)
    beams = [sequence(i, [9, 9, 9, i]) for i in range(3)]
    for beam in beams:
        compute(books, beam, 4, kv=kv)
    pasts = [list(beam.tokens) for beam in beams]
    books.permute([(beams[0], beams[1], 4), (beams[1], beams[2], 4), (beams[2], beams[1], 4)])
    books.check()
    for beam, past in zip(beams, (1, 2, 1), strict=True):
        kv.verify(beam.holdings, pasts[past], "", 4, 4)
    books.adopt(beams[0], beams[0], 3)
    assert beams[0].holdings["full"].length == 3
    books.check()


def test_rollback_frees_whole_blocks_and_keeps_the_rest() -> None:
    books = ledger(4, prefix="none")
    seq = sequence(1, list(range(11)))
    compute(books, seq, 11)
    books.rollback(seq, 5)
    seq.computed = 5
    assert seq.holdings["full"] == Holding("full", (0, 1), 5)
    assert books.free() == 14
    books.rollback(seq, 9)
    assert seq.holdings["full"].length == 5
    books.rollback(seq, 0)
    assert books.free() == 16
    books.check()


def test_blocks_behind_a_window_are_given_up_and_can_be_had_again() -> None:
    near = window(3, "near")
    books = ledger(2, groups=(FULL, near), full=20, near=4)
    kv = FakeKv(books.groups, 2)
    seq = sequence(1, list(range(30)))
    for _ in range(30):
        compute(books, seq, 1, kv=kv)
    table = seq.holdings["near"].blocks
    assert table[:13] == (NO_BLOCK,) * 13
    assert NO_BLOCK not in table[13:]
    assert len(seq.holdings["full"].blocks) == 15


def test_a_hit_ends_where_its_window_is_all_there() -> None:
    near = window(4, "near")
    books = ledger(2, groups=(FULL, near), full=20, near=20)
    remember(books, 1, list(range(12)))
    assert found(books, list(range(12))) == 12
    assert found(books, [*range(7), 99]) == 7
    # Windows give up what is far behind first; the end of the prompt stays findable.
    books.index.evict("near", 3, 1.0)
    books.check()
    assert found(books, list(range(12))) == 12
    assert found(books, [*range(7), 99]) == 0
    seq = sequence(2, [*range(12), 99])
    assert books.attach(seq, 2.0) == 12
    assert seq.holdings["near"].blocks[:4] == (NO_BLOCK,) * 4
    books.index.evict("near", 1, 3.0)
    books.release(seq, 3.0, remember=False)
    books.check()


def test_a_fork_can_compute_its_parents_last_token_again_though_windows_moved_on() -> None:
    for length in range(6, 14):
        books = ledger(2, groups=(FULL, window(4)))
        kv = FakeKv(books.groups, 2)
        leader = sequence(1, list(range(length)))
        compute(books, leader, length, kv=kv)
        child = sequence(2, list(range(length)))
        books.fork(leader, child, length - 1)
        child.computed = length - 1
        compute(books, child, 1, kv=kv)


def test_going_back_behind_a_window_is_refused_and_changes_nothing() -> None:
    books = ledger(2, groups=(window(4),))
    seq = sequence(1, list(range(20)))
    compute(books, seq, 20)
    before = dict(seq.holdings)
    with pytest.raises(BlockFault, match="goes back to 5 tokens, but 'window' keeps only those from 16"):
        books.rollback(seq, 5)
    with pytest.raises(BlockFault, match="keeps only those from 16"):
        books.fork(seq, sequence(2, [0]), 5)
    assert seq.holdings == before
    books.check()


def test_swapping_copies_everything_both_ways_and_frees_the_other_side() -> None:
    books = ledger(2, blocks=4, groups=(FULL, window(3)), host=4)
    kv = FakeKv(books.groups, 2)
    seq = sequence(1, list(range(8)))
    compute(books, seq, 7, kv=kv)
    assert books.swap_out(seq, 1.0)
    moves = books.drain_moves()
    assert all((move.source_tier, move.target_tier) == (Tier.DEVICE, Tier.HOST) for move in moves)
    kv.move(moves)
    assert books.free() == 4
    assert books.room(seq, 1) == 0
    with pytest.raises(BlockFault, match="swapped out"):
        books.grow(seq, 1, 1.0)
    # Somebody else overwrites what it had.
    other = sequence(2, list(range(50, 58)))
    compute(books, other, 8, 2.0, kv)
    assert not books.swap_in_room(seq)
    books.release(other, 3.0, remember=True)
    assert books.swap_in_room(seq)
    books.swap_in(seq, 4.0)
    kv.move(books.drain_moves())
    kv.verify(seq.holdings, seq.tokens, "", 7, 7)
    compute(books, seq, 1, 5.0, kv)
    assert books.host.free("full") == 4


def test_without_host_room_a_swap_is_refused_and_changes_nothing() -> None:
    books = ledger(2, host=1)
    seq = sequence(1, [1, 2, 3, 4])
    compute(books, seq, 4)
    before = dict(seq.holdings)
    assert not books.swap_out(seq, 1.0)
    assert seq.holdings == before
    assert books.drain_moves() == ()
    books.check()


def test_a_contiguous_reservation_is_one_run_that_stays_through_its_life() -> None:
    books = ledger(2, blocks=8)
    remember(books, 1, [1, 2, 3, 4])
    small = sequence(2, [5])
    compute(books, small, 1)
    seq = sequence(3, [1, 2, 3, 4, 5])
    assert books.reserve(seq, 10, 1.0, contiguous=True)
    run = seq.holdings["full"].blocks
    assert run == tuple(range(run[0], run[0] + 5))
    assert not books.reserve(sequence(4, [1]), 10, 1.0, contiguous=True)
    books.check()
    compute(books, seq, 5, 2.0)
    books.rollback(seq, 2)
    seq.computed = 2
    assert seq.holdings["full"].blocks == run
    books.release(seq, 3.0, remember=True)
    assert found(books, [1, 2]) == 2
    books.check()


def test_what_is_computed_instead_after_a_rollback_is_found_under_its_own_past_only() -> None:
    books = ledger(2)
    seq = sequence(1, [1, 2, 3, 4, 5, 6])
    compute(books, seq, 6)
    books.rollback(seq, 2)
    seq.computed = 2
    seq.tokens[2:] = [30, 40, 50, 60, 70, 80]
    compute(books, seq, 6, 1.0)
    assert found(books, [1, 2, 30, 40, 50, 60, 70, 80]) == 8
    assert found(books, [1, 2, 3, 4, 5, 6, 70, 80]) == 6


def test_what_a_fork_computes_is_found_under_its_own_past_only() -> None:
    books = ledger(2)
    parent, child = sequence(1, [1, 2, 3, 4, 5, 6]), sequence(2, [1, 2, 30, 40, 50, 60, 70, 80])
    compute(books, parent, 6)
    books.fork(parent, child, 2)
    child.computed = 2
    compute(books, child, 6, 1.0)
    assert found(books, [1, 2, 30, 40, 50, 60, 70, 80]) == 8
    assert found(books, [1, 2, 3, 4, 5, 6, 70, 80]) == 6


def test_a_rollback_keeps_of_a_reservation_only_what_nobody_else_holds() -> None:
    books = ledger(1, blocks=12)
    seq = sequence(1, list(range(9)))
    assert books.reserve(seq, 11, 0.0)
    compute(books, seq, 9)
    books.rollback(seq, 3)
    seq.computed = 3
    seq.tokens[3:] = [70, 71, 72]
    # Had it kept the blocks that the index remembers, it would now hold the end of that prefix without its middle.
    compute(books, seq, 1, 1.0)
    assert books.free() == books.index.evictable("full") + 1
    books.index.evict("full", 12, 2.0)
    books.check()


def test_a_reservation_copies_a_shared_last_block_so_that_its_room_is_sure() -> None:
    books = ledger(4, blocks=3)
    parent, child = sequence(1, [1, 2]), sequence(2, [1, 2, 3])
    compute(books, parent, 2)
    books.fork(parent, child, 2)
    child.computed = 2
    assert not books.reserve(child, 13, 1.0)
    assert books.reserve(child, 8, 1.0)
    assert books.free() == 0
    assert books.room(child, 9) == 6
    assert len(books.drain_moves()) == 1


def test_tokens_in_flight_are_not_remembered() -> None:
    books = ledger(2)
    seq = sequence(1, list(range(8)))
    books.grow(seq, 4, 0.0)
    seq.in_flight = 4
    books.settle(seq, 0.0)
    assert found(books, list(range(8))) == 0
    books.grow(seq, 4, 0.0)
    seq.computed, seq.in_flight = 4, 4
    books.settle(seq, 0.0)
    assert found(books, list(range(8))) == 4
    books.release(seq, 0.0, remember=True)
    assert found(books, list(range(8))) == 4


def test_a_longer_tail_takes_the_place_of_the_shorter_one() -> None:
    books = ledger(8)
    for length in (3, 5, 7):
        remember(books, length, list(range(length)))
    assert books.stats()["idle_blocks"] == 1
    assert found(books, list(range(8))) == 7
    remember(books, 9, list(range(4)))
    assert books.stats()["idle_blocks"] == 1


def test_a_recurrent_group_keeps_one_block_and_is_never_hit() -> None:
    books = ledger(2, groups=(FULL, CacheGroup("state", Keep.RECURRENT)))
    seq = sequence(1, list(range(9)))
    compute(books, seq, 9)
    assert len(seq.holdings["state"].blocks) == 1
    child = sequence(2, list(range(9)))
    books.fork(seq, child, 9)
    child.computed = 9
    compute(books, child, 1)
    assert child.holdings["state"].blocks != seq.holdings["state"].blocks
    with pytest.raises(BlockFault, match="keeps only its last"):
        books.rollback(seq, 4)
    books.release(seq, 1.0, remember=True)
    assert found(books, list(range(9))) == 0


def test_a_decode_step_inside_a_block_keeps_the_very_table() -> None:
    books = ledger(64, blocks=200)
    seq = sequence(1, [1] * 10_000)
    compute(books, seq, 9_000)
    table = seq.holdings["full"].blocks
    for _ in range(20):
        books.grow(seq, 1, 1.0)
        seq.computed += 1
        books.settle(seq, 1.0)
        assert seq.holdings["full"].blocks is table


@pytest.mark.parametrize(("index", "wide"), [("radix", False), ("radix", True)])
def test_the_work_of_an_operation_does_not_grow_with_the_index(index: str, wide: bool) -> None:
    """Ten times as many remembered prompts may not make one prompt's life ten times as long."""

    def seconds(count: int) -> float:
        books = ledger(4, blocks=2 * count, prefix=index)
        first = [0] if wide else []
        prompts = [[*first, i, i >> 3, 1, 2, 3, 4][:8] for i in range(3 * count)]
        for i in range(2 * count):
            seq = sequence(i, prompts[i])
            books.grow(seq, len(seq.tokens), float(i))
            seq.computed = len(seq.tokens)
            books.release(seq, float(i), remember=True)
        best = float("inf")
        for start in range(2 * count, 2 * count + 250, 50):
            began = time.perf_counter()
            for i in range(start, start + 50):
                seq = sequence(i, prompts[i])
                seq.computed = books.attach(seq, float(i))
                books.grow(seq, len(seq.tokens) - seq.computed, float(i))
                seq.computed = len(seq.tokens)
                books.settle(seq, float(i))
                books.release(seq, float(i), remember=True)
            best = min(best, time.perf_counter() - began)
        assert books.stats()["evicted_blocks"] >= 250
        return best

    assert seconds(5_000) < 5 * seconds(500)


def test_what_leaves_through_one_group_does_not_pile_up_in_the_queue_of_another() -> None:
    books = ledger(2, groups=(FULL, window(3)), full=8, window=1000)
    for i in range(500):
        remember(books, i, [i, i, i, i], now=float(i))
    assert all(len(heap) < 150 for heap in books.index._heaps)


def test_clearing_forgets_all_that_nobody_holds() -> None:
    books = ledger(2)
    remember(books, 1, [1, 2, 3, 4, 5])
    holder = sequence(2, [1, 2, 9])
    holder.computed = books.attach(holder, 1.0)
    books.index.clear()
    books.check()
    assert found(books, [1, 2, 3, 4, 5]) == 2
    books.release(holder, 2.0, remember=False)
    books.index.clear()
    assert books.free() == 16
    assert books.index.num_nodes == 0


@pytest.mark.parametrize(
    ("groups", "block_size", "blocks", "what"),
    [
        ((), 4, 4, "at least one"),
        ((FULL, FULL), 4, 4, "different names"),
        ((FULL,), 0, 4, "block_size is 0"),
        ((FULL,), 4, 0, "has 0 blocks"),
        ((CacheGroup("w", Keep.WINDOW),), 4, 4, "window None"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    groups: tuple[CacheGroup, ...], block_size: int, blocks: int, what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        ledger(block_size, blocks, groups)


def test_an_index_serves_one_engine_only() -> None:
    index = registry.make("prefix", "radix")
    Ledger((FULL,), 4, {"full": 4}, index)
    with pytest.raises(BlockFault, match="bound to an engine already"):
        Ledger((FULL,), 4, {"full": 4}, index)


def test_options_out_of_bounds_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="hit_s is -1"):
        registry.make("evict", Choice("cost", {"hit_s": -1}))
    with pytest.raises(ConfigError, match="max_blocks is -3"):
        registry.make("tier", Choice("host", {"max_blocks": -3}), slots={})
    with pytest.raises(ConfigError, match=r"evict is 3, allowed are a name \(cost, lru\)"):
        registry.make("prefix", Choice("radix", {"evict": 3}))
    with pytest.raises(UnknownName, match="the nearest is 'lru'"):
        registry.make("prefix", Choice("radix", {"evict": "lrv"}))
    assert registry.names("prefix") == ["none", "radix"]
    assert registry.names("evict") == ["cost", "lru"]
