"""Paged attention in C++ over pages of 4 bits: codes unpacked in registers, dot products exact in integers.

Queries and softmax weights have 16 bits there, so what is lost was lost when keys and values were stored. Equal inputs
give equal bits whatever the batch, the chunking and the number of threads; `ops/cpu/attention4.h` says how.

Shapes: T new tokens, H query heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from millstream.core.registry import Card
from millstream.ops.attention._native import State, attend, prepare, refuses
from millstream.ops.attention.protocol import AttentionAsk, Pages
from millstream.ops.cpu import program
from millstream.ops.layout import BatchLayout
from millstream.ops.table import Refusal

CARD = Card(
    name="cpu-int4",
    summary="Native paged attention on the CPU over 4-bit pages, the same bits for every batch and chunking.",
    lossless=False,
    error="queries and softmax weights are rounded to 16 bits: 2e-4 of the largest value",
)

LAYOUT = "int4-blocks"
# The sum of a query's 16-bit values has to be exact in float32.
MAX_HEAD_DIM = 512


class CpuInt4:
    """Ragged rows, causal, grouped queries, sliding window, softcap."""

    preference = 10
    in_program = True

    def accepts(self, ask: AttentionAsk) -> Refusal | None:
        refusal = refuses(ask, LAYOUT)
        if refusal is not None:
            return refusal
        if ask.head_dim > MAX_HEAD_DIM:
            return Refusal(f"heads of {ask.head_dim}, the kernel takes up to {MAX_HEAD_DIM}")
        return program.refusal()

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
        k, v = pages.addresses(layer)
        kernel = program.library().millstream_attention4
        return attend(kernel, q, pages, k, v, pages.num_blocks, state, scale, window, softcap)


PLUGIN = CpuInt4
