"""Paged attention in C++: keys and values are read where they lie, nothing is gathered.

Equal inputs give equal bits whatever the batch, the chunking and the number of threads; `ops/cpu/attention.h` says how.

Shapes: T new tokens, H query heads, D head dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping

import torch

from millstream.core.registry import Card
from millstream.ops.attention._native import AttentionArgs, State, attend, prepare, refuses
from millstream.ops.attention.protocol import AttentionAsk, Pages
from millstream.ops.cpu import build
from millstream.ops.layout import BatchLayout
from millstream.ops.table import Refusal

CARD = Card(
    name="cpu-paged",
    summary="Native paged attention on the CPU: reads K/V in place, the same bits for every batch and chunking.",
)

LAYOUT = "k-transposed"


class CpuPaged:
    """Ragged rows, causal, grouped queries, sliding window, softcap; plain pages in float32 or bfloat16."""

    preference = 10
    in_program = True

    def accepts(self, ask: AttentionAsk) -> Refusal | None:
        refusal = refuses(ask, LAYOUT)
        if refusal is not None:
            return refusal
        if ask.page_dtype not in ("float32", "bfloat16"):
            return Refusal(f"pages of {ask.page_dtype}, the kernel reads float32 and bfloat16")
        if ask.head_dim % 8:
            return Refusal(f"heads of {ask.head_dim}, the kernel needs a multiple of 8")
        try:
            library = build.library("paged_attention")
        except build.KernelError as error:
            return Refusal(str(error))
        library.millstream_abi.restype = ctypes.c_int64
        if library.millstream_abi(0) != ctypes.sizeof(AttentionArgs):
            return Refusal("the compiler lays the kernel's arguments out differently")
        return None

    def prepare(self, layout: BatchLayout, buffers: MutableMapping[str, torch.Tensor] | None = None) -> State:
        return prepare(layout)

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
        kernel = build.library("paged_attention").millstream_paged_attention
        k, v = pages.addresses(layer)
        return attend(kernel, q, pages, k, v, pages.num_blocks, state, scale, window, softcap)


PLUGIN = CpuPaged
