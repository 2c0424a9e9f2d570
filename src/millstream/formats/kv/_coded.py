"""Pages of codes: all that one block holds of a layer is one run of memory, head after head.

Shapes: L layers of the group, N blocks, K kv heads, D head dimension, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from millstream.core.cache import CacheGroup
from millstream.core.errors import ConfigError
from millstream.core.plan import Tier
from millstream.formats.kv._blocks import Pooled
from millstream.formats.kv._zeros import zeros
from millstream.ops.attention.protocol import CopyCounts

# pages (N, K, bytes of a head), slots (T,), k and v (T, K, D), block size
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], None]
MAX_HEAD_DIM = 1024


class CodedPages(Pooled, ABC):
    """The pages of one group. Implements `KvPages`. `data` is uint8 (L, N, K, bytes of a head)."""

    layout: ClassVar[str]

    def __init__(
        self,
        group: CacheGroup,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        device: torch.device,
        head_bytes: int,
        write: Write,
    ) -> None:
        self.group, self.block_size, self.dtype = group, block_size, torch.uint8
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks
        self.copied = CopyCounts()
        one = (group.kv_heads, head_bytes)
        self._pools = {
            Tier.DEVICE: (zeros((group.num_layers, num_blocks, *one), torch.uint8, device),),
            Tier.HOST: (zeros((group.num_layers, num_host_blocks, *one), torch.uint8, torch.device("cpu")),),
        }
        (self.data,) = self._pools[Tier.DEVICE]
        self._layers = list(self.data.unbind(0))
        self._token_bytes = group.kv_heads * head_bytes // block_size
        self._write = write

    @abstractmethod
    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (T, K, D) float32 at `slots`: what the codes stand for."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v (T, K, D) of new tokens at `slots` (T,) int64. Raises IndexError for a slot out of range."""
        self._write(self._layers[layer], slots, k, v, self.block_size)
        self.copied.write_bytes += slots.shape[0] * self._token_bytes

    def wrote(self, num_tokens: int, num_layers: int) -> None:
        """Counts what a native program wrote itself: `num_tokens` in each of some layers."""
        self.copied.write_bytes += num_tokens * num_layers * self._token_bytes

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where the blocks of a layer begin; they hold K and V."""
        at = self._layers[layer].data_ptr()
        return at, at


def check_sizes(name: str, group: CacheGroup, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
    """Raises ConfigError on sizes that pages of codes cannot have."""
    if num_blocks < 1 or block_size < 1 or block_size % 4 or num_host_blocks < 0:
        raise ConfigError(
            f"kv {name}: got {num_blocks} blocks of {block_size} tokens and {num_host_blocks} in host memory; "
            "there must be at least 1, of a multiple of 4 tokens"
        )
    if group.head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"kv {name}: heads of {group.head_dim}, at most {MAX_HEAD_DIM} can be stored")
