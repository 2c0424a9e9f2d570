from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.kv import kv_write, kv_write4, kv_write8


def exact(
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    size = v_pages.shape[2]
    for t, slot in enumerate(slots.tolist()):
        for head in range(k.shape[1] if slot >= 0 else 0):
            k_pages[slot // size, head, :, slot % size] = k[t, head].to(k_pages.dtype)
            v_pages[slot // size, head, slot % size, :] = v[t, head].to(v_pages.dtype)
    return k_pages.double(), v_pages.double()


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    k_pages, v_pages, *rest = args
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    function(k_pages, v_pages, *rest)
    return k_pages, v_pages


def written(
    tokens: int, heads: int, dim: int, size: int, order: str, dtype: torch.dtype = torch.float32, strided: bool = False
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """`order` of the slots: run (neighbours), scatter (random, distinct), holes (some negative)."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        blocks = tokens // size + 3
        k_pages = torch.randn(blocks, heads, dim, size, generator=generator).to(dtype)
        v_pages = torch.randn(blocks, heads, size, dim, generator=generator).to(dtype)
        if order == "run":
            slots = torch.arange(size // 2, size // 2 + tokens)
        else:
            slots = torch.randperm(blocks * size, generator=generator)[:tokens]
        if order == "holes":
            slots[::3] = -1
        qkv = torch.randn(tokens, 3 * heads, dim, generator=generator)
        # Keys and values usually come as slices of one product, with its strides.
        k, v = qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
        return k_pages, v_pages, slots, *((k, v) if strided else (k.contiguous(), v.contiguous()))

    return make


def exact8(
    pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, ...]:
    pages = pages.clone()
    width = -(-k.shape[2] // 16) * 16
    for t, slot in enumerate(slots.tolist()):
        block, offset = slot // block_size, slot % block_size
        for head in range(k.shape[1] if slot >= 0 else 0):
            page = pages[block, head]
            scales = page[2 * block_size * width :].view(torch.float32)
            for place, x in enumerate((k[t, head], v[t, head])):
                most = x.abs().max()
                scales[place * block_size + offset] = most / 127.0
                for d in range(width):
                    value = round(float(x[d] * (127.0 / most))) if d < len(x) and most > 0 else 0
                    at = (
                        (d // 4 * block_size + offset) * 4 + d % 4
                        if place == 0
                        else (offset // 4 * width + d) * 4 + offset % 4
                    )
                    page[place * block_size * width + at] = value + 128 if place == 0 else value % 256
    return (pages.double(),)


def exact4(
    pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, ...]:
    pages = pages.clone()
    width = -(-k.shape[2] // 32) * 32
    for t, slot in enumerate(slots.tolist()):
        block, offset = slot // block_size, slot % block_size
        for head in range(k.shape[1] if slot >= 0 else 0):
            page = pages[block, head]
            halves = page[block_size * width :].view(torch.float16)
            for place, x in enumerate((k[t, head], v[t, head])):
                zero = x.min().half()
                scale = ((x.max() - zero.float()).clamp(min=0.0) / 15.0).half()
                halves[2 * place * block_size + offset] = scale
                halves[(2 * place + 1) * block_size + offset] = zero
                for d in range(width):
                    code = 0
                    if d < len(x) and scale > 0:
                        code = min(max(round(float((x[d] - zero.float()) * (1.0 / scale.float()))), 0), 15)
                    if place == 0:
                        at, shift = (d // 8 * block_size + offset) * 4 + d % 4, d // 4 % 2 * 4
                    else:
                        quad = offset // 4 * width * 2 + (d // 32 * 16 + d % 16) * 4
                        at, shift = block_size * width // 2 + quad + offset % 4, d // 16 % 2 * 4
                    page[at] = int(page[at]) & (240 >> shift) | code << shift
    return (pages.double(),)


def outcome_codes(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    pages = args[0].clone()
    function(pages, *args[1:])
    return (pages,)


def written_codes(
    bits: int, tokens: int, heads: int, dim: int, size: int, order: str, offset: float = 0.0
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """The same keys, values and slots, for pages of codes: around `offset` and below zero by as much.

    One token has nothing but zeros, and one a head of equal values.
    """

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        _, v_pages, slots, k, v = written(tokens, heads, dim, size, order, strided=True)(generator)
        k += offset
        v -= offset
        if tokens > 3:
            k[2] = v[2] = 0.0
            k[3, 0] = v[3, 0] = 0.7
        width = -(-dim // (128 // bits)) * (128 // bits)
        head = size * (2 * width * bits // 8 + 8)
        return torch.zeros(v_pages.shape[0], heads, head, dtype=torch.uint8), slots, k, v, size

    return make


TABLES = (
    Table(
        kv_write8,
        (
            Case("one token", written_codes(8, 1, 3, 64, 64, "run"), 0.0),
            Case("no token", written_codes(8, 0, 3, 64, 64, "run"), 0.0),
            Case("a run over several blocks", written_codes(8, 40, 3, 64, 16, "run"), 0.0),
            Case("slots passed over", written_codes(8, 20, 2, 72, 48, "holes"), 0.0),
            Case("odd head", written_codes(8, 9, 1, 7, 4, "scatter"), 0.0),
            Case("wide head", written_codes(8, 5, 1, 256, 64, "scatter"), 0.0),
        ),
        exact8,
        outcome_codes,
    ),
    Table(
        kv_write4,
        (
            Case("one token", written_codes(4, 1, 3, 64, 64, "run"), 0.0),
            Case("no token", written_codes(4, 0, 3, 64, 64, "run"), 0.0),
            Case("a run over several blocks", written_codes(4, 40, 3, 64, 16, "run"), 0.0),
            Case("slots passed over", written_codes(4, 20, 2, 72, 48, "holes"), 0.0),
            Case("odd head", written_codes(4, 9, 1, 7, 4, "scatter"), 0.0),
            Case("wide head", written_codes(4, 5, 1, 256, 64, "scatter"), 0.0),
            Case("far from zero", written_codes(4, 9, 2, 80, 16, "scatter", offset=300.0), 0.0),
        ),
        exact4,
        outcome_codes,
    ),
    Table(
        kv_write,
        (
            Case("one token", written(1, 3, 64, 64, "run"), 0.0),
            Case("no token", written(0, 3, 64, 64, "run"), 0.0),
            Case("a run over several blocks", written(150, 3, 64, 64, "run", strided=True), 0.0),
            Case("a decode step", written(33, 3, 64, 16, "scatter", strided=True), 0.0),
            Case("slots passed over", written(40, 2, 72, 48, "holes"), 0.0),
            Case("odd sizes", written(9, 1, 7, 5, "run"), 0.0),
            Case("wide head, many tokens", written(300, 1, 256, 64, "run"), 0.0),
            Case("bfloat16", written(70, 3, 64, 64, "scatter", torch.bfloat16, True), 0.0),
        ),
        exact,
        outcome,
    ),
)
