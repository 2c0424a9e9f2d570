"""What every prefix index, eviction order and tier keeps to. The state machines of tests/unit/memory go deeper."""

from __future__ import annotations

import pytest
from harness import Bench

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.memory.blocks import BlockFault, BlockPool

INDEXES = registry.names("prefix")


def bound(name, num_blocks=16, block_size=4):
    pools = {"full": BlockPool(num_blocks)}
    index = registry.make("prefix", name)
    index.bind(pools, (CacheGroup("full"),), block_size)
    return index, pools["full"]


def remember(index, pool, tokens, key="k", now=0.0):
    blocks = [pool.take() for _ in range(-(-len(tokens) // 4))]
    index.insert(key, tokens, len(tokens), {"full": blocks}, now)
    for block in blocks:
        pool.release(block)
    return blocks


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_gives_only_what_was_remembered_under_the_same_key(name):
    index, pool = bound(name)
    blocks = remember(index, pool, [*range(12)])
    index.check()
    hit = index.match("k", [*range(9), 50], 1.0)
    assert hit.length in (0, 8, 9)
    if hit.length:
        assert hit.blocks["full"] == tuple(blocks[: -(-hit.length // 4)])
    assert index.match("other", [*range(12)], 1.0).length == 0
    assert index.match("k", [9, *range(11)], 1.0).length == 0
    assert index.match("k", [*range(12)], 1.0, limit=5).length <= 5


@pytest.mark.parametrize("name", INDEXES)
def test_what_is_held_is_never_evicted_and_clear_forgets_the_rest(name):
    index, pool = bound(name)
    tokens = [*range(16)]
    remember(index, pool, tokens)
    hit = index.match("k", tokens, 1.0, limit=8)
    held = hit.blocks.get("full", ())
    for block in held:
        pool.share(block)
    freed = index.evict("full", 100, 2.0)
    assert freed >= 0 and index.evictable("full") == 0
    assert all(pool.references(block) >= 1 for block in held)
    index.check()
    pool.check()
    for block in held:
        pool.release(block)
    index.clear()
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_evicts_no_more_than_it_says_it_could(name):
    index, pool = bound(name)
    for first in (0, 20, 30):
        remember(index, pool, [*range(first, first + 8)], now=float(first))
    could, free = index.evictable("full"), pool.num_free
    assert could + free == pool.num_blocks
    freed = index.evict("full", 2, 50.0)
    assert freed == min(2, could) and pool.num_free == free + freed
    index.check()


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("name", INDEXES)
def test_a_run_over_an_index_gives_everybody_their_own_tokens(name, plans):
    for num_blocks in (8, 40):
        bench = Bench(prefix=name, plans=plans, num_blocks=num_blocks)
        for n in range(12):
            bench.add([*range(n % 5 * 3), n], 5, cache_salt="ab"[n % 2])
            bench.step()
        bench.run(2000)
        for request in bench.requests.values():
            assert bench.output(request) == bench.truth(request)
        bench.clean()


@pytest.mark.parametrize("name", registry.names("evict"))
def test_an_eviction_key_is_numbers_that_never_fall_with_use(name):
    order = registry.make("evict", name)
    key = order.key(3.0, 64, 2, 5.0)
    assert isinstance(key, tuple) and all(isinstance(part, int | float) for part in key)
    assert order.key(3.0, 64, 2, 5.0) == key
    assert order.key(4.0, 64, 2, 5.0) >= key
    assert order.key(3.0, 64, 9, 5.0) >= key
    assert order.key(3.0, 64, 2, 500.0) >= key


@pytest.mark.parametrize("name", registry.names("tier"))
def test_a_tier_gives_all_the_slots_or_none_and_gets_them_back(name):
    tier = registry.make("tier", name, slots={"full": 4})
    assert (tier.free("full"), tier.total("full")) == (4, 4)
    assert tier.push(1, {"full": 5}) is None and tier.free("full") == 4 and not tier.holds(1)
    slots = tier.push(1, {"full": 3})["full"]
    assert len(set(slots)) == 3 and all(0 <= slot < 4 for slot in slots) and tier.holds(1)
    assert tier.push(2, {"full": 2}) is None
    with pytest.raises(BlockFault):
        tier.push(1, {"full": 1})
    tier.pull(1)
    assert tier.free("full") == 4 and not tier.holds(1)
    tier.check()
