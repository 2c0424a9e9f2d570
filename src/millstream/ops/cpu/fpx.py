"""The native products with matrices of small floats: codes are looked up on the way, never written out as a matrix.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch

from millstream.ops.cpu import build
from millstream.ops.ref.fpx import PANEL, RUN, VECTORS, WIDE, embedding_fpx, linear_fpx, step_of, values_of
from millstream.ops.table import Ask, Refusal

# Up to so many rows codes are multiplied as they are looked up; beyond, a panel is expanded first. docs/log.md has the
# crossover.
DIRECT_ROWS = 3

_LINEAR_SIZES = ("x_stride", "y_stride", "rows", "inputs", "outputs", "high_bits", "num_threads", "direct_rows")


class FpxArgs(ctypes.Structure):
    """Mirrors MillstreamFpx in fpx.cpp."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("low", "high", "scale", "values", "x", "bias", "y", "scratch", "parallel")]
        + [(n, ctypes.c_int64) for n in _LINEAR_SIZES]
        + [("step", ctypes.c_float), ("unused", ctypes.c_int32)]
    )


class FpxRowsArgs(ctypes.Structure):
    """Mirrors MillstreamFpxRows."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("low", "high", "scale", "values", "which", "y")]
        + [(n, ctypes.c_int64) for n in ("rows", "inputs", "outputs", "high_bits")]
        + [("step", ctypes.c_float), ("unused", ctypes.c_int32)]
    )


_mine = threading.local()


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    try:
        library = build.library("fpx")
    except build.KernelError as error:
        return Refusal(str(error))
    library.millstream_fpx_abi.restype = library.millstream_fpx_scratch.restype = ctypes.c_int64
    library.millstream_fpx_scratch.argtypes = (ctypes.c_int64, ctypes.c_int64)
    library.millstream_fpx.restype = None
    for which, struct in enumerate((FpxArgs, FpxRowsArgs)):
        if library.millstream_fpx_abi(which) != ctypes.sizeof(struct):
            return Refusal(f"the compiler lays {struct.__name__} out differently")
    return None


def _accepts_floats(ask: Ask) -> Refusal | None:
    if ask.dtype != torch.float32:
        return Refusal(f"activations of {ask.dtype}")
    return _accepts(ask)


@functools.cache
def _steps(exponent: int, mantissa: int) -> torch.Tensor:
    """The values by code as whole numbers of steps, (64,) int16; with fewer codes they are there again."""
    values = (values_of(exponent, mantissa) / step_of(exponent, mantissa)).to(torch.int16)
    return values.repeat(64 // len(values)).contiguous()


def _checked(low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, inputs: int, bits: int) -> None:
    grid = (-(-scale.shape[0] // (PANEL * WIDE)), -(-inputs // RUN))
    wanted = (*grid, VECTORS // 2, WIDE, RUN), (*grid, VECTORS * (bits - 4) // 8, WIDE, RUN)
    if not 5 <= bits <= 6 or (tuple(low.shape), tuple(high.shape)) != wanted or scale.dtype != torch.float16:
        raise ValueError(
            f"codes of {tuple(low.shape)} and {tuple(high.shape)} with {scale.dtype} scales for "
            f"{scale.shape[0]} x {inputs} at {bits} bits"
        )
    if not (low.is_contiguous() and high.is_contiguous() and scale.is_contiguous()):
        raise ValueError("codes and scales must be contiguous")


@linear_fpx.implement("cpu", accepts=_accepts_floats)
def linear_fpx_cpu(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    exponent: int,
    mantissa: int,
    bias: torch.Tensor | None = None,
    direct_rows: int = DIRECT_ROWS,
) -> torch.Tensor:
    """See `ops.ref.fpx.linear_fpx`. `direct_rows` moves the crossover; it changes no bit of the result."""
    rows, inputs = x.shape
    outputs, bits = scale.shape[0], 1 + exponent + mantissa
    _checked(low, high, scale, inputs, bits)
    if x.dtype != torch.float32 or x.stride(1) != 1:
        x = x.float().contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    library = build.library("fpx")
    needed = library.millstream_fpx_scratch(rows, inputs)
    scratch: torch.Tensor | None = getattr(_mine, "scratch", None)
    if scratch is None or scratch.numel() < needed:
        scratch = _mine.scratch = torch.empty(needed + needed // 4, dtype=torch.uint8)
    y = torch.empty((rows, outputs), dtype=torch.float32)
    args = FpxArgs(
        low.data_ptr(), high.data_ptr(), scale.data_ptr(), _steps(exponent, mantissa).data_ptr(), x.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(), build.team(),
        x.stride(0), outputs, rows, inputs, outputs, bits - 4, torch.get_num_threads(), direct_rows,
        step_of(exponent, mantissa),
    )  # fmt: skip
    library.millstream_fpx(ctypes.byref(args))
    return y


@embedding_fpx.implement("cpu", accepts=_accepts)
def embedding_fpx_cpu(
    which: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    inputs: int,
    exponent: int,
    mantissa: int,
) -> torch.Tensor:
    """See `ops.ref.fpx.embedding_fpx`."""
    bits = 1 + exponent + mantissa
    _checked(low, high, scale, inputs, bits)
    which = which.to(torch.int64).contiguous()
    y = torch.empty((which.shape[0], inputs), dtype=torch.float32)
    args = FpxRowsArgs(
        low.data_ptr(), high.data_ptr(), scale.data_ptr(), _steps(exponent, mantissa).data_ptr(), which.data_ptr(),
        y.data_ptr(), which.shape[0], inputs, scale.shape[0], bits - 4, step_of(exponent, mantissa),
    )  # fmt: skip
    if build.library("fpx").millstream_fpx_rows(ctypes.byref(args)):
        raise IndexError(f"row {int(which.max())} of a matrix of {scale.shape[0]}")
    return y
