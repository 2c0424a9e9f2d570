from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.rope import apply_rope, rope_frequencies, rope_table


def exact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    half = cos.shape[1]
    # As complex numbers: dimension d is the real part and d + half the imaginary part.
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return (torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1),)


def rotated(
    tokens: int, heads: int, dim: int, part: int | None = None, start: int = 0, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        frequencies, factor = rope_frequencies(part or dim, 10000.0)
        cos, sin = rope_table(frequencies, factor, torch.arange(start, start + tokens))
        return torch.randn(tokens, heads, dim, generator=generator).to(dtype), cos, sin

    return make


TABLES = (
    Table(
        apply_rope,
        (
            Case("one token", rotated(1, 9, 64), 1e-6),
            Case("no token", rotated(0, 9, 64), 0.0),
            Case("far position", rotated(3, 3, 64, start=100_000), 1e-6),
            Case("partial", rotated(5, 2, 80, 32), 1e-6),
            Case("wide head", rotated(17, 4, 256), 2e-6),
            Case("bfloat16", rotated(4, 2, 64, dtype=torch.bfloat16), 4e-2),
        ),
        exact,
    ),
)
