"""What follows the first products of an MLP, and the mixture of experts.

Shapes: T tokens, C width, I inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from millstream.ops.table import op


@op
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all (T, I)."""
    return F.silu(gate) * up


@op
def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with the tanh form of gelu, all (T, I)."""
    return F.gelu(gate, approximate="tanh") * up


@op
def gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with the exact gelu, all (T, I)."""
    return F.gelu(gate) * up


@op
def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation alone, of an MLP without a gate: "silu", "gelu" (exact) or "gelu-tanh" of x (T, I)."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu-tanh" else "none")


@op
def moe_route(
    logits: torch.Tensor, top_k: int, softmax_first: bool = True, normalize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (T, E) -> weights (T, top_k) float32 and expert ids (T, top_k) int64, likeliest first.

    `softmax_first` takes probabilities over all experts, and `normalize` makes the chosen ones sum to 1 (Mixtral,
    Qwen); otherwise the softmax runs over the chosen logits only. Equal logits go to the lower id.
    """
    logits = logits.float()
    # A stable sort, not topk: which of equal experts wins must not depend on the batch.
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if not softmax_first:
        return torch.softmax(logits.gather(-1, order), dim=-1), order
    weights = torch.softmax(logits, dim=-1).gather(-1, order)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), order


def moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    top_k: int,
    softmax_first: bool = True,
    normalize: bool = False,
) -> torch.Tensor:
    """A mixture of experts, one after the other: x (T, C) and router logits (T, E) -> (T, C).

    `expert(e, rows)` computes expert e of some rows. A token's experts are summed in the order of their ids, so the
    result does not depend on who shares the batch.
    """
    weights, chosen = moe_route(logits, top_k, softmax_first, normalize)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in torch.unique(chosen).tolist():
        row, place = torch.nonzero(chosen == e, as_tuple=True)
        out.index_add_(0, row, expert(e, x[row]).float() * weights[row, place, None])
    return out.to(x.dtype)
