"""Whole blocks from one pool of pages to another, many at once.

Shapes: L layers of the group, N blocks, and whatever one block holds of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from millstream.core.plan import Tier
from millstream.formats.kv.protocol import KvPages


def check(pages: KvPages, blocks: Sequence[int], tier: Tier) -> None:
    """Raises IndexError for a block that the tier does not have."""
    held = pages.num_blocks if tier is Tier.DEVICE else pages.num_host_blocks
    for block in blocks:
        if not 0 <= block < held:
            raise IndexError(f"block {block} of group {pages.group.name!r}: the {tier.value} tier has {held}")


def copy(origin: torch.Tensor, destination: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> int:
    """Copies blocks (L, N, ...) from one pool to another, or within one. Gives the number of bytes.

    Within one memory each is copied from place to place: a buffer between takes three to eight times as long. Between
    memories they are gathered in one, which crosses at once (Luo et al., Autellix, section 5): there a transfer has a
    price of its own, whatever it carries.
    """
    if origin.device == destination.device:
        for source, target in zip(sources, targets, strict=True):
            destination[:, target].copy_(origin[:, source])
    else:
        buffer = origin.index_select(1, torch.tensor(sources, device=origin.device)).to(destination.device)
        destination.index_copy_(1, torch.tensor(targets, device=destination.device), buffer)
    return len(sources) * origin[:, 0].nbytes
