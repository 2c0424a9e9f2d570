"""RMS norm, bound to its weight."""

from __future__ import annotations

import torch

from millstream.models.spec import NormSpec
from millstream.ops.cpu import elementwise as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.norm import rms_norm
from millstream.ops.table import Ask


class Norm:
    """x (..., width) -> the same shape and dtype, new memory."""

    __slots__ = ("_norm", "offset", "spec", "weight")

    def __init__(self, spec: NormSpec, weight: torch.Tensor) -> None:
        self.spec = spec
        # In float32 the sum is exact enough to be taken once; a shorter dtype would lose digits of it.
        self.weight = weight + spec.offset if spec.offset and weight.dtype == torch.float32 else weight
        self.offset = 0.0 if self.weight is not weight else spec.offset
        self._norm = rms_norm.resolve(Ask(weight.device.type, weight.dtype, spec.width))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.spec.eps, self.offset)
