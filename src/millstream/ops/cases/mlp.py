from __future__ import annotations

import math

import torch

from millstream.ops.cases import Case, Table, call, normal
from millstream.ops.ref.mlp import activate, gelu_mul, gelu_tanh_mul, moe_route, silu_mul

BF16 = torch.bfloat16


def exact_silu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (gate.double() / (1 + (-gate.double()).exp()) * up.double(),)


def exact_gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    g = gate.double()
    return (0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * up.double(),)


def exact_gelu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    g = gate.double()
    return (0.5 * g * torch.special.erfc(-g / math.sqrt(2)) * up.double(),)


def exact_alone(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    gated = {"silu": exact_silu, "gelu": exact_gelu, "gelu-tanh": exact_gelu_tanh}[kind]
    return gated(x, torch.ones_like(x))


def exact_route(
    logits: torch.Tensor, top_k: int, softmax_first: bool = True, normalize: bool = False
) -> tuple[torch.Tensor, ...]:
    weights, ids = [], []
    for row in logits.double().tolist():
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        shares = [math.exp(row[e] - max(row)) for e in order]
        whole = sum(shares) if normalize or not softmax_first else sum(math.exp(x - max(row)) for x in row)
        weights.append([share / whole for share in shares])
        ids.append(order)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(ids)


GATED = (
    Case("one token", call(normal(1, 1536), normal(1, 1536)), 2e-6, 1e-6),
    Case("no token", call(normal(0, 1536), normal(0, 1536)), 0.0),
    Case("odd width", call(normal(5, 37), normal(5, 37)), 2e-6, 1e-6),
    Case("large values", call(normal(4, 64, scale=100.0), normal(4, 64)), 2e-5, 1e-6),
    Case("big", call(normal(256, 2048), normal(256, 2048)), 5e-6, 1e-6),
    Case("bfloat16", call(normal(4, 64, dtype=BF16), normal(4, 64, dtype=BF16)), 2e-2, 1e-2),
)

TABLES = (
    Table(silu_mul, GATED, exact_silu),
    Table(gelu_tanh_mul, GATED, exact_gelu_tanh),
    Table(gelu_mul, GATED, exact_gelu),
    Table(
        activate,
        (
            *(Case(kind, call(normal(5, 1536), kind), 2e-6, 1e-6) for kind in ("silu", "gelu", "gelu-tanh")),
            Case("no token", call(normal(0, 64), "gelu"), 0.0),
            Case("odd width", call(normal(3, 37), "gelu"), 2e-6, 1e-6),
            Case("large values", call(normal(4, 64, scale=100.0), "gelu"), 2e-5, 1e-6),
            Case("bfloat16", call(normal(4, 64, dtype=BF16), "gelu"), 2e-2, 1e-2),
        ),
        exact_alone,
    ),
    Table(
        moe_route,
        (
            Case("mixtral", call(normal(9, 8), 2, True, True), 1e-6),
            Case("qwen moe, not normalized", call(normal(5, 60), 4, True, False), 1e-6),
            Case("softmax of the chosen", call(normal(5, 8), 3, False), 1e-6),
            Case("all equal", call(normal(2, 8, scale=0.0), 2, True, True), 1e-6),
            Case("every expert", call(normal(3, 4), 4), 1e-6),
        ),
        exact_route,
    ),
)
