"""Merging of attention states. A state is (out, lse): attention over some keys and the log-sum-exp of its scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from millstream.ops.table import op


@op
def merge_states(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets, from the states of the parts, merged left to right.

    Each state is out (..., D) and lse (...) float32, -inf where a part sees nothing. Returns the same pair.
    """
    out, lse = states[0]
    dtype, out = out.dtype, out.float()
    for other, other_lse in states[1:]:
        top = torch.maximum(lse, other_lse)
        # Where neither side sees a key, top is -inf and -inf - -inf would be NaN.
        shift = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
        mine, theirs = torch.exp(lse - shift), torch.exp(other_lse - shift)
        total = mine + theirs
        safe = torch.where(total == 0, torch.ones_like(total), total)
        out = out * (mine / safe).unsqueeze(-1) + other.float() * (theirs / safe).unsqueeze(-1)
        lse = shift + torch.log(total)
    return out.to(dtype), lse
