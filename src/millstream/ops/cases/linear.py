from __future__ import annotations

from collections.abc import Callable

import torch

from millstream.ops.cases import Case, Table, call, normal
from millstream.ops.ref.linear import embedding, linear, log_softmax, softcap


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double(),)


def exact_embedding(tokens: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    rounded = float(torch.tensor(scale, dtype=weight.dtype))
    return (torch.stack([weight[t].double() * rounded for t in tokens.tolist()]),)


def exact_log_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = logits.double()
    top = wide.amax(-1, keepdim=True)
    return (wide - top - (wide - top).exp().sum(-1, keepdim=True).log(),)


def exact_softcap(x: torch.Tensor, cap: float) -> tuple[torch.Tensor, ...]:
    grown = (2 * x.double() / cap).exp()
    return (cap * (grown - 1) / (grown + 1),)


def tokens(count: int, vocabulary: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda generator: torch.randint(0, vocabulary, (count,), generator=generator)


def part_of(whole: Callable[[torch.Generator], torch.Tensor], width: int) -> Callable[[torch.Generator], torch.Tensor]:
    """The last columns of a wider matrix: rows that do not follow each other in memory."""
    return lambda generator: whole(generator)[:, -width:]


TABLES = (
    Table(
        linear,
        (
            Case("one token", call(normal(1, 576), normal(192, 576)), 2e-4),
            Case("no token", call(normal(0, 576), normal(192, 576)), 0.0),
            Case("odd sizes with bias", call(normal(5, 37), normal(11, 37), normal(11)), 5e-5),
            Case("fewer inputs than lanes", call(normal(3, 3), normal(2, 3)), 1e-5),
            Case("tiles of unequal height", call(normal(13, 100), normal(50, 100), normal(50)), 1e-4),
            Case("rows out of a wider matrix", call(part_of(normal(5, 90), 37), normal(6, 37)), 1e-4),
            Case("big", call(normal(64, 576), normal(1536, 576)), 2e-4),
            Case("bfloat16", call(normal(3, 64, dtype=torch.bfloat16), normal(8, 64, dtype=torch.bfloat16)), 0.1, 8e-3),
        ),
        exact_linear,
    ),
    Table(
        embedding,
        (
            Case("plain", call(tokens(9, 50), normal(50, 24)), 0.0),
            Case("gemma", call(tokens(4, 50), normal(50, 640), 640**0.5), 0.0, 1e-7),
            Case("gemma bfloat16", call(tokens(4, 50), normal(50, 640, dtype=torch.bfloat16), 640**0.5), 0.0, 4e-3),
        ),
        exact_embedding,
    ),
    Table(
        log_softmax,
        (
            Case("one row", call(normal(1, 49152, scale=4.0)), 1e-5),
            Case("gemma vocabulary", call(normal(2, 262144, scale=8.0)), 2e-5),
            Case("far apart", call(normal(3, 11, scale=1e4)), 1e-3, 1e-6),
            Case("no row", call(normal(0, 100)), 0.0),
            Case("bfloat16", call(normal(2, 500, dtype=torch.bfloat16)), 1e-5),
        ),
        exact_log_softmax,
    ),
    Table(
        softcap,
        (
            Case("small", call(normal(3, 100), 30.0), 1e-6, 1e-6),
            Case("saturated", call(normal(3, 100, scale=300.0), 50.0), 2e-5),
        ),
        exact_softcap,
    ),
)
