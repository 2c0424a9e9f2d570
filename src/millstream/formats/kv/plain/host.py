"""What plain pages cost."""

from __future__ import annotations

from millstream.core.cache import CacheGroup
from millstream.formats.kv.plain import Config, element_bytes


class PlainHost:
    """Sizes of plain pages."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    def page_bytes(self, group: CacheGroup, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one block across the group's layers: K and V of `block_size` tokens."""
        return (
            2
            * group.num_layers
            * group.kv_heads
            * group.head_dim
            * block_size
            * element_bytes(dtype or self.config.dtype)
        )


PLUGIN = PlainHost
