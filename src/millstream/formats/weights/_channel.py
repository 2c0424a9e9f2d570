"""What the formats with one scale an output and 8-bit activations share. `ops/ref/channel.py` has the layout.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from millstream.core.errors import BadFile, ConfigError
from millstream.formats.weights.protocol import Packed
from millstream.ops.cpu import channel as _native  # noqa: F401 - registers the native product
from millstream.ops.cpu import program
from millstream.ops.ref.channel import (
    MAX_INPUTS,
    PAIR,
    RUN,
    fits,
    groups_of,
    linear_channel,
    pack_stream,
    quantize_rows,
    rows_of,
    unpack_stream,
    weights_of,
)
from millstream.ops.table import Ask


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix in whole numbers: codes (O, I) uint8, scale (O,), and zero (O,), or step and z (O, G), or neither."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    second: tuple[torch.Tensor, torch.Tensor] | None = None


class Channel:
    """Parts: `stream` uint8 (pairs of panels, bytes of a pair) and, where there is one, `bias` (O,)."""

    name: ClassVar[str]
    bits: ClassVar[int]

    def __init__(self) -> None:
        self._linear = linear_channel.resolve(Ask("cpu", torch.float32))

    def encode(self, weight: torch.Tensor, calibration: Any = None) -> Codes:
        """weight (O, I) float32 in whole numbers."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, calibration: Any = None) -> Packed:
        if weight.shape[1] > MAX_INPUTS:
            raise ConfigError(f"{self.name} takes matrices of up to {MAX_INPUTS} inputs, not {weight.shape[1]}")
        return self._packed(self.encode(weight.float(), calibration), (weight.shape[0], weight.shape[1]), bias)

    def _packed(self, found: Codes, shape: tuple[int, int], bias: torch.Tensor | None) -> Packed:
        stream = pack_stream(found.codes, found.scale, self.bits, found.zero, found.second)
        parts = {"stream": stream} if bias is None else {"stream": stream, "bias": bias}
        return Packed(self.name, shape, parts)

    def load(self, tensors: Mapping[str, torch.Tensor], name: str, bias: bool = False) -> Packed:
        stream, shape = tensors[f"{name}.stream"], tensors[f"{name}.shape"].tolist()
        parts = {"stream": stream, "bias": tensors[f"{name}.bias"]} if bias else {"stream": stream}
        if len(shape) != 2 or min(shape) < 1 or not fits(stream, shape[0], shape[1], self.bits):
            raise BadFile(
                name, f"a stream of {list(stream.shape)} {stream.dtype} is not a {self.name} matrix of {shape}"
            )
        if bias and parts["bias"].shape != (shape[0],):
            raise BadFile(name, f"a bias of {list(parts['bias'].shape)} for {shape[0]} outputs")
        return Packed(self.name, (shape[0], shape[1]), parts)

    def shard(self, packed: Packed, side: str, rank: int, num_ranks: int) -> Packed:
        if side not in ("column", "row"):
            raise ConfigError(f"a matrix is sharded by 'column' or by 'row', not by {side!r}")
        length = packed.shape[0 if side == "column" else 1]
        unit = 1 if side == "column" else RUN
        if num_ranks < 1 or length % (num_ranks * unit) or not 0 <= rank < num_ranks:
            raise ConfigError(
                f"rank {rank} of {num_ranks} cannot take its part of {length} {side}s (multiples of {unit})"
            )
        found = unpack_stream(packed["stream"], *packed.shape, self.bits)
        codes, scale, zero = found["codes"], found["scale"], found.get("zero")
        second = (found["step"], found["z"]) if "step" in found else None
        bias = packed.parts.get("bias")
        each = length // num_ranks
        part = slice(rank * each, (rank + 1) * each)
        if side == "column":
            if second is not None:
                second = (second[0][part], second[1][part])
            shape = (each, packed.shape[1])
            made = Codes(codes[part], scale[part], None if zero is None else zero[part], second)
            return self._packed(made, shape, None if bias is None else bias[part])
        if second is not None:
            # The groups of a part: as they were where they divide it, else in as many pieces as do.
            group = -(-packed.shape[1] // RUN) // second[0].shape[1] * RUN
            piece = math.gcd(group, each)
            chosen = torch.arange(part.start, part.stop, piece) // group
            second = (second[0][:, chosen], second[1][:, chosen])
        if bias is not None and rank > 0:
            bias = torch.zeros_like(bias)
        return self._packed(Codes(codes[:, part], scale, zero, second), (packed.shape[0], each), bias)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return weights_of(packed["stream"], *packed.shape, self.bits)

    def rows(self, packed: Packed, which: torch.Tensor) -> torch.Tensor:
        return rows_of(packed["stream"], which, *packed.shape, self.bits)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        q, s = quantize_rows(x.float())
        return q * s[:, None]

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        parts = packed.parts
        return self._linear(x, parts["stream"], packed.shape[0], self.bits, parts.get("bias"))

    def native(self, packed: Packed, first: int = 0, last: int | None = None) -> program.Matrix:
        last = packed.shape[0] if last is None else last
        stream, bias = packed["stream"][first // PAIR :], packed.parts.get("bias")
        groups = groups_of(stream, packed.shape[1], self.bits) or 0
        part = None if bias is None else bias[first:]
        return program.matrix(stream, last - first, packed.shape[1], self.bits, part, program.CHANNEL, groups)
