"""RMS norm, bound to its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.models.spec import NormSpec


class Norm:
    """x (..., width) -> the same shape and dtype, new memory. The offset is added to the weight once, here.

    With an offset the product is taken in float32, as the models that have one were trained; the sum would lose
    digits in half precision.
    """

    __slots__ = ("eps", "shape", "spec", "weight")

    def __init__(self, spec: NormSpec, weight: torch.Tensor) -> None:
        self.spec = spec
        self.weight = weight.float() + spec.offset if spec.offset else weight
        self.shape, self.eps = (spec.width,), spec.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.shape, self.weight.float(), self.eps).to(x.dtype)
