"""What a layer does to its rows beside products and attention, natively: each in one pass and one call.

Torch makes an RMS norm of six ops and a rotation of nine, and a decode step of a small model has three such in each
layer, of rows so few that the number of calls is what they cost.

Shapes: T tokens, H heads, D head dimension, R rotated dimensions, C width, I inner width.
"""

from __future__ import annotations

import ctypes

import torch

from millstream.ops.cpu import build
from millstream.ops.ref.mlp import silu_mul
from millstream.ops.ref.norm import rms_norm
from millstream.ops.ref.rope import apply_rope
from millstream.ops.table import Ask, Refusal


class NormArgs(ctypes.Structure):
    """Mirrors MillstreamNormRows in elementwise.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "y", "parallel")]
        + [
            (name, ctypes.c_int64)
            for name in ("outer", "inner", "width", "outer_stride", "inner_stride", "num_threads")
        ]
        + [(name, ctypes.c_float) for name in ("eps", "offset")]
    )


class TurnArgs(ctypes.Structure):
    """Mirrors MillstreamTurn in elementwise.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "cos", "sin", "y", "parallel")] + [
        (name, ctypes.c_int64)
        for name in ("tokens", "heads", "dim", "half", "token_stride", "head_stride", "num_threads")
    ]


class GateArgs(ctypes.Structure):
    """Mirrors MillstreamGate in elementwise.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("gate", "up", "y", "parallel")] + [
        (name, ctypes.c_int64) for name in ("rows", "width", "gate_stride", "up_stride", "num_threads")
    ]


_STRUCTS = (NormArgs, TurnArgs, GateArgs)


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    if ask.dtype != torch.float32:
        return Refusal(f"tensors of {ask.dtype}")
    try:
        library = build.library("elementwise")
    except build.KernelError as error:
        return Refusal(str(error))
    library.millstream_elementwise_abi.restype = ctypes.c_int64
    for which, struct in enumerate(_STRUCTS):
        if library.millstream_elementwise_abi(which) != ctypes.sizeof(struct):
            return Refusal(f"the compiler lays {struct.__name__} out differently")
    return None


@rms_norm.implement("cpu", accepts=_accepts)
def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The op `rms_norm` in float32: x (..., C), weight (C,). Raises ValueError for what does not fit together."""
    width = x.shape[-1]
    if weight.shape != (width,) or x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} of {x.dtype}, weight {tuple(weight.shape)} of {weight.dtype}")
    weight, y = weight.contiguous(), torch.empty(x.shape, dtype=torch.float32)
    if x.ndim > 3 or x.stride(-1) != 1:
        x = x.reshape(-1, width).contiguous()
    wide = x if x.ndim == 3 else x.reshape(-1, 1, width)
    outer, inner = wide.shape[:2]
    args = NormArgs(
        wide.data_ptr(), weight.data_ptr(), y.data_ptr(), build.team(),
        outer, inner, width, wide.stride(0), wide.stride(1), torch.get_num_threads(), eps, offset,
    )  # fmt: skip
    build.library("elementwise").millstream_norm_rows(ctypes.byref(args))
    return y


@apply_rope.implement("cpu", accepts=_accepts)
def apply_rope_cpu(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The op `apply_rope` in float32: x (T, H, D), cos and sin (T, R / 2). Raises ValueError as above."""
    tokens, heads, dim = x.shape
    half = cos.shape[-1]
    if cos.shape != (tokens, half) or sin.shape != cos.shape or 2 * half > dim or x.dtype != torch.float32:
        raise ValueError(f"apply_rope: x {tuple(x.shape)} of {x.dtype}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    y = torch.empty((tokens, heads, dim), dtype=torch.float32)
    args = TurnArgs(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), build.team(),
        tokens, heads, dim, half, x.stride(0), x.stride(1), torch.get_num_threads(),
    )  # fmt: skip
    build.library("elementwise").millstream_turn(ctypes.byref(args))
    return y


@silu_mul.implement("cpu", accepts=_accepts)
def silu_mul_cpu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op `silu_mul` in float32: gate and up (T, I). Raises ValueError as above."""
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != torch.float32 or up.dtype != torch.float32:
        raise ValueError(f"silu_mul: gate {tuple(gate.shape)} of {gate.dtype}, up {tuple(up.shape)} of {up.dtype}")
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    up = up if up.stride(1) == 1 else up.contiguous()
    rows, width = gate.shape
    y = torch.empty((rows, width), dtype=torch.float32)
    args = GateArgs(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), build.team(),
        rows, width, gate.stride(0), up.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    build.library("elementwise").millstream_gate(ctypes.byref(args))
    return y
