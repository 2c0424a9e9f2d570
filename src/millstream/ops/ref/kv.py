"""Writing new keys and values into pages.

Shapes: N blocks, K kv heads, D head dimension, B block size, T new tokens.
"""

from __future__ import annotations

import torch

from millstream.ops.table import op


@op
def kv_write(
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Stores k, v (T, K, D) at `slots` (T,) int64 of k_pages (N, K, D, B) and v_pages (N, K, B, D), in place.

    A negative slot is passed over. Raises IndexError when a slot lies beyond the pages.
    """
    size = v_pages.shape[2]
    kept = slots >= 0
    if not bool(kept.all()):
        slots, k, v = slots[kept], k[kept], v[kept]
    if slots.numel() and int(slots.max()) >= v_pages.shape[0] * size:
        raise IndexError(f"slot {int(slots.max())} is beyond {v_pages.shape[0]} blocks of {size}")
    block, offset = slots // size, slots % size
    k_pages[block, :, :, offset] = k.to(k_pages.dtype)
    v_pages[block, :, offset] = v.to(v_pages.dtype)
