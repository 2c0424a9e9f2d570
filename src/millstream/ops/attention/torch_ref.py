"""Paged attention in plain torch: the specification, and what runs where nothing faster accepts.

It gathers a row's keys and values out of the pages (and counts the bytes), then walks them in tiles of `TILE` keys at
fixed positions, merging states in order, so that chunking and batching change results by float rounding only.

Shapes: n new tokens of a row, K kv heads, G query heads per kv head, D head dimension.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from millstream.core.registry import Card
from millstream.ops.attention.protocol import AttentionAsk, Pages
from millstream.ops.layout import BatchLayout
from millstream.ops.ref.attention import merge_states
from millstream.ops.table import Refusal

CARD = Card(name="torch-ref", summary="Paged attention in plain torch over gathered keys and values.")

TILE = 64


class TorchRef:
    """Ragged rows, causal, grouped queries, sliding window, softcap, any page layout."""

    preference = 0
    in_program = False

    def accepts(self, ask: AttentionAsk) -> Refusal | None:
        if ask.tree:
            return Refusal("token trees are not built yet")
        return None

    def prepare(self, layout: BatchLayout, buffers: MutableMapping[str, torch.Tensor] | None = None) -> BatchLayout:
        return layout

    def run(
        self,
        q: torch.Tensor,
        pages: Pages,
        layer: int,
        state: BatchLayout,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        tables = state.groups[pages.group.name].block_tables
        starts, lengths = state.query_start.tolist(), state.seq_lens.tolist()
        for row, length in enumerate(lengths):
            first, last = starts[row], starts[row + 1]
            if first == last:
                continue
            out[first:last], lse[first:last] = attend_row(
                q[first:last], pages, layer, tables[row], length, scale, window, softcap
            )
        return out, lse


def attend_row(
    q: torch.Tensor,
    pages: Pages,
    layer: int,
    blocks: torch.Tensor,
    length: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (n, H, D) at the last n of `length` positions, over one row's blocks -> out (n, H, D), lse (n, H)."""
    n, heads, dim = q.shape
    kv_heads = pages.group.kv_heads
    queries = torch.arange(length - n, length, device=q.device)
    begin = 0 if window is None else max(0, length - n - window + 1) // TILE * TILE
    seen = 0 if window is None else max(0, length - n - window + 1)
    # (K, G * n, D): one matrix product per kv head serves its whole group of query heads.
    grouped = q.float().view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    at = queries.repeat(heads // kv_heads)
    whole: tuple[torch.Tensor, torch.Tensor] | None = None
    for tile in range(begin, length, TILE):
        keys = torch.arange(max(tile, seen), min(tile + TILE, length), device=q.device)
        slots = blocks[keys // pages.block_size].long() * pages.block_size + keys % pages.block_size
        k, v = pages.read(layer, slots)
        pages.copied.gather_bytes += k.nbytes + v.nbytes
        scores = grouped @ k.float().permute(1, 2, 0) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = keys > at[:, None]
        if window is not None:
            hidden |= keys <= at[:, None] - window
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
        part = (weights @ v.float().transpose(0, 1), lse)
        whole = part if whole is None else merge_states.reference([whole, part])
    assert whole is not None
    out = whole[0].view(kv_heads, -1, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)
    return out.to(q.dtype), whole[1].view(heads, n).T.contiguous()


PLUGIN = TorchRef
