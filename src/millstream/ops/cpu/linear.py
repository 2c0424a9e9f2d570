"""The native product of float32 matrices: a row's result has the same bits whoever shares the batch.

Rows are taken together over a part of the matrix that stays in the cache, so a few of them cost little more than one:
there, reading the matrix is what takes the time. `linear.cpp` says how the sums are made; docs/log.md has the figures
beside torch's own product.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch

from millstream.ops.cpu import build
from millstream.ops.ref.linear import linear
from millstream.ops.table import Ask, Refusal

_POINTERS = ("x", "weight", "bias", "y", "parallel")
_SIZES = ("x_stride", "weight_stride", "y_stride", "rows", "inputs", "outputs", "num_threads")


class LinearArgs(ctypes.Structure):
    """Mirrors MillstreamLinear in linear.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _SIZES]


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    if ask.dtype != torch.float32:
        return Refusal(f"tensors of {ask.dtype}")
    try:
        library = build.library("linear")
    except build.KernelError as error:
        return Refusal(str(error))
    library.millstream_linear_abi.restype = ctypes.c_int64
    library.millstream_linear.restype = None
    if library.millstream_linear_abi() != ctypes.sizeof(LinearArgs):
        return Refusal("the compiler lays the kernel's arguments out differently")
    return None


@linear.implement("cpu", accepts=_accepts)
def linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The op `linear` in float32: x (T, I) times weight (O, I) transposed, plus bias (O,) -> (T, O)."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} times weight {tuple(weight.shape)} transposed")
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(f"linear: x of {x.dtype}, weight of {weight.dtype}; the kernel takes float32")
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, outputs = x.shape[0], weight.shape[0]
    if bias is not None:
        if bias.shape != (outputs,):
            raise ValueError(f"linear: a bias of {tuple(bias.shape)} for {outputs} outputs")
        bias = bias.float().contiguous()
    y = torch.empty((rows, outputs), dtype=torch.float32)
    args = LinearArgs(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), build.team(),
        x.stride(0), weight.stride(0), outputs, rows, x.shape[1], outputs, torch.get_num_threads(),
    )  # fmt: skip
    build.library("linear").millstream_linear(ctypes.byref(args))
    return y
