"""Rotary positions (arXiv 2104.09864), rotate-half form: dimension d turns with d + D/2.

Shapes: T tokens, H heads, D head dimension, R rotated dimensions (R <= D, even).
Frequencies are computed step by step as Hugging Face transformers does, so that float32 angles agree at long positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from millstream.core.errors import Unsupported
from millstream.ops.table import op


def rope_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, (dim / 2,) float32, and the factor on cos and sin.

    `dim` counts rotated dimensions. `scaling` has the keys of a checkpoint's `rope_scaling`: `rope_type` is default,
    linear, llama3 or yarn. Raises Unsupported for any other (longrope included).
    """
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    plain = 1.0 / powers
    kind = "default" if scaling is None else str(scaling.get("rope_type", scaling.get("type", "default")))
    if scaling is None or kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(powers, dim, theta, scaling)
    raise Unsupported(f"rope scaling {kind!r} is not supported; there are: default, linear, llama3, yarn")


def rope_table(
    frequencies: torch.Tensor, attention_factor: float, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, R / 2) float32 at `positions` (T,)."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


@op
def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the first R dimensions of x (T, H, D) by cos, sin (T, R / 2); the rest pass. Returns x's dtype."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _llama3(plain: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    slow = torch.where(wavelength > context / low, plain / factor, plain)
    blend = (context / wavelength - low) / (high - low)
    smooth = (1 - blend) * slow / factor + blend * slow
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, smooth, slow)


def _yarn(powers: torch.Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = (
            _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all) if mscale and mscale_all else None
        )
    if attention_factor is None:
        attention_factor = _yarn_scale(factor, 1.0)

    def dimension_turning(times: float) -> float:
        return (dim * math.log(context / (times * 2 * math.pi))) / (2 * math.log(theta))

    low = dimension_turning(scaling.get("beta_fast") or 32)
    high = dimension_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention_factor)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
