"""Plain pages: what is written is read, blocks move whole, bytes are counted."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.errors import ConfigError
from millstream.core.plan import Tier
from millstream.formats.kv.plain import Config
from millstream.ops import table

GROUP = CacheGroup("full", num_layers=3, kv_heads=2, head_dim=24)
TOKEN_BYTES = 2 * 2 * 24


def allocate(dtype="float32", num_blocks=5, block_size=16, num_host_blocks=2):
    return registry.make("kv", "plain", device=True).allocate(GROUP, num_blocks, block_size, dtype, num_host_blocks)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 24, generator=generator), torch.randn(count, 2, 24, generator=generator)


@pytest.mark.parametrize("use", ["auto", "ref"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_layer_by_layer(use, dtype):
    with table.use(use):
        pages = allocate(dtype)
    slots = torch.tensor([79, 0, 17, 16, 33])
    for layer in range(3):
        k, v = tokens(5, layer)
        pages.write(layer, slots, k, v)
    for layer in range(3):
        k, v = tokens(5, layer)
        read_k, read_v = pages.read(layer, slots)
        assert read_k.dtype == pages.dtype
        assert torch.equal(read_k, k.to(pages.dtype)) and torch.equal(read_v, v.to(pages.dtype))


def test_pages_read_as_zeros_until_written():
    pages = allocate()
    k, v = pages.read(1, torch.arange(80))
    assert not k.any() and not v.any()


@pytest.mark.parametrize(
    "path",
    [
        [(0, Tier.DEVICE), (3, Tier.DEVICE)],
        [(0, Tier.DEVICE), (1, Tier.HOST), (4, Tier.DEVICE)],
        [(0, Tier.DEVICE), (0, Tier.HOST), (1, Tier.HOST), (0, Tier.DEVICE)],
    ],
)
def test_a_block_moves_whole_through_tiers(path):
    pages = allocate()
    for layer in range(3):
        pages.write(layer, torch.arange(16), *tokens(16, layer))
    for (source, source_tier), (target, target_tier) in itertools.pairwise(path):
        pages.move([source], [target], source_tier, target_tier)
    end = path[-1][0]
    for layer in range(3):
        k, v = pages.read(layer, torch.arange(end * 16, end * 16 + 16))
        assert torch.equal(k, tokens(16, layer)[0]) and torch.equal(v, tokens(16, layer)[1])


def test_every_copied_byte_is_counted_by_its_cause():
    pages = allocate()
    pages.write(0, torch.arange(7), *tokens(7))
    assert dataclasses.astuple(pages.copied) == (7 * TOKEN_BYTES * 4, 0, 0)
    pages.move([0], [1])
    block_bytes = registry.make("kv", "plain").page_bytes(GROUP, 16)
    assert dataclasses.astuple(pages.copied) == (7 * TOKEN_BYTES * 4, block_bytes, 0)


@pytest.mark.parametrize(("dtype", "element"), [("float32", 4), ("bfloat16", 2)])
def test_page_bytes_are_the_bytes_that_pages_take(dtype, element):
    host = registry.make("kv", "plain")
    assert host.page_bytes(GROUP, 16, dtype) == 3 * 16 * TOKEN_BYTES * element
    pages = allocate(dtype)
    assert pages.k.nbytes + pages.v.nbytes == 5 * host.page_bytes(GROUP, 16, dtype)


@pytest.mark.parametrize("move", [(5, 0), (-1, 0), (0, 5)])
def test_moving_a_block_that_does_not_exist_is_an_error(move):
    with pytest.raises(IndexError, match="device tier has 5"):
        allocate().move([0, move[0]], [1, move[1]])
    with pytest.raises(IndexError, match="host tier has 2"):
        allocate().move([0], [2], Tier.DEVICE, Tier.HOST)


def test_a_slot_out_of_range_is_an_error():
    with pytest.raises(IndexError, match="80"):
        allocate().write(0, torch.tensor([80]), *tokens(1))


@pytest.mark.parametrize("dtype", ["int8", "float16", "nonsense"])
def test_a_dtype_that_cannot_be_stored_is_refused(dtype):
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        Config(dtype)
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        allocate(dtype)


@pytest.mark.parametrize(("blocks", "size"), [(0, 16), (4, 0), (-1, 16)])
def test_pages_without_blocks_or_tokens_are_refused(blocks, size):
    with pytest.raises(ConfigError, match="at least 1"):
        allocate(num_blocks=blocks, block_size=size)
