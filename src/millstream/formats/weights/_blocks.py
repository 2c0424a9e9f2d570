"""What the formats of codes with a scale and a minimum for every 32 inputs share. `ops/ref/blocks.py` has the layout.

Shapes: O outputs, I inputs, G runs of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from millstream.core.errors import BadFile, ConfigError
from millstream.formats.weights.protocol import Packed
from millstream.ops.cpu import blocks as _native  # noqa: F401 - registers the native product
from millstream.ops.cpu import program
from millstream.ops.ref.blocks import (
    PANEL,
    RUN,
    WIDE,
    linear_blocks,
    pack_stream,
    quantize,
    rows_of,
    stream_shape,
    unpack_stream,
    weights_of,
)
from millstream.ops.table import Ask

# Below this a scale in half precision has no digits left.
_SMALLEST = 6e-8


class Blocks:
    """Parts: `stream` uint8 (pairs of panels, G, bytes of a run) and, where there is one, `bias` (O,)."""

    name: ClassVar[str]
    bits: ClassVar[int]

    def __init__(self) -> None:
        self._linear = linear_blocks.resolve(Ask("cpu", torch.float32))

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, calibration: Any = None) -> Packed:
        codes, d, m = self.encode(weight.float())
        return self.packed(pack_stream(codes, d, m, self.bits), weight.shape, bias)

    def packed(self, stream: torch.Tensor, shape: tuple[int, ...], bias: torch.Tensor | None = None) -> Packed:
        """A matrix of `shape` (O, I) out of a stream that exists."""
        parts = {"stream": stream} if bias is None else {"stream": stream, "bias": bias}
        return Packed(self.name, (shape[0], shape[1]), parts)

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """weight (O, I) -> codes (O, G, 32) uint8, d and m (O, G), each run by its own smallest and largest value."""
        runs = F.pad(weight, (0, -weight.shape[1] % RUN)).view(weight.shape[0], -1, RUN)
        top = (1 << self.bits) - 1
        if self.bits == 8:
            # Symmetric: the minimum is then as exact in half precision as the scale.
            d = (runs.abs().amax(-1) / 127.0).to(torch.float16).float()
            m = -128.0 * d
        else:
            low = runs.amin(-1)
            d = ((runs.amax(-1) - low) / top).to(torch.float16).float()
            m = low.to(torch.float16).float()
        inverse = torch.where(d > _SMALLEST, 1.0 / d, 0.0)
        codes = torch.round((runs - m[..., None]) * inverse[..., None]).clamp_(0, top)
        return codes.to(torch.uint8), d, m

    def load(self, tensors: Mapping[str, torch.Tensor], name: str, bias: bool = False) -> Packed:
        stream, shape = tensors[f"{name}.stream"], tensors[f"{name}.shape"].tolist()
        if (
            len(shape) != 2
            or stream.dtype != torch.uint8
            or tuple(stream.shape) != stream_shape(shape[0], shape[1], self.bits)
        ):
            raise BadFile(
                name, f"a stream of {list(stream.shape)} {stream.dtype} is not a {self.name} matrix of {shape}"
            )
        return self.packed(stream, (shape[0], shape[1]), tensors[f"{name}.bias"] if bias else None)

    def shard(self, packed: Packed, side: str, rank: int, num_ranks: int) -> Packed:
        if side not in ("column", "row"):
            raise ConfigError(f"a matrix is sharded by 'column' or by 'row', not by {side!r}")
        length = packed.shape[0 if side == "column" else 1]
        unit = 1 if side == "column" else RUN
        if num_ranks < 1 or length % (num_ranks * unit) or not 0 <= rank < num_ranks:
            raise ConfigError(
                f"rank {rank} of {num_ranks} cannot take its part of {length} {side}s (multiples of {unit})"
            )
        codes, d, m = unpack_stream(packed["stream"], *packed.shape, self.bits)
        bias = packed.parts.get("bias")
        each = length // num_ranks // unit
        run = slice(rank * each, (rank + 1) * each)
        if side == "column":
            stream = pack_stream(codes[run], d[run], m[run], self.bits)
            return self.packed(stream, (each, packed.shape[1]), None if bias is None else bias[run])
        if bias is not None and rank > 0:
            bias = torch.zeros_like(bias)
        stream = pack_stream(codes[:, run].contiguous(), d[:, run], m[:, run], self.bits)
        return self.packed(stream, (packed.shape[0], each * RUN), bias)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return weights_of(packed["stream"], *packed.shape, self.bits)

    def rows(self, packed: Packed, which: torch.Tensor) -> torch.Tensor:
        return rows_of(packed["stream"], which, *packed.shape, self.bits)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        q, s = quantize(x.float())
        return (q * s[..., None]).flatten(1)[:, : x.shape[1]]

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        parts = packed.parts
        return self._linear(x, parts["stream"], packed.shape[0], self.bits, parts.get("bias"))

    def native(self, packed: Packed, first: int = 0, last: int | None = None) -> program.Matrix:
        last = packed.shape[0] if last is None else last
        stream, bias = packed["stream"][first // (WIDE * PANEL) :], packed.parts.get("bias")
        return program.matrix(stream, last - first, packed.shape[1], self.bits, None if bias is None else bias[first:])
