"""How keys and values are stored. A format has two halves: bytes for those who plan, tensors for those who compute.

Above the runner KV is only (group, block id, offset); what a block holds is known here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from millstream.core.cache import CacheGroup
from millstream.core.plan import Tier
from millstream.ops.attention.protocol import CopyCounts, Pages

if TYPE_CHECKING:
    import torch

__all__ = ["CopyCounts", "KvFormat", "KvFormatHost", "KvPages", "Pages"]


class KvFormatHost(Protocol):
    """The half that plans memory; imports no torch."""

    def page_bytes(self, group: CacheGroup, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one block of `block_size` tokens across all layers of the group."""
        ...


class KvPages(Pages, Protocol):
    """Pages that also move whole blocks.

    `num_blocks` lie beside the compute, `num_host_blocks` in a pool of ordinary host memory with its own block ids.
    """

    num_blocks: int
    num_host_blocks: int

    def move(
        self, sources: Sequence[int], targets: Sequence[int], source_tier: Tier = ..., target_tier: Tier = ...
    ) -> None:
        """Copies blocks across all layers, `sources[i]` to `targets[i]`. Complete on return.

        No source is a target of the same call, and no target comes twice. Raises IndexError for a block out of range.
        """
        ...


class KvFormat(Protocol):
    """The half that computes. `keys` says whether they are stored with position ("rotated") or without ("raw")."""

    keys: str

    def allocate(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        dtype: str | torch.dtype | None = None,
        num_host_blocks: int = 0,
        device: str | torch.device = "cpu",
    ) -> KvPages:
        """Pages for every layer of a group; their content reads as zeros until written."""
        ...
