"""Writing new keys and values into pages.

Shapes: N blocks, K kv heads, D head dimension, B block size, T new tokens.
"""

from __future__ import annotations

import torch

from millstream.ops.table import op


@op
def kv_write(
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Stores k, v (T, K, D) at `slots` (T,) int64 of k_pages (N, K, D, B) and v_pages (N, K, B, D), in place.

    A negative slot is passed over. Raises IndexError when a slot lies beyond the pages.
    """
    size = v_pages.shape[2]
    slots, k, v = _kept(v_pages, slots, k, v, size)
    block, offset = slots // size, slots % size
    k_pages[block, :, :, offset] = k.to(k_pages.dtype)
    v_pages[block, :, offset] = v.to(v_pages.dtype)


@op
def kv_write8(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> None:
    """Stores k, v (T, K, D) at `slots` (T,) int64 of pages (N, K, bytes of a head) uint8, in place, in 8 bits.

    `formats/kv/int8/device.py` has the layout. A negative slot is passed over. Raises IndexError when a slot lies
    beyond the pages.
    """
    slots, k, v = _kept(pages, slots, k, v, block_size)
    width, size = -(-k.shape[-1] // 16) * 16, block_size
    block, offset, heads = slots // size, slots % size, pages.shape[1]
    keys, key_scale = _bytes(k, width)
    values, value_scale = _bytes(v, width)
    d = torch.arange(width)
    at = (d // 4 * size + offset[:, None]) * 4 + d % 4
    _put(pages, block, at, (keys.to(torch.int16) + 128).to(torch.uint8))
    _put(
        pages,
        block,
        size * width + (offset[:, None] // 4 * width + d) * 4 + offset[:, None] % 4,
        values.view(torch.uint8),
    )
    for place, scale in enumerate((key_scale, value_scale)):
        at = 2 * size * width + (place * size + offset[:, None]) * 4 + torch.arange(4)
        _put(pages, block, at, scale.contiguous().view(torch.uint8).view(-1, heads, 4))


@op
def kv_write4(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> None:
    """Stores k, v (T, K, D) at `slots` (T,) int64 of pages (N, K, bytes of a head) uint8, in place, in 4 bits.

    `formats/kv/int4/device.py` has the layout. A negative slot is passed over. Raises IndexError when a slot lies
    beyond the pages.
    """
    slots, k, v = _kept(pages, slots, k, v, block_size)
    width, size = -(-k.shape[-1] // 32) * 32, block_size
    block, offset, heads = slots // size, slots % size, pages.shape[1]
    keys, *of_keys = quantize4(k)
    values, *of_values = quantize4(v)
    keys = torch.nn.functional.pad(keys, (0, width - k.shape[-1])).view(-1, heads, width // 8, 2, 4)
    values = torch.nn.functional.pad(values, (0, width - v.shape[-1])).view(-1, heads, width // 32, 2, 16)
    b = torch.arange(width // 2)
    at = (b // 4 * size + offset[:, None]) * 4 + b % 4
    _put(pages, block, at, (keys[..., 0, :] | keys[..., 1, :] << 4).flatten(2))
    at = size * width // 2 + (offset[:, None] // 4 * (width // 2) + b) * 4 + offset[:, None] % 4
    _put(pages, block, at, (values[..., 0, :] | values[..., 1, :] << 4).flatten(2))
    for place, half in enumerate((*of_keys, *of_values)):
        at = size * width + (place * size + offset[:, None]) * 2 + torch.arange(2)
        _put(pages, block, at, half.contiguous().view(torch.uint8).view(-1, heads, 2))


def quantize4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, K, D) -> codes 0 to 15 (T, K, D) uint8, scale and zero (T, K) float16: x is about scale * code + zero.

    The codes are chosen for the scale and the zero that are stored: what rounding these cost is made up for.
    """
    x = x.float()
    low, high = torch.aminmax(x, dim=-1) if x.numel() else (x.new_zeros(x.shape[:2]),) * 2
    largest = torch.finfo(torch.float16).max
    zero = low.clamp(-largest, largest).to(torch.float16)
    scale = ((high - zero.float()).clamp(min=0.0) / 15.0).clamp(max=largest).to(torch.float16)
    step = scale.float()
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    codes = torch.round(((x - zero.float()[..., None]) * inverse[..., None]).clamp(0.0, 15.0))
    return codes.to(torch.uint8), scale, zero


def _kept(
    pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is to be written, without the slots that are passed over. Raises IndexError for one beyond the pages."""
    kept = slots >= 0
    if not bool(kept.all()):
        slots, k, v = slots[kept], k[kept], v[kept]
    if slots.numel() and int(slots.max()) >= pages.shape[0] * block_size:
        raise IndexError(f"slot {int(slots.max())} is beyond {pages.shape[0]} blocks of {block_size}")
    return slots, k, v


def _bytes(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K, D) -> int8 (T, K, width), scale (T, K) float32."""
    x = x.float()
    most = x.abs().amax(-1) if x.numel() else x.new_zeros(x.shape[:2])
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    whole = torch.round(x * inverse[..., None]).to(torch.int8)
    return torch.nn.functional.pad(whole, (0, width - x.shape[-1])), most / 127.0


def _put(pages: torch.Tensor, block: torch.Tensor, at: torch.Tensor, data: torch.Tensor) -> None:
    """data (T, K, n) to the bytes `at` (T, n) of every head of `block` (T,)."""
    heads = torch.arange(pages.shape[1])
    pages[block[:, None, None], heads[None, :, None], at[:, None, :]] = data
