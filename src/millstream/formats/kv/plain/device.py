"""Plain pages: keys transposed inside a block, values as they come, so that attention reads along memory in both.

Shapes: L layers of the group, N blocks, K kv heads, D head dimension, B block size, T tokens.
K is (L, N, K, D, B) and V is (L, N, K, B, D): one (layer, block, head) is one run of D * B elements, and neighbouring
blocks of a layer are neighbours in memory.
"""

from __future__ import annotations

import torch

from millstream.core.cache import CacheGroup
from millstream.core.errors import ConfigError
from millstream.core.plan import Tier
from millstream.formats.kv._blocks import Pooled
from millstream.formats.kv._zeros import zeros as _zeros
from millstream.formats.kv.plain import Config, element_bytes
from millstream.ops.attention.protocol import CopyCounts
from millstream.ops.cpu import kv_write as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.kv import kv_write
from millstream.ops.table import Ask

LAYOUT = "k-transposed"


class PlainPages(Pooled):
    """The pages of one group. Implements `KvPages`."""

    layout = LAYOUT

    def __init__(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        num_host_blocks: int,
        device: torch.device,
    ) -> None:
        self.group = group
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.copied = CopyCounts()
        self._pools = {
            Tier.DEVICE: _pool(group, num_blocks, block_size, dtype, device),
            Tier.HOST: _pool(group, num_host_blocks, block_size, dtype, torch.device("cpu")),
        }
        self.k, self.v = self._pools[Tier.DEVICE]
        self._k_layers, self._v_layers = list(self.k.unbind(0)), list(self.v.unbind(0))
        self._token_bytes = 2 * group.kv_heads * group.head_dim * dtype.itemsize
        self._write = kv_write.resolve(Ask(device.type, dtype, block_size))

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v (T, K, D) of new tokens at `slots` (T,) int64. Raises IndexError for a slot out of range."""
        self._write(self._k_layers[layer], self._v_layers[layer], slots, k, v)
        self.copied.write_bytes += slots.shape[0] * self._token_bytes

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of k, v (T, K, D) at `slots`, in the stored dtype."""
        block, offset = slots // self.block_size, slots % self.block_size
        return self._k_layers[layer][block, :, :, offset], self._v_layers[layer][block, :, offset]

    def wrote(self, num_tokens: int, num_layers: int) -> None:
        """Counts what a native program wrote itself: `num_tokens` in each of some layers."""
        self.copied.write_bytes += num_tokens * num_layers * self._token_bytes

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where K and V of a layer begin."""
        return self._k_layers[layer].data_ptr(), self._v_layers[layer].data_ptr()


class Plain:
    """Makes plain pages. Implements `KvFormat`."""

    keys = "rotated"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    def allocate(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        dtype: str | torch.dtype | None = None,
        num_host_blocks: int = 0,
        device: str | torch.device = "cpu",
    ) -> PlainPages:
        """Zeroed pages; memory is taken as it is first written. Raises ConfigError on an impossible dtype or size."""
        name = str(dtype or self.config.dtype).removeprefix("torch.")
        element_bytes(name)
        if min(num_blocks, block_size) < 1 or num_host_blocks < 0:
            raise ConfigError(
                f"kv plain: got {num_blocks} blocks of {block_size} tokens and {num_host_blocks} in host memory; "
                "blocks and tokens must be at least 1"
            )
        return PlainPages(group, num_blocks, block_size, getattr(torch, name), num_host_blocks, torch.device(device))


def _pool(
    group: CacheGroup, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    head = (group.num_layers, num_blocks, group.kv_heads)
    k = _zeros((*head, group.head_dim, block_size), dtype, device)
    return k, _zeros((*head, block_size, group.head_dim), dtype, device)


PLUGIN = Plain
