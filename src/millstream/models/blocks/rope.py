"""Rotary positions: the angles of a step for one RopeSpec.

Shapes: T tokens, N heads, D head dimension, R rotated values of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from millstream.models.spec import LinearScaling, Llama3Scaling, RopeScaling, RopeSpec
from millstream.ops.cpu import elementwise as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.rope import apply_rope, rope_frequencies, rope_table
from millstream.ops.table import Ask


class Rotary:
    """Layers with equal specs share one, so that a step takes cos and sin once for all of them."""

    __slots__ = ("apply", "attention_factor", "frequencies", "spec")

    def __init__(self, spec: RopeSpec, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.spec = spec
        self.frequencies, self.attention_factor = rope_frequencies(spec.dim, spec.theta, _terms(spec.scaling))
        # x (T, N, D), cos and sin of `angles` -> x turned, new memory.
        self.apply = apply_rope.resolve(Ask(device, dtype, head_dim))

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions (T,) -> cos, sin (T, R / 2) float32."""
        return rope_table(self.frequencies, self.attention_factor, positions)


def _terms(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A scaling in the words of `rope_frequencies`."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.truncate,
    }
