"""The native write of keys and values into pages of 8 and of 4 bits."""

from __future__ import annotations

import ctypes

import torch

from millstream.ops.cpu import program
from millstream.ops.ref.kv import kv_write4, kv_write8
from millstream.ops.table import Ask, Refusal


def accepts(ask: Ask) -> Refusal | None:
    """Pages in CPU memory."""
    if ask.device != "cpu":
        return Refusal(f"pages on {ask.device}, the kernel works in CPU memory")
    return program.refusal()


@kv_write8.implement("cpu", accepts=accepts)
def kv_write8_cpu(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> None:
    """See `ops.ref.kv.kv_write8`. Nothing is written when a slot is out of range."""
    _write(8, pages, slots, k, v, block_size)


@kv_write4.implement("cpu", accepts=accepts)
def kv_write4_cpu(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> None:
    """See `ops.ref.kv.kv_write4`. Nothing is written when a slot is out of range."""
    _write(4, pages, slots, k, v, block_size)


def _write(
    bits: int, pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int
) -> None:
    if k.dtype != torch.float32 or k.stride(-1) != 1:
        k = k.float().contiguous()
    if v.dtype != torch.float32 or v.stride(-1) != 1:
        v = v.float().contiguous()
    slots = slots.contiguous()
    blocks, heads, size = pages.shape
    dim = k.shape[-1]
    width = -(-dim // (128 // bits)) * (128 // bits)
    held = block_size * (2 * width * bits // 8 + 8)
    if k.shape != (slots.shape[0], heads, dim) or v.shape != k.shape or slots.dtype != torch.int64 or size != held:
        raise ValueError(
            f"kv_write{bits}: k {tuple(k.shape)}, v {tuple(v.shape)}, {slots.shape[0]} slots for {heads} heads"
        )
    args = program.WriteCodes(
        pages.data_ptr(), slots.data_ptr(), k.data_ptr(), v.data_ptr(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), slots.shape[0], blocks, block_size, heads, dim, bits,
    )  # fmt: skip
    if program.library().millstream_kv_write_codes(ctypes.byref(args)):
        raise IndexError(f"slot {int(slots.max())} is beyond {blocks} blocks of {block_size}")
