"""Pages of 4 bits.

Shapes: L layers of the group, N blocks, K kv heads, D head dimension rounded up to 32, B block size, T tokens. A head
of a block is: codes of keys, (D / 8, B, 4) bytes, each with a code of the first four dimensions in its low half and of
the next four in its high half; codes of values, (B / 4, D / 32, 16, 4) bytes, likewise of the first and the next 16;
scales and zeros of keys and of values, float16 (4, B). A value is scale * code + zero. `ops/cpu/attention4.h` reads it
so.
"""

from __future__ import annotations

import torch

from millstream.core.cache import CacheGroup
from millstream.formats.kv._coded import CodedPages, check_sizes
from millstream.formats.kv.int4 import head_bytes
from millstream.ops.cpu import kv_write_codes as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.kv import kv_write4
from millstream.ops.table import Ask


class Int4Pages(CodedPages):
    """The pages of one group, in 4 bits."""

    layout = "int4-blocks"

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (T, K, D) float32 at `slots`, each code times its scale, plus its zero."""
        size, dim = self.block_size, self.group.head_dim
        width = -(-dim // 32) * 32
        held = self._layers[layer][slots // size]
        offset = slots % size
        tokens, heads, row = slots.shape[0], self.group.kv_heads, torch.arange(slots.shape[0])
        middle, end = size * width // 2, size * width
        keys = held[:, :, :middle].reshape(tokens, heads, width // 8, size, 4)[row, :, :, offset]
        values = held[:, :, middle:end].reshape(tokens, heads, size // 4, width // 32, 16, 4)
        values = values[row, :, offset // 4, :, :, offset % 4]
        halves = held[:, :, end:].contiguous().view(torch.float16).view(tokens, heads, 4, size)
        half = halves[row, :, :, offset].float()[..., None]
        k, v = (
            torch.stack((both & 15, both >> 4), 3).reshape(tokens, heads, width)[..., :dim] for both in (keys, values)
        )
        return k.float() * half[:, :, 0] + half[:, :, 1], v.float() * half[:, :, 2] + half[:, :, 3]


class Int4:
    """Makes pages of 4 bits. Implements `KvFormat`."""

    keys = "rotated"

    def allocate(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        dtype: str | torch.dtype | None = None,
        num_host_blocks: int = 0,
        device: str | torch.device = "cpu",
    ) -> Int4Pages:
        """Zeroed pages; memory is taken as it is first written. Raises ConfigError on an impossible size."""
        check_sizes("int4", group, num_blocks, block_size, num_host_blocks)
        where = torch.device(device)
        write = kv_write4.resolve(Ask(where.type, torch.uint8, block_size))
        size = head_bytes(group.head_dim, block_size)
        return Int4Pages(group, num_blocks, block_size, num_host_blocks, where, size, write)


PLUGIN = Int4
