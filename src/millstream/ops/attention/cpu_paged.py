"""Paged attention in C++: keys and values are read where they lie, nothing is gathered.

Equal inputs give equal bits whatever the batch, the chunking and the number of threads; `ops/cpu/paged_attention.cpp`
says how.

Shapes: T new tokens, H query heads, D head dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch

from millstream.core.registry import Card
from millstream.ops.attention.protocol import AttentionAsk, Pages
from millstream.ops.cpu import build
from millstream.ops.layout import BatchLayout
from millstream.ops.table import Refusal

CARD = Card(
    name="cpu-paged",
    summary="Native paged attention on the CPU: reads K/V in place, the same bits for every batch and chunking.",
)

LAYOUT = "k-transposed"

_POINTERS = ("q", "out", "lse", "k", "v", "query_start", "seq_lens", "block_tables", "parallel")
_SIZES = (
    *("q_token_stride", "q_head_stride", "out_token_stride", "out_head_stride", "num_rows", "table_stride"),
    *("num_blocks", "block_size", "heads", "kv_heads", "dim", "window", "num_threads", "page_bits"),
)


class AttentionArgs(ctypes.Structure):
    """Mirrors MillstreamAttention in paged_attention.cpp."""

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
    args: dict[str, AttentionArgs] = field(default_factory=dict)


class CpuPaged:
    """Ragged rows, causal, grouped queries, sliding window, softcap; plain pages in float32 or bfloat16."""

    preference = 10

    def accepts(self, ask: AttentionAsk) -> Refusal | None:
        if ask.device != "cpu":
            return Refusal(f"the model runs on {ask.device}")
        if ask.page_layout != LAYOUT:
            return Refusal(f"pages laid out as {ask.page_layout!r}, the kernel reads {LAYOUT!r}")
        if ask.page_dtype not in ("float32", "bfloat16"):
            return Refusal(f"pages of {ask.page_dtype}, the kernel reads float32 and bfloat16")
        if ask.tree:
            return Refusal("token trees are not built yet")
        if ask.block_size % 16:
            return Refusal(f"blocks of {ask.block_size} tokens, the kernel needs a multiple of 16")
        if ask.head_dim % 8:
            return Refusal(f"heads of {ask.head_dim}, the kernel needs a multiple of 8")
        if ask.query_heads % ask.kv_heads:
            return Refusal(f"{ask.query_heads} query heads are not a multiple of {ask.kv_heads} kv heads")
        try:
            library = build.library("paged_attention")
        except build.KernelError as error:
            return Refusal(str(error))
        library.millstream_abi.restype = ctypes.c_int64
        if library.millstream_abi(0) != ctypes.sizeof(AttentionArgs):
            return Refusal("the compiler lays the kernel's arguments out differently")
        return None

    def prepare(self, layout: BatchLayout, buffers: MutableMapping[str, torch.Tensor] | None = None) -> State:
        return State(
            layout.query_start.to(torch.int32).contiguous(),
            layout.seq_lens.to(torch.int32).contiguous(),
            {name: group.block_tables.to(torch.int32).contiguous() for name, group in layout.groups.items()},
            layout.num_tokens,
        )

    def run(
        self,
        q: torch.Tensor,
        pages: Pages,
        layer: int,
        state: State,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = q.dtype
        if dtype != torch.float32 or q.stride(-1) != 1:
            q = q.float().contiguous()
        tokens, heads, dim = q.shape
        args = state.args.get(pages.group.name)
        if args is None:
            args = state.args[pages.group.name] = _shared_args(pages, state)
        if tokens != state.num_tokens or dim != args.dim or heads % args.kv_heads:
            raise ValueError(
                f"q {tuple(q.shape)} for {state.num_tokens} tokens, {args.kv_heads} kv heads of {args.dim}"
            )
        out = torch.empty((tokens, heads, dim), dtype=torch.float32)
        lse = torch.empty((tokens, heads), dtype=torch.float32)
        k, v = pages.k, pages.v  # type: ignore[attr-defined]  # what the layout's name promises
        layer_bytes = k.stride(0) * k.element_size() * layer
        args.q, args.out, args.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        args.k, args.v = k.data_ptr() + layer_bytes, v.data_ptr() + layer_bytes
        args.q_token_stride, args.q_head_stride = q.stride(0), q.stride(1)
        args.out_token_stride, args.out_head_stride = heads * dim, dim
        args.heads = heads
        args.window = window or 0
        args.scale, args.softcap = scale, softcap or 0.0
        args.num_threads = torch.get_num_threads()
        if build.library("paged_attention").millstream_paged_attention(ctypes.byref(args)):
            raise IndexError("a row needs a block that it does not hold, or has fewer tokens than queries")
        return out if dtype == torch.float32 else out.to(dtype), lse


def _shared_args(pages: Pages, state: State) -> AttentionArgs:
    table = state.block_tables[pages.group.name]
    args = AttentionArgs()
    args.query_start, args.seq_lens = state.query_start.data_ptr(), state.seq_lens.data_ptr()
    args.block_tables, args.table_stride = table.data_ptr(), table.shape[1]
    args.parallel = build.team()
    args.num_rows = state.seq_lens.shape[0]
    args.num_blocks, args.kv_heads, args.dim, args.block_size = pages.k.shape[1:]  # type: ignore[attr-defined]
    args.page_bits = pages.dtype.itemsize * 8
    return args


PLUGIN = CpuPaged
