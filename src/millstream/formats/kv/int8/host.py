"""What pages of 8 bits cost."""

from __future__ import annotations

from millstream.core.cache import CacheGroup
from millstream.formats.kv.int8 import head_bytes


class Int8Host:
    """Sizes of pages of 8 bits, whatever the model computes in."""

    def page_bytes(self, group: CacheGroup, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one block across the group's layers."""
        return group.num_layers * group.kv_heads * head_bytes(group.head_dim, block_size)


PLUGIN = Int8Host
