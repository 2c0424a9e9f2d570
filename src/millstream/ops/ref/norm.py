"""Normalisation. Shapes: T tokens, C width."""

from __future__ import annotations

import torch

from millstream.ops.table import op


@op
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x (..., C) / sqrt(mean(x^2) + eps) * (offset + weight (C,)), computed in float32 (arXiv 1910.07467).

    Gemma stores its weights less one: offset 1. Returns x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.float())).to(x.dtype)
