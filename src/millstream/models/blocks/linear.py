"""A matrix of the model, bound to its weights and their format."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from millstream.core import registry
from millstream.formats.weights.protocol import Packed, WeightFormat
from millstream.models.spec import LinearSpec


class Linear:
    """x (T, in) -> (T, out), new memory."""

    __slots__ = ("_linear", "format", "packed", "spec")

    def __init__(self, spec: LinearSpec, packed: Packed, held: WeightFormat) -> None:
        self.spec, self.packed, self.format = spec, packed, held
        self._linear = held.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self.packed)


def linear(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], name: str) -> Linear:
    """The matrix `name` out of the model's tensors, in the format that its spec asks for."""
    found = weight_format(spec.format)
    return Linear(spec, found.load(tensors, name, spec.bias), found)


# A model has hundreds of matrices; finding a plug-in looks at the disk.
@functools.cache
def weight_format(name: str) -> WeightFormat:
    """The format of that name; one serves all matrices."""
    found: WeightFormat = registry.make("weights", name, device=True)
    return found
