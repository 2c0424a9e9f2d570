"""What pages of 4 bits cost."""

from __future__ import annotations

from millstream.core.cache import CacheGroup
from millstream.formats.kv.int4 import head_bytes


class Int4Host:
    """Sizes of pages of 4 bits, whatever the model computes in."""

    def page_bytes(self, group: CacheGroup, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one block across the group's layers."""
        return group.num_layers * group.kv_heads * head_bytes(group.head_dim, block_size)


PLUGIN = Int4Host
