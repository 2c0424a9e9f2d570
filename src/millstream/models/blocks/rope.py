"""Rotary positions (arXiv 2104.09864): the angles of a step, for each kind of scaling.

Frequencies are computed in float32 in the order of operations that the models were trained and are published with: at
a position of some thousands the last digit of a frequency is a visible angle.

Shapes: T tokens, N heads, D rotated values of a head.
"""

from __future__ import annotations

import math

import torch

from millstream.models.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


class Rotary:
    """cos and sin for given positions. Layers with equal specs share one."""

    __slots__ = ("attention_factor", "frequencies", "spec")

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.frequencies = frequencies(spec)
        self.attention_factor = spec.scaling.attention_factor if isinstance(spec.scaling, YarnScaling) else 1.0

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions (T,) -> cos, sin (T, 1, D). The first half of sin is negated, so that rotating a head is
        x * cos + swap(x) * sin, where swap exchanges its two halves."""
        angle = positions.float()[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return (
            torch.cat((cos, cos), -1).to(dtype)[:, None],
            torch.cat((-sin, sin), -1).to(dtype)[:, None],
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, N, D) turned by the angles of `Rotary.angles`; values of a head beyond D pass through. New memory."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    half = dim // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return (x * cos).addcmul_(swapped, sin)


def frequencies(spec: RopeSpec) -> torch.Tensor:
    """Radians a position, (D / 2,) float32."""
    waves = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    plain = 1.0 / waves
    scaling = spec.scaling
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    return _yarn(waves, plain, spec, scaling)


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    length = 2 * math.pi / plain
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    ramp = scaling.original_context / length - scaling.low_freq_factor
    ramp = ramp / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - ramp) * plain / scaling.factor + ramp * plain
    return torch.where(length > low, plain / scaling.factor, torch.where(length < high, plain, between))


def _yarn(waves: torch.Tensor, plain: torch.Tensor, spec: RopeSpec, scaling: YarnScaling) -> torch.Tensor:
    def dimension(rotations: float) -> float:
        """Where a wave turns `rotations` times within the original context."""
        turns = math.log(scaling.original_context / (rotations * 2 * math.pi))
        return spec.dim * turns / (2 * math.log(spec.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - torch.clamp((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return (1.0 / (scaling.factor * waves)) * (1 - kept) + plain * kept
