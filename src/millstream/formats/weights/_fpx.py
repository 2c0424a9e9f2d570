"""What the formats of small floats share: codes of 1 + E + M bits in two regions, a float16 scale for each output.

`ops/ref/fpx.py` has the layout. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from millstream.core.errors import ConfigError
from millstream.formats.weights.protocol import Packed
from millstream.ops.cpu import fpx as _native  # noqa: F401 - registers the native product
from millstream.ops.ref.fpx import embedding_fpx, encode, linear_fpx, pack_codes, unpack_codes, weights_of
from millstream.ops.table import Ask


class Fpx:
    """Parts: `low` and `high` uint8, the four low bits of each code and what is above them; `scale` (O,) float16; and,
    where there is one, `bias` (O,). Rounded to nearest, each output by its own largest value.

    Outputs are padded to 32 and inputs to 64: ceil(bits * O * I / 8) bytes of codes where both divide.
    """

    name: ClassVar[str]
    exponent: ClassVar[int]
    mantissa: ClassVar[int]

    def __init__(self) -> None:
        self._linear = linear_fpx.resolve(Ask("cpu", torch.float32))
        self._rows = embedding_fpx.resolve(Ask("cpu", torch.int64))

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, calibration: Any = None) -> Packed:
        codes, scale = encode(weight, self.exponent, self.mantissa)
        return self._packed(codes, scale, bias)

    def load(self, tensors: Mapping[str, torch.Tensor], name: str, bias: bool = False) -> Packed:
        shape = tensors[f"{name}.shape"].tolist()
        parts = {part: tensors[f"{name}.{part}"] for part in ("low", "high", "scale")}
        if bias:
            parts["bias"] = tensors[f"{name}.bias"]
        return Packed(self.name, (shape[0], shape[1]), parts)

    def shard(self, packed: Packed, side: str, rank: int, num_ranks: int) -> Packed:
        if side not in ("column", "row"):
            raise ConfigError(f"a matrix is sharded by 'column' or by 'row', not by {side!r}")
        length = packed.shape[0 if side == "column" else 1]
        if num_ranks < 1 or length % num_ranks or not 0 <= rank < num_ranks:
            raise ConfigError(f"rank {rank} of {num_ranks} cannot take its part of {length} {side}s")
        codes = unpack_codes(packed["low"], packed["high"], *packed.shape)
        bias = packed.parts.get("bias")
        run = slice(rank * length // num_ranks, (rank + 1) * length // num_ranks)
        if side == "column":
            return self._packed(codes[run], packed["scale"][run].contiguous(), None if bias is None else bias[run])
        if bias is not None and rank > 0:
            bias = torch.zeros_like(bias)
        return self._packed(codes[:, run], packed["scale"], bias)

    def unpack(self, packed: Packed) -> torch.Tensor:
        parts = packed.parts
        return weights_of(
            parts["low"], parts["high"], parts["scale"], packed.shape[1], self.exponent, self.mantissa
        )  # fmt: skip

    def rows(self, packed: Packed, which: torch.Tensor) -> torch.Tensor:
        parts = packed.parts
        inputs = packed.shape[1]
        return self._rows(which, parts["low"], parts["high"], parts["scale"], inputs, self.exponent, self.mantissa)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        parts = packed.parts
        return self._linear(
            x, parts["low"], parts["high"], parts["scale"], self.exponent, self.mantissa, parts.get("bias")
        )

    def _packed(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        low, high = pack_codes(codes, 1 + self.exponent + self.mantissa)
        parts = {"low": low, "high": high, "scale": scale}
        if bias is not None:
            parts["bias"] = bias
        return Packed(self.name, (codes.shape[0], codes.shape[1]), parts)
