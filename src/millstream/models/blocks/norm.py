"""RMS norm, bound to its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.models.spec import NormSpec
from millstream.ops.ref.norm import rms_norm
from millstream.ops.table import Ask, Refusal


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


def _float32(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    return None if ask.dtype == torch.float32 else Refusal(f"tensors of {ask.dtype}")


# Torch's own one-call form, in the place of the native kernel until there is one: a decode step is made of calls so
# small that their number is what they cost. In other dtypes it rounds at other places than the reference.
if "cpu" not in rms_norm.implementations:

    @rms_norm.implement("cpu", accepts=_float32)
    def rms_norm_fused(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """The op `rms_norm` in float32."""
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)
