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


@op
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight (C,) + bias (C,) over x (..., C), computed in float32.

    arXiv 1607.06450; the variance is over C, not C - 1. Returns x's dtype.
    """
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)
