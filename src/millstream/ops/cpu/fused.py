"""Torch's own one-call forms of what an encoder is made of besides products, in the place of native kernels.

In float32 only: in other dtypes they round at other places than the reference.

Shapes: T tokens, S texts, H heads, D head dimension.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from millstream.ops.ref.mlp import activate
from millstream.ops.ref.norm import layer_norm
from millstream.ops.ref.ragged import ragged_attention
from millstream.ops.table import Ask, Refusal

# Queries of a block, of which longer texts have several; and the numbers of a cache line.
_BLOCK, _LINE = 32, 16


def _float32(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    return None if ask.dtype == torch.float32 else Refusal(f"tensors of {ask.dtype}")


@layer_norm.implement("cpu", accepts=_float32)
def layer_norm_fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The op `layer_norm` in float32."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@ragged_attention.implement("cpu", accepts=_float32)
def ragged_attention_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start: torch.Tensor, scale: float
) -> torch.Tensor:
    """The op `ragged_attention` in float32: texts of equal length in one call, each with the bits that it has alone."""
    out = torch.empty_like(q)
    bounds = query_start.tolist()
    by_length: dict[int, list[int]] = {}
    for first, last in itertools.pairwise(bounds):
        by_length.setdefault(last - first, []).append(first)
    for length, firsts in by_length.items():
        if length == 0:
            continue
        rows = (torch.tensor(firsts)[:, None] + torch.arange(length)).reshape(-1)
        own = [part[rows].view(len(firsts), length, *q.shape[1:]).transpose(1, 2) for part in (q, k, v)]
        if length < _BLOCK:
            # Torch gives each thread a part of one buffer, as long as the queries ask for. A part that begins within a
            # cache line is multiplied in another order, so that bits would depend on which thread had the text.
            own[0] = F.pad(own[0], (0, 0, 0, -length % _LINE))
        seen = F.scaled_dot_product_attention(*own, scale=scale)[:, :, :length]
        out[rows] = seen.transpose(1, 2).reshape(len(rows), *q.shape[1:])
    return out


@activate.implement("cpu", accepts=_float32)
def activate_fused(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The op `activate` in float32, each row with the bits that it has alone.

    But for the exact gelu torch has two forms, of which the one for what is left over at the end of a thread's part
    rounds otherwise: there, row by row, every number keeps its place.
    """
    if kind == "gelu":
        return F.gelu(x)
    one = F.silu if kind == "silu" else partial(F.gelu, approximate="tanh")
    return torch.stack([one(row) for row in x]) if len(x) else x
