"""Pages of 8 bits: all that one block holds of a layer is one run of memory, head after head.

Shapes: L layers of the group, N blocks, K kv heads, D head dimension rounded up to 16, B block size, T tokens. A head
of a block is: keys as unsigned bytes around 128, (D / 4, B, 4); values as signed bytes, (B / 4, D, 4); scales of keys
and of values, float32 (2, B). `ops/cpu/attention8.h` reads it so.
"""

from __future__ import annotations

import torch

from millstream.core.cache import CacheGroup
from millstream.core.errors import ConfigError
from millstream.core.plan import Tier
from millstream.formats.kv._zeros import zeros
from millstream.formats.kv.int8 import head_bytes
from millstream.ops.attention.protocol import CopyCounts
from millstream.ops.cpu import kv_write8 as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.kv import kv_write8
from millstream.ops.table import Ask

LAYOUT = "int8-blocks"


class Int8Pages:
    """The pages of one group. Implements `KvPages`. `data` is uint8 (L, N, K, bytes of a head)."""

    layout = LAYOUT

    def __init__(
        self, group: CacheGroup, num_blocks: int, block_size: int, num_host_blocks: int, device: torch.device
    ) -> None:
        self.group, self.block_size, self.dtype = group, block_size, torch.uint8
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks
        self.copied = CopyCounts()
        one = (group.kv_heads, head_bytes(group.head_dim, block_size))
        self._pools = {
            Tier.DEVICE: zeros((group.num_layers, num_blocks, *one), torch.uint8, device),
            Tier.HOST: zeros((group.num_layers, num_host_blocks, *one), torch.uint8, torch.device("cpu")),
        }
        self.data = self._pools[Tier.DEVICE]
        self._layers = list(self.data.unbind(0))
        self._width = -(-group.head_dim // 16) * 16
        self._token_bytes = group.kv_heads * (2 * self._width + 8)
        self._write = kv_write8.resolve(Ask(device.type, torch.uint8, block_size))

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v (T, K, D) of new tokens at `slots` (T,) int64. Raises IndexError for a slot out of range."""
        self._write(self._layers[layer], slots, k, v, self.block_size)
        self.copied.write_bytes += slots.shape[0] * self._token_bytes

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (T, K, D) float32 at `slots`, each byte times its scale."""
        size, width = self.block_size, self._width
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
        return k[..., : self.group.head_dim], v[..., : self.group.head_dim]

    def wrote(self, num_tokens: int, num_layers: int) -> None:
        """Counts what a native program wrote itself: `num_tokens` in each of some layers."""
        self.copied.write_bytes += num_tokens * num_layers * self._token_bytes

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where the blocks of a layer begin; they hold K and V."""
        at = self._layers[layer].data_ptr()
        return at, at

    def move(self, source: int, target: int, source_tier: Tier = Tier.DEVICE, target_tier: Tier = Tier.DEVICE) -> None:
        """Copies one block across all layers, within a tier or between them."""
        for block, tier in ((source, source_tier), (target, target_tier)):
            held = self.num_blocks if tier is Tier.DEVICE else self.num_host_blocks
            if not 0 <= block < held:
                raise IndexError(f"block {block} of group {self.group.name!r}: the {tier.value} tier has {held}")
        origin = self._pools[source_tier][:, source]
        self._pools[target_tier][:, target].copy_(origin)
        self.copied.move_bytes += origin.nbytes


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
        if num_blocks < 1 or block_size < 1 or block_size % 4 or num_host_blocks < 0:
            raise ConfigError(
                f"kv int8: got {num_blocks} blocks of {block_size} tokens and {num_host_blocks} in host memory; "
                "there must be at least 1, of a multiple of 4 tokens"
            )
        if group.head_dim > 1024:
            raise ConfigError(f"kv int8: heads of {group.head_dim}, at most 1024 can be stored")
        return Int8Pages(group, num_blocks, block_size, num_host_blocks, torch.device(device))


PLUGIN = Int8
