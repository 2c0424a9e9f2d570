"""Grouped-query attention over pages.

Shapes: T new tokens, H query heads, K kv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from millstream.models.blocks.linear import Linear
from millstream.models.blocks.norm import Norm
from millstream.models.blocks.rope import Rotary
from millstream.models.spec import AttentionSpec
from millstream.ops.attention.protocol import AttentionBackend, Pages
from millstream.ops.layout import BatchLayout


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What the layers of one cache group share in a step."""

    pages: Pages
    backend: AttentionBackend
    state: Any
    slots: torch.Tensor


@dataclass(slots=True)
class StepContext:
    """One ragged step: where its tokens lie and how each cache group is attended to.

    `angles` fills itself: cos and sin are taken once a step for each kind of rotary positions.
    """

    layout: BatchLayout
    groups: Mapping[str, GroupStep]
    angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def step_context(
    layout: BatchLayout,
    pages: Mapping[str, Pages],
    backends: Mapping[str, AttentionBackend],
    buffers: Mapping[str, dict[str, torch.Tensor]] | None = None,
) -> StepContext:
    """Prepares a step. All mappings are by cache group; groups with the same backend share what it prepares.

    `buffers`, by group, are handed to the backends: tensors that outlive the step.
    """
    groups: dict[str, GroupStep] = {}
    prepared: dict[int, Any] = {}
    for name, held in pages.items():
        backend = backends[name]
        if buffers is not None:
            state = backend.prepare(layout, buffers[name])
        elif id(backend) in prepared:
            state = prepared[id(backend)]
        else:
            state = prepared[id(backend)] = backend.prepare(layout)
        groups[name] = GroupStep(held, backend, state, layout.groups[name].slots)
    return StepContext(layout, groups)


class Attention:
    """`place` is the layer's number among those of its cache group."""

    __slots__ = ("k_norm", "out", "place", "q_norm", "qkv", "rotary", "spec")

    def __init__(
        self,
        spec: AttentionSpec,
        place: int,
        qkv: Linear,
        out: Linear,
        rotary: Rotary | None,
        q_norm: Norm | None,
        k_norm: Norm | None,
    ) -> None:
        self.spec, self.place, self.qkv, self.out = spec, place, qkv, out
        self.rotary, self.q_norm, self.k_norm = rotary, q_norm, k_norm

    def project(self, x: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (T, width) -> q (T, H, D), k and v (T, K, D), normed and rotated to the step's positions."""
        spec = self.spec
        heads, kv_heads = spec.heads, spec.kv_heads
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, spec.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), 1)
        if self.rotary is not None:
            angles = step.angles.get(self.rotary)
            if angles is None:
                angles = step.angles[self.rotary] = self.rotary.angles(step.layout.positions)
            qk = self.rotary.apply(qk, *angles)
        return qk[:, :heads], qk[:, heads:], v

    def __call__(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """x (T, width) -> (T, width). The new keys and values are in the pages afterwards."""
        spec = self.spec
        group = step.groups[spec.group]
        q, k, v = self.project(x, step)
        group.pages.write(self.place, group.slots, k, v)
        seen, _ = group.backend.run(q, group.pages, self.place, group.state, spec.scale, spec.window, spec.softcap)
        return self.out(seen.reshape(x.shape[0], spec.heads * spec.head_dim))
