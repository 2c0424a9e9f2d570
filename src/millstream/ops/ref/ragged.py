"""Attention that looks both ways over texts laid end to end, without padding.

Shapes: T tokens, S texts, H heads, D head dimension.
"""

from __future__ import annotations

import itertools

import torch

from millstream.ops.table import op


@op
def ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start: torch.Tensor, scale: float
) -> torch.Tensor:
    """q, k, v (T, H, D) -> (T, H, D): text s has the tokens [query_start[s], query_start[s + 1]) and sees itself alone.

    `query_start` (S + 1,) integer begins with 0 and ends with T. Computed in float32; returns q's dtype.
    """
    out = torch.empty_like(q)
    bounds = query_start.tolist()
    for first, last in itertools.pairwise(bounds):
        own = [part[first:last].float().transpose(0, 1) for part in (q, k, v)]
        scores = torch.softmax(own[0] @ own[1].transpose(1, 2) * scale, dim=-1)
        out[first:last] = (scores @ own[2]).transpose(0, 1).to(q.dtype)
    return out
