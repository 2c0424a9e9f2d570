"""What a layer does to each token alone: a gated MLP, or a mixture of them.

Shapes: T tokens, C width, I inner width, E experts, A experts of one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.models.blocks.linear import Linear
from millstream.models.spec import MlpSpec, MoeSpec


class Mlp:
    """x (T, C) -> (T, C), new memory."""

    __slots__ = ("down", "gate_up", "spec")

    def __init__(self, spec: MlpSpec, gate_up: Linear, down: Linear) -> None:
        self.spec, self.gate_up, self.down = spec, gate_up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(activate(gate, self.spec.activation).mul_(up))


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu-tanh" else "none")


class Moe:
    """x (T, C) -> (T, C). A plain loop over the experts that any token chose.

    The sum over a token's experts runs in the order of their numbers whoever shares the batch.
    """

    __slots__ = ("experts", "router", "shared", "shared_gate", "spec")

    def __init__(
        self, spec: MoeSpec, router: Linear, experts: list[Mlp], shared: Mlp | None, shared_gate: Linear | None
    ) -> None:
        self.spec, self.router, self.experts = spec, router, experts
        self.shared, self.shared_gate = shared, shared_gate

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, C) -> weights (T, A) in x's dtype, experts (T, A)."""
        weights, experts = torch.topk(torch.softmax(self.router(x).float(), -1), self.spec.top_k, -1)
        if self.spec.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.route(x)
        out = torch.zeros_like(x)
        for index in torch.unique(experts).tolist():
            rows, choice = torch.nonzero(experts == index, as_tuple=True)
            out.index_add_(0, rows, self.experts[index](x[rows]).mul_(weights[rows, choice, None]))
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared.mul_(torch.sigmoid(self.shared_gate(x)))
            out += shared
        return out
