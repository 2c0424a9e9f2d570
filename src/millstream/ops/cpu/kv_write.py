"""The native write of keys and values into pages."""

from __future__ import annotations

import ctypes

import torch

from millstream.ops.cpu import build
from millstream.ops.ref.kv import kv_write
from millstream.ops.table import Ask, Refusal

_POINTERS = ("k_pages", "v_pages", "slots", "k", "v", "parallel")
_SIZES = (
    *("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"),
    *("num_tokens", "num_blocks", "block_size", "kv_heads", "dim", "num_threads", "page_bits"),
)


class WriteArgs(ctypes.Structure):
    """Mirrors MillstreamWrite in paged_attention.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _SIZES]


def accepts(ask: Ask) -> Refusal | None:
    """Pages in CPU memory, float32 or bfloat16."""
    if ask.device != "cpu":
        return Refusal(f"pages on {ask.device}, the kernel works in CPU memory")
    if ask.dtype not in (torch.float32, torch.bfloat16):
        return Refusal(f"pages of {ask.dtype}, the kernel takes float32 and bfloat16")
    try:
        build.library("paged_attention")
    except build.KernelError as error:
        return Refusal(str(error))
    return None


@kv_write.implement("cpu", accepts=accepts)
def kv_write_cpu(
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """See `ops.ref.kv.kv_write`. Nothing is written when a slot is out of range."""
    if k.dtype != torch.float32 or k.stride(-1) != 1:
        k = k.float().contiguous()
    if v.dtype != torch.float32 or v.stride(-1) != 1:
        v = v.float().contiguous()
    slots = slots.contiguous()
    blocks, heads, dim, size = k_pages.shape
    if k.shape != (slots.shape[0], heads, dim) or v.shape != k.shape or slots.dtype != torch.int64:
        raise ValueError(
            f"kv_write: k {tuple(k.shape)}, v {tuple(v.shape)}, {slots.shape[0]} slots for {heads} x {dim}"
        )
    args = WriteArgs(
        k_pages.data_ptr(), v_pages.data_ptr(), slots.data_ptr(), k.data_ptr(), v.data_ptr(), build.team(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        slots.shape[0], blocks, size, heads, dim, torch.get_num_threads(), k_pages.element_size() * 8,
    )  # fmt: skip
    if build.library("paged_attention").millstream_kv_write(ctypes.byref(args)):
        raise IndexError(f"slot {int(slots.max())} is beyond {blocks} blocks of {size}")
