"""The first thing that happens to a token: its row of a matrix."""

from __future__ import annotations

import torch

from millstream.formats.weights.protocol import Packed, WeightFormat
from millstream.models.blocks.linear import of_shape, weight_format
from millstream.models.spec import ModelSpec


class Embedding:
    """tokens (T,) -> (T, C), times the model's scale, which is rounded to the weights' dtype first."""

    __slots__ = ("_scale", "format", "packed", "scale")

    def __init__(self, spec: ModelSpec, packed: Packed, held: WeightFormat, dtype: torch.dtype) -> None:
        self.packed, self.format = packed, held
        scale = 1.0 if spec.embed_scale is None else spec.embed_scale
        self._scale = None if scale == 1.0 else torch.tensor(scale, dtype=dtype)
        self.scale = 1.0 if self._scale is None else float(self._scale)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.format.rows(self.packed, tokens)
        return rows if self._scale is None else rows * self._scale


def embedding(spec: ModelSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Embedding:
    """The embedding out of the model's tensors, in the format that the spec asks for."""
    held = weight_format(spec.embed_format)
    packed = of_shape(held.load(tensors, "embed"), (spec.vocab_size, spec.width), "embed")
    return Embedding(spec, packed, held, dtype)
