"""A matrix of the model, bound to its weights and their format."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from millstream.core import registry
from millstream.core.errors import BadFile
from millstream.formats.weights.protocol import Packed, WeightFormat
from millstream.models.spec import LinearSpec
from millstream.ops import table


class Linear:
    """x (T, in) -> (T, out), new memory."""

    __slots__ = ("_linear", "format", "packed", "spec")

    def __init__(self, spec: LinearSpec, packed: Packed, held: WeightFormat) -> None:
        self.spec, self.packed, self.format = spec, packed, held
        self._linear = held.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self.packed)


def linear(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], name: str) -> Linear:
    """The matrix `name` out of the model's tensors, in the format that its spec asks for. Raises BadFile."""
    found = weight_format(spec.format)
    packed = of_shape(found.load(tensors, name, spec.bias), (spec.out_width, spec.in_width), name)
    return Linear(spec, packed, found)


def of_shape(packed: Packed, shape: tuple[int, int], name: str) -> Packed:
    """Raises BadFile where what was packed is not of the shape that the config asks for."""
    if packed.shape != shape:
        raise BadFile(name, f"the {packed.format} matrix is {list(packed.shape)}, the config asks for {list(shape)}")
    return packed


def weight_format(name: str) -> WeightFormat:
    """The format of that name; one serves all matrices of models that are loaded with the same choice of ops."""
    return _format(name, table.in_use())


# A model has hundreds of matrices; finding a plug-in looks at the disk. A format keeps the ops that it chose when it
# was made, so that models of one process which may choose differently must not share it.
@functools.cache
def _format(name: str, use: str) -> WeightFormat:
    found: WeightFormat = registry.make("weights", name, device=True)
    return found
