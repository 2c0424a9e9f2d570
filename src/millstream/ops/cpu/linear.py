"""The form of torch's matrix product that suits few rows. Not native yet: it picks between two calls of one library.

y = x W^T can be asked of the library as it stands or as (W x^T)^T. The results differ in rounding only, the seconds by
up to four times: on a CPU with AVX-512 the plain form reads W once a row for 2 to 8 rows, and for one row on one
thread. A single row is taken twice, for a product of two rows reads W at the speed of memory and one of one row does
not. Measured in docs/log.md.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.ops.ref.linear import linear
from millstream.ops.table import Ask, Refusal

# Rows for which (W x^T)^T is the faster form, by measurement.
_FEW = 8
_SOME = range(16, 97)


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    return None if ask.dtype == torch.float32 else Refusal(f"tensors of {ask.dtype}")


@linear.implement("cpu", accepts=_accepts)
def linear_few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The op `linear` in float32: x (T, I) times weight (O, I) transposed, plus bias (O,) -> (T, O)."""
    rows = x.shape[0]
    if x.ndim != 2 or not (0 < rows <= _FEW or rows in _SOME):
        return F.linear(x, weight, bias)
    if rows == 1:
        out = torch.mm(weight, torch.cat((x, x)).t()).t()[:1].contiguous()
    else:
        out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)
