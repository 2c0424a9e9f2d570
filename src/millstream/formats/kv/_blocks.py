"""Whole blocks from one pool of pages to another, many at once.

Shapes: L layers of the group, N blocks, and whatever one block holds of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from millstream.core.cache import CacheGroup
from millstream.core.plan import Tier
from millstream.ops.attention.protocol import CopyCounts


class Pooled:
    """Pages in pools by tier, tensors (L, N, ...): the part of `KvPages` that moves blocks."""

    group: CacheGroup
    num_blocks: int
    num_host_blocks: int
    copied: CopyCounts
    _pools: Mapping[Tier, tuple[torch.Tensor, ...]]

    def move(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        source_tier: Tier = Tier.DEVICE,
        target_tier: Tier = Tier.DEVICE,
    ) -> None:
        """Copies blocks across all layers, within a tier or between them. Raises IndexError."""
        for blocks, tier in ((sources, source_tier), (targets, target_tier)):
            held = self.num_blocks if tier is Tier.DEVICE else self.num_host_blocks
            for block in blocks:
                if not 0 <= block < held:
                    raise IndexError(f"block {block} of group {self.group.name!r}: the {tier.value} tier has {held}")
        for origin, destination in zip(self._pools[source_tier], self._pools[target_tier], strict=True):
            self.copied.move_bytes += _copy(origin, destination, sources, targets)


def _copy(origin: torch.Tensor, destination: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> int:
    """Copies blocks from one pool to another, or within one. Gives the number of bytes.

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
