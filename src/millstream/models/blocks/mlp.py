"""What a layer does to each token alone: a gated MLP, or a mixture of them.

Shapes: T tokens, C width.
"""

from __future__ import annotations

import torch

from millstream.models.blocks.linear import Linear
from millstream.models.spec import MlpSpec, MoeSpec
from millstream.ops.cpu import elementwise as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.mlp import gelu_mul, gelu_tanh_mul, moe, silu_mul
from millstream.ops.table import Ask

ACTIVATIONS = {"silu": silu_mul, "gelu-tanh": gelu_tanh_mul, "gelu": gelu_mul}


class Mlp:
    """x (T, C) -> (T, C), new memory."""

    __slots__ = ("_gate", "down", "gate_up", "spec")

    def __init__(self, spec: MlpSpec, gate_up: Linear, down: Linear, dtype: torch.dtype, device: str = "cpu") -> None:
        self.spec, self.gate_up, self.down = spec, gate_up, down
        self._gate = ACTIVATIONS[spec.activation].resolve(Ask(device, dtype, spec.inner))

    def linears(self) -> list[Linear]:
        return [self.gate_up, self.down]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self._gate(gate, up))


class Moe:
    """x (T, C) -> (T, C), new memory: a plain loop over the experts that any token chose."""

    __slots__ = ("experts", "router", "shared", "shared_gate", "spec")

    def __init__(
        self, spec: MoeSpec, router: Linear, experts: list[Mlp], shared: Mlp | None, shared_gate: Linear | None
    ) -> None:
        self.spec, self.router, self.experts = spec, router, experts
        self.shared, self.shared_gate = shared, shared_gate

    def linears(self) -> list[Linear]:
        mlps = [*self.experts, *([self.shared] if self.shared is not None else [])]
        gate = [self.shared_gate] if self.shared_gate is not None else []
        return [self.router, *gate, *(linear for mlp in mlps for linear in mlp.linears())]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = moe(x, self.router(x), self._expert, self.spec.top_k, normalize=self.spec.normalize)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared.mul_(torch.sigmoid(self.shared_gate(x)))
            out += shared
        return out

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        return self.experts[index](rows)
