from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.channel import RUN, linear_channel, pack_stream, unpack_stream


def exact(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Group after group in whole numbers, zeros taken off before the product; rounded as the op says."""
    found = unpack_stream(stream, outputs, x.shape[1], bits)
    codes = found["codes"].to(torch.int64)
    if "step" in found:
        step, z = found["step"].to(torch.int64), found["z"].to(torch.int64)
        each = -(-x.shape[1] // RUN) // step.shape[1] * RUN
        whole = torch.stack([(codes[:, i] - z[:, i // each]) * step[:, i // each] for i in range(codes.shape[1])], 1)
    else:
        whole = codes - (found["zero"].to(torch.int64)[:, None] if "zero" in found else 128)
    most = x.abs().amax(-1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1)
    q = torch.round(x * torch.where(most > 0, 127.0 / most, 0.0)).to(torch.int64)
    dot = torch.zeros(x.shape[0], outputs, dtype=torch.int64)
    for i in range(codes.shape[1]):
        dot += q[:, i : i + 1] * whole[:, i]
    y = dot.double() * found["scale"].double() * (most.double() / 127.0)
    return (y if bias is None else y + bias.double(),)


def made(
    rows: int,
    outputs: int,
    inputs: int,
    bits: int,
    groups: int = 0,
    bias: bool = False,
    width: int = 0,
    zeros: bool = False,
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Random codes. `width` takes the inputs out of wider rows; `zeros` makes one row nothing but zeros."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        low = 1 if bits == 8 else 0
        codes = torch.randint(low, 1 << bits, (outputs, inputs), generator=generator).to(torch.uint8)
        scale = torch.rand(outputs, generator=generator) * 0.01
        second = zero = None
        if groups:
            # Whatever the codes: (code - z) * step stays within a byte.
            step = torch.randint(0, 9, (outputs, groups), generator=generator)
            second = (step, torch.randint(0, 16, (outputs, groups), generator=generator))
        elif bits == 4:
            zero = torch.randint(0, 16, (outputs,), generator=generator)
        x = torch.randn(rows, max(width, inputs), generator=generator)[:, :inputs]
        if zeros:
            x = x.clone()
            x[0] = 0.0
        stream = pack_stream(codes, scale, bits, zero, second)
        return (x, stream, outputs, bits, *((torch.randn(outputs, generator=generator),) if bias else ()))

    return make


TABLES = (
    Table(
        linear_channel,
        (
            Case("one token", made(1, 192, 576, 4, 9), 1e-4, 1e-6),
            Case("one token, 8 bits", made(1, 192, 576, 8), 1e-3, 1e-6),
            Case("one token, by channel", made(1, 192, 576, 4), 1e-4, 1e-6),
            Case("no token", made(0, 64, 64, 4, 1), 0.0),
            Case("odd sizes with bias", made(5, 11, 37, 4, bias=True), 1e-5, 1e-6),
            Case("odd sizes, one group", made(5, 45, 70, 4, 1, bias=True), 1e-4, 1e-6),
            Case("odd sizes, 8 bits", made(5, 45, 70, 8, bias=True), 1e-4, 1e-6),
            Case("fewer inputs than a run", made(3, 2, 3, 8), 1e-4, 1e-6),
            Case("groups of one run", made(4, 33, 96, 4, 3), 1e-4, 1e-6),
            Case("groups across slabs", made(13, 64, 1536, 4, 12), 1e-3, 1e-6),
            Case("more rows than a tile", made(29, 70, 320, 4, 5), 1e-4, 1e-6),
            Case("more rows than a block", made(200, 33, 64, 8), 1e-3, 1e-6),
            Case("rows out of a wider matrix", made(7, 40, 96, 4, 3, width=130), 1e-4, 1e-6),
            Case("a row of zeros", made(4, 40, 96, 4, 3, zeros=True), 1e-4, 1e-6),
            Case("many inputs", made(3, 32, 4160, 8), 5e-3, 1e-6),
        ),
        exact,
    ),
)
