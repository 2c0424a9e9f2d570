"""Products with plain matrices. Shapes: T tokens, I inputs, O outputs, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.ops.table import op


@op
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, I) times weight (O, I) transposed, plus bias (O,) -> (T, O)."""
    return F.linear(x, weight, bias)


@op
def embedding(tokens: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows `tokens` (T,) of weight (V, C), times `scale` rounded to their dtype first -> (T, C)."""
    rows = F.embedding(tokens, weight)
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=weight.dtype, device=weight.device)


@op
def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """logits (T, V) in any dtype -> logprobs (T, V) float32."""
    return torch.log_softmax(logits.float(), dim=-1)


@op
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """x bent smoothly into (-cap, cap): cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap
