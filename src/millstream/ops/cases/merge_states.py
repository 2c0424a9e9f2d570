from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.attention import merge_states


def exact(states: Any) -> tuple[torch.Tensor, ...]:
    lses = torch.stack([lse.double() for _, lse in states])
    outs = torch.stack([out.double() for out, _ in states])
    whole = torch.logsumexp(lses, 0)
    weights = torch.where(torch.isneginf(lses), 0.0, (lses - torch.where(torch.isneginf(whole), 0.0, whole)).exp())
    return (outs * weights[..., None]).sum(0), whole


def parts(count: int, *shape: int, spread: float = 1.0, empty: tuple[int, ...] = ()) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        states = []
        for part in range(count):
            lse = torch.randn(shape[:-1], generator=generator) * spread
            out = torch.randn(shape, generator=generator)
            states.append((out * 0, lse - torch.inf) if part in empty else (out, lse))
        return (states,)

    return make


TABLES = (
    Table(
        merge_states,
        (
            Case("one part", parts(1, 3, 9, 64), 1e-6),
            Case("two parts", parts(2, 3, 9, 64), 2e-6),
            Case("many parts", parts(33, 1, 4, 256), 5e-6),
            Case("far apart", parts(5, 2, 3, 64, spread=300.0), 1e-4),
            Case("an empty part first", parts(3, 2, 3, 64, empty=(0,)), 2e-6),
            Case("nothing seen at all", parts(2, 2, 3, 64, empty=(0, 1)), 0.0),
            Case("no rows", parts(2, 0, 3, 64), 0.0),
        ),
        exact,
    ),
)
