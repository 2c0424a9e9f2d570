"""Weights as they are, in one float dtype: the format that every other one is measured against."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from millstream.core.errors import ConfigError
from millstream.core.registry import Card
from millstream.formats.weights.protocol import Packed
from millstream.ops.cpu import linear as _native  # noqa: F401 - registers the native product
from millstream.ops.ref.linear import embedding, linear
from millstream.ops.table import Ask

CARD = Card("dense", "Weights as they are: float32, bfloat16 or float16.")


class Dense:
    """Parts: `weight` (O, I) and, where there is one, `bias` (O,)."""

    name = "dense"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, calibration: Any = None) -> Packed:
        parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return Packed(self.name, (weight.shape[0], weight.shape[1]), parts)

    def load(self, tensors: Mapping[str, torch.Tensor], name: str, bias: bool = False) -> Packed:
        return self.pack(tensors[f"{name}.weight"], tensors[f"{name}.bias"] if bias else None)

    def shard(self, packed: Packed, side: str, rank: int, num_ranks: int) -> Packed:
        if side not in ("column", "row"):
            raise ConfigError(f"a matrix is sharded by 'column' or by 'row', not by {side!r}")
        length = packed.shape[0 if side == "column" else 1]
        if num_ranks < 1 or length % num_ranks or not 0 <= rank < num_ranks:
            raise ConfigError(f"rank {rank} of {num_ranks} cannot take its part of {length} {side}s")
        bias = packed.parts.get("bias")
        run = slice(rank * length // num_ranks, (rank + 1) * length // num_ranks)
        if side == "column":
            return self.pack(packed["weight"][run], None if bias is None else bias[run])
        if bias is not None and rank > 0:
            bias = torch.zeros_like(bias)
        return self.pack(packed["weight"][:, run].contiguous(), bias)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed["weight"]

    def rows(self, packed: Packed, which: torch.Tensor) -> torch.Tensor:
        return embedding(which, packed["weight"])

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        weight = packed.parts["weight"]
        return linear.resolve(_ask(weight.device.type, weight.dtype))(x, weight, packed.parts.get("bias"))


@functools.cache
def _ask(device: str, dtype: torch.dtype) -> Ask:
    return Ask(device, dtype)


PLUGIN = Dense
