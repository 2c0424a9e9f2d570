from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.blocks import RUN, linear_blocks, pack_stream, unpack_stream


def exact(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Run after run in float64, on whole numbers rounded as the op says."""
    codes, d, m = (t.double() for t in unpack_stream(stream, outputs, x.shape[1], bits))
    y = torch.zeros(x.shape[0], outputs, dtype=torch.float64)
    for g in range(codes.shape[1]):
        run = x[:, g * RUN : (g + 1) * RUN]
        most = run.abs().amax(-1, keepdim=True) if run.numel() else run.new_zeros(run.shape[0], 1)
        q = torch.round(run * torch.where(most > 0, 127.0 / most, 0.0)).double()
        u = codes[:, g, : run.shape[1]]
        y += (most.double() / 127.0) * (q @ u.T * d[:, g] + q.sum(-1, keepdim=True) * m[:, g])
    return (y if bias is None else y + bias.double(),)


def made(
    rows: int, outputs: int, inputs: int, bits: int, bias: bool = False, width: int = 0, zeros: bool = False
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Random codes. `width` takes the inputs out of wider rows; `zeros` makes some runs of them nothing but zeros."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        runs = -(-inputs // RUN)
        codes = torch.randint(0, 1 << bits, (outputs, runs, RUN), generator=generator).to(torch.uint8)
        d = torch.randn(outputs, runs, generator=generator) * 0.01
        m = torch.randn(outputs, runs, generator=generator) * 0.05
        x = torch.randn(rows, max(width, inputs), generator=generator)[:, :inputs]
        if zeros:
            x = x.clone()
            x[:, : RUN + 3] = 0.0
        stream = pack_stream(codes, d, m, bits)
        return (x, stream, outputs, bits, *((torch.randn(outputs, generator=generator),) if bias else ()))

    return make


TABLES = (
    Table(
        linear_blocks,
        (
            Case("one token", made(1, 192, 576, 4), 2e-4),
            Case("one token, 8 bits", made(1, 192, 576, 8), 2e-3),
            Case("no token", made(0, 64, 64, 4), 0.0),
            Case("odd sizes with bias", made(5, 11, 37, 4, bias=True), 1e-4),
            Case("odd sizes, 8 bits", made(5, 45, 70, 8, bias=True), 5e-4),
            Case("fewer inputs than a run", made(3, 2, 3, 8), 5e-4),
            Case("more rows than a tile", made(29, 70, 320, 4), 2e-4),
            Case("more rows than a block", made(200, 33, 64, 8), 1e-3),
            Case("rows out of a wider matrix", made(7, 40, 96, 4, width=130), 2e-4),
            Case("runs of zeros", made(4, 40, 96, 4, zeros=True), 2e-4),
            Case("many runs", made(3, 32, 1536, 4), 5e-4),
        ),
        exact,
    ),
)
