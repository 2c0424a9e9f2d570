from __future__ import annotations

import torch

from millstream.ops.cases import Case, Table, call, normal
from millstream.ops.ref.ragged import ragged_attention

BF16 = torch.bfloat16


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    of = torch.repeat_interleave(torch.arange(len(query_start) - 1), query_start.diff())
    scores = torch.einsum("thd,uhd->htu", q.double(), k.double()) * scale
    weights = torch.softmax(scores.masked_fill(of[:, None] != of[None, :], -torch.inf), -1)
    return (torch.einsum("htu,uhd->thd", weights, v.double()),)


def texts(*lengths: int, heads: int = 12, dim: int = 32, scale: float = 1.0, dtype: torch.dtype = torch.float32):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    size = (sum(lengths), heads, dim)
    parts = [normal(*size, dtype=dtype, scale=scale) for _ in range(3)]
    return call(*parts, lambda _: starts, dim**-0.5)


TABLES = (
    Table(
        ragged_attention,
        (
            Case("one token", texts(1), 1e-6),
            Case("one text", texts(37), 2e-6, 1e-6),
            Case("of many lengths", texts(5, 1, 17, 128, 3, 64), 2e-6, 1e-6),
            Case("some of equal length", texts(9, 4, 9, 9, 4, 1), 2e-6, 1e-6),
            Case("nothing", texts(), 0.0),
            Case("wide heads", texts(20, 33, heads=4, dim=128), 2e-6, 1e-6),
            Case("odd heads", texts(20, 7, heads=3, dim=20), 2e-6, 1e-6),
            Case("large scores", texts(40, 12, scale=8.0), 1e-3, 1e-4),
            Case("long", texts(512), 2e-6, 1e-6),
            Case("bfloat16", texts(20, 7, dtype=BF16), 2e-2, 1e-2),
        ),
        exact,
    ),
)
