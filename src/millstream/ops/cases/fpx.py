from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.fpx import embedding_fpx, linear_fpx, pack_codes, unpack_codes


def decoded(code: int, exponent: int, mantissa: int) -> float:
    """One code, bit by bit."""
    e, m = (code >> mantissa) % (1 << exponent), code % (1 << mantissa)
    bias = 2 ** (exponent - 1) - 1
    size = (1 + m / 2**mantissa) * 2.0 ** (e - bias) if e else m / 2**mantissa * 2.0 ** (1 - bias)
    return -size if code >> (exponent + mantissa) else size


def matrix(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, inputs: int, exponent: int, mantissa: int
) -> torch.Tensor:
    values = torch.tensor([decoded(code, exponent, mantissa) for code in range(1 << (1 + exponent + mantissa))])
    return values.double()[unpack_codes(low, high, scale.shape[0], inputs).int()] * scale.double()[:, None]


def exact_linear(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    exponent: int,
    mantissa: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    y = x.double() @ matrix(low, high, scale, x.shape[1], exponent, mantissa).T
    return (y if bias is None else y + bias.double(),)


def exact_rows(which: torch.Tensor, *of: Any) -> tuple[torch.Tensor, ...]:
    return (matrix(*of)[which],)


def coded(outputs: int, inputs: int, bits: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """low, high and scale of random codes; where there is room each code is there."""
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator).to(torch.uint8)
    codes.view(-1)[: 1 << bits] = torch.arange(1 << bits)[: codes.numel()].to(torch.uint8)
    scale = (torch.rand(outputs, generator=generator) * 0.02 + 0.001).half()
    return (*pack_codes(codes, bits), scale)


def product(
    rows: int, outputs: int, inputs: int, exponent: int, mantissa: int, bias: bool = False, wide: float = 0.0
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Random codes. `wide` makes a few inputs that many times larger, and takes x out of a wider matrix."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(rows, inputs + (9 if wide else 0), generator=generator)[:, :inputs]
        if wide:
            x[:, ::17] *= wide
        of = coded(outputs, inputs, 1 + exponent + mantissa, generator)
        return (x, *of, exponent, mantissa, *((torch.randn(outputs, generator=generator),) if bias else ()))

    return make


def looked_up(rows: int, outputs: int, inputs: int, exponent: int, mantissa: int) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        which = torch.randint(0, outputs, (rows,), generator=generator)
        return (which, *coded(outputs, inputs, 1 + exponent + mantissa, generator), inputs, exponent, mantissa)

    return make


TABLES = (
    Table(
        linear_fpx,
        (
            Case("one row, e3m2", product(1, 192, 576, 3, 2), 2e-4),
            Case("one row, e2m3", product(1, 192, 576, 2, 3), 5e-5),
            Case("one row, e2m2", product(1, 192, 576, 2, 2), 5e-5),
            Case("no row", product(0, 64, 64, 3, 2), 0.0),
            Case("odd sizes with bias", product(5, 11, 37, 3, 2, bias=True), 1e-4),
            Case("odd sizes, e2m2", product(3, 45, 130, 2, 2, bias=True), 5e-5),
            Case("fewer inputs than a run", product(3, 2, 3, 2, 3), 1e-5),
            Case("more rows than a tile", product(29, 70, 320, 3, 2), 2e-4),
            Case("more rows than a block", product(200, 33, 64, 2, 3), 5e-5),
            Case("inputs of very different size", product(4, 64, 192, 3, 2, wide=3000.0), 0.2),
            Case("many runs", product(2, 32, 1536, 3, 2), 5e-4),
        ),
        exact_linear,
    ),
    Table(
        embedding_fpx,
        (
            Case("some rows", looked_up(9, 70, 96, 3, 2), 1e-6),
            Case("no row", looked_up(0, 33, 64, 2, 3), 0.0),
            Case("odd sizes, e2m2", looked_up(40, 37, 131, 2, 2), 1e-6),
        ),
        exact_rows,
    ),
)
