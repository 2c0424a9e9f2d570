"""Native attention over pages of any kind: the arguments of the kernels and one call of them.

Shapes: T new tokens, H query heads, D head dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from millstream.ops.attention.protocol import AttentionAsk, Pages
from millstream.ops.cpu import build
from millstream.ops.layout import BatchLayout
from millstream.ops.table import Refusal

_POINTERS = ("q", "out", "lse", "k", "v", "query_start", "seq_lens", "block_tables", "parallel")
_SIZES = (
    *("q_token_stride", "q_head_stride", "out_token_stride", "out_head_stride", "num_rows", "table_stride"),
    *("num_blocks", "block_size", "heads", "kv_heads", "dim", "window", "num_threads", "page_bits", "levels"),
)


class AttentionArgs(ctypes.Structure):
    """Mirrors MillstreamAttention in attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _SIZES]
        + [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]
    )


@dataclass(slots=True)
class State:
    """One step: the layout's tensors as the kernel takes them, by cache group, and the args its layers share."""

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: dict[str, torch.Tensor]
    num_tokens: int
    prefix_levels: int
    args: dict[str, AttentionArgs] = field(default_factory=dict)


def prepare(layout: BatchLayout) -> State:
    """What all layers of a step share."""
    return State(
        layout.query_start.to(torch.int32).contiguous(),
        layout.seq_lens.to(torch.int32).contiguous(),
        {name: group.block_tables.to(torch.int32).contiguous() for name, group in layout.groups.items()},
        layout.num_tokens,
        layout.prefix_levels,
    )


def refuses(ask: AttentionAsk, layout: str) -> Refusal | None:
    """What no kernel of this folder does."""
    if ask.device != "cpu":
        return Refusal(f"the model runs on {ask.device}")
    if ask.page_layout != layout:
        return Refusal(f"pages laid out as {ask.page_layout!r}, the kernel reads {layout!r}")
    if ask.tree:
        return Refusal("token trees are not built yet")
    if ask.block_size % 16:
        return Refusal(f"blocks of {ask.block_size} tokens, the kernel needs a multiple of 16")
    if ask.query_heads % ask.kv_heads:
        return Refusal(f"{ask.query_heads} query heads are not a multiple of {ask.kv_heads} kv heads")
    return None


def attend(
    kernel: Callable[[object], int],
    q: torch.Tensor,
    pages: Pages,
    k_address: int,
    v_address: int,
    num_blocks: int,
    state: State,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs `kernel` for q (T, H, D) over one layer's pages -> out (T, H, D) in q's dtype, lse (T, H) float32.

    Raises ValueError for a q that does not fit the step, IndexError when the pages do not hold what a row needs.
    """
    dtype = q.dtype
    if dtype != torch.float32 or q.stride(-1) != 1:
        q = q.float().contiguous()
    tokens, heads, dim = q.shape
    args = state.args.get(pages.group.name)
    if args is None:
        args = state.args[pages.group.name] = _shared_args(pages, num_blocks, state)
    if tokens != state.num_tokens or dim != args.dim or heads % args.kv_heads:
        raise ValueError(f"q {tuple(q.shape)} for {state.num_tokens} tokens, {args.kv_heads} kv heads of {args.dim}")
    out = torch.empty((tokens, heads, dim), dtype=torch.float32)
    lse = torch.empty((tokens, heads), dtype=torch.float32)
    args.q, args.out, args.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
    args.k, args.v = k_address, v_address
    args.q_token_stride, args.q_head_stride = q.stride(0), q.stride(1)
    args.out_token_stride, args.out_head_stride = heads * dim, dim
    args.heads = heads
    args.window = window or 0
    args.scale, args.softcap = scale, softcap or 0.0
    args.num_threads = torch.get_num_threads()
    if kernel(ctypes.byref(args)):
        raise IndexError("a row needs a block that it does not hold, or has fewer tokens than queries")
    return out if dtype == torch.float32 else out.to(dtype), lse


def _shared_args(pages: Pages, num_blocks: int, state: State) -> AttentionArgs:
    table = state.block_tables[pages.group.name]
    args = AttentionArgs()
    args.query_start, args.seq_lens = state.query_start.data_ptr(), state.seq_lens.data_ptr()
    args.block_tables, args.table_stride = table.data_ptr(), table.shape[1]
    args.parallel = build.team()
    args.num_rows = state.seq_lens.shape[0]
    args.num_blocks, args.kv_heads = num_blocks, pages.group.kv_heads
    args.dim, args.block_size = pages.group.head_dim, pages.block_size
    args.page_bits = pages.dtype.itemsize * 8
    args.levels = state.prefix_levels
    return args


@dataclass(frozen=True, slots=True)
class Branch:
    """Keys [start, stop) that `rows` of a step walk together, in a tree's level `depth`, counted from 1."""

    start: int
    stop: int
    rows: tuple[int, ...]
    depth: int


def branches(
    layout: BatchLayout,
    group: str,
    num_blocks: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
) -> list[Branch]:
    """What the kernels read once for several rows in a step of `layout`. Raises KernelError and IndexError."""
    state = prepare(layout)
    table = state.block_tables[group]
    args = AttentionArgs()
    args.query_start, args.seq_lens = state.query_start.data_ptr(), state.seq_lens.data_ptr()
    args.block_tables, args.table_stride = table.data_ptr(), table.shape[1]
    args.num_rows, args.num_blocks, args.block_size = layout.num_rows, num_blocks, layout.block_size
    args.heads, args.kv_heads, args.dim, args.window = heads, kv_heads, head_dim, window or 0
    args.levels, args.num_threads = layout.prefix_levels, torch.get_num_threads()
    kernel = build.library("paged_attention").millstream_branches
    kernel.restype = ctypes.c_int64
    room = 0
    while True:
        out = torch.empty(room, dtype=torch.int32)
        needed = kernel(ctypes.byref(args), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(room))
        if needed < 0:
            raise IndexError("a row needs a block that it does not hold, or has fewer tokens than queries")
        if needed <= room:
            break
        room = needed
    numbers, found = out[:needed].tolist(), []
    while numbers:
        start, stop, _, depth, count = numbers[:5]
        found.append(Branch(start, stop, tuple(numbers[5 : 5 + count]), depth))
        numbers = numbers[5 + count :]
    return found
