"""Pages of 8 bits.

Shapes: L layers of the group, N blocks, K kv heads, D head dimension rounded up to 16, B block size, T tokens. A head
of a block is: keys as unsigned bytes around 128, (D / 4, B, 4); values as signed bytes, (B / 4, D, 4); scales of keys
and of values, float32 (2, B). `ops/cpu/attention8.h` reads it so.
"""

from __future__ import annotations

import torch

from millstream.core.cache import CacheGroup
from millstream.formats.kv._coded import CodedPages, check_sizes
from millstream.formats.kv.int8 import head_bytes
from millstream.ops.cpu import kv_write_codes as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.kv import kv_write8
from millstream.ops.table import Ask


class Int8Pages(CodedPages):
    """The pages of one group, in 8 bits."""

    layout = "int8-blocks"

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (T, K, D) float32 at `slots`, each byte times its scale."""
        size, dim = self.block_size, self.group.head_dim
        width = -(-dim // 16) * 16
        held = self._layers[layer][slots // size]
        offset = slots % size
        tokens, heads, row = slots.shape[0], self.group.kv_heads, torch.arange(slots.shape[0])
        keys = held[:, :, : size * width].reshape(tokens, heads, width // 4, size, 4)[row, :, :, offset]
        values = held[:, :, size * width : 2 * size * width].reshape(tokens, heads, size // 4, width, 4)
        values = values[row, :, offset // 4, :, offset % 4]
        scales = held[:, :, 2 * size * width :].contiguous().view(torch.float32).view(tokens, heads, 2, size)
        scale = scales[row, :, :, offset][..., None]
        k = (keys.reshape(tokens, heads, width).float() - 128.0) * scale[:, :, 0]
        v = values.view(torch.int8).float() * scale[:, :, 1]
        return k[..., :dim], v[..., :dim]


class Int8:
    """Makes pages of 8 bits. Implements `KvFormat`."""

    keys = "rotated"

    def allocate(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        dtype: str | torch.dtype | None = None,
        num_host_blocks: int = 0,
        device: str | torch.device = "cpu",
    ) -> Int8Pages:
        """Zeroed pages; memory is taken as it is first written. Raises ConfigError on an impossible size."""
        check_sizes("int8", group, num_blocks, block_size, num_host_blocks)
        where = torch.device(device)
        write = kv_write8.resolve(Ask(where.type, torch.uint8, block_size))
        size = head_bytes(group.head_dim, block_size)
        return Int8Pages(group, num_blocks, block_size, num_host_blocks, where, size, write)


PLUGIN = Int8
