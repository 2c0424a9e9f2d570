"""The arguments of `program.cpp`, mirrored: matrices, layers, a step, and the calls over them.

Addresses are those of tensors that the caller keeps alive. `Scratch` is memory that calls share, one call at a time.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch

from millstream.ops.cpu import build
from millstream.ops.table import Refusal

ACTIVATIONS = {"silu": 0, "gelu-tanh": 1, "gelu": 2}
# How a matrix lies in its stream: `ops/ref/blocks.py`, `ops/ref/channel.py`.
BLOCKS, CHANNEL = 0, 1
# By the layout of pages and the type of what they hold.
PAGES = {
    ("k-transposed", torch.float32): 0,
    ("k-transposed", torch.bfloat16): 1,
    ("int8-blocks", torch.uint8): 2,
    ("int4-blocks", torch.uint8): 3,
}


class Matrix(ctypes.Structure):
    _fields_ = [(n, c_void_p) for n in ("stream", "bias")] + [
        (n, c_int64) for n in ("inputs", "outputs", "bits", "kind", "groups")
    ]


class Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_float), ("unused", c_int32)]


class Group(ctypes.Structure):
    _fields_ = [(n, c_void_p) for n in ("block_tables", "slots")] + [
        (n, c_int64) for n in ("table_stride", "num_blocks", "block_size", "kind")
    ]


class Rope(ctypes.Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("half", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = (
        [(n, Norm) for n in ("mixer_norm", "mixer_post_norm", "channel_norm", "channel_post_norm", "q_norm", "k_norm")]
        + [(n, Matrix) for n in ("qkv", "out", "gate", "up", "down")]
        + [("k", c_void_p), ("v", c_void_p)]
        + [(n, c_int64) for n in ("group", "rope", "activation", "heads", "kv_heads", "dim", "inner", "window")]
        + [("scale", c_float), ("softcap", c_float)]
    )


class Step(ctypes.Structure):
    _fields_ = (
        [("layers", c_void_p), ("groups", c_void_p), ("ropes", c_void_p), ("embedding", Matrix)]
        + [(n, c_void_p) for n in ("tokens", "positions", "query_start", "seq_lens", "x", "scratch")]
        + [
            (n, c_int64)
            for n in (
                *("first_layer", "last_layer", "num_groups", "num_tokens", "num_rows", "width"),
                *("scratch_bytes", "num_threads"),
            )
        ]
        + [("embed_scale", c_float), ("levels", c_int32)]
    )


class Head(ctypes.Structure):
    _fields_ = (
        [("norm", Norm), ("matrix", Matrix)]
        + [(n, c_void_p) for n in ("x", "rows", "logits", "best", "most", "scratch")]
        + [(n, c_int64) for n in ("num_rows", "width", "scratch_bytes", "num_threads")]
        + [("softcap", c_float), ("unused", c_int32)]
    )


class Product(ctypes.Structure):
    _fields_ = (
        [("matrix", Matrix)]
        + [(n, c_void_p) for n in ("x", "y", "scratch")]
        + [(n, c_int64) for n in ("rows", "x_stride", "y_stride", "scratch_bytes", "num_threads")]
    )


class WriteCodes(ctypes.Structure):
    _fields_ = [(n, c_void_p) for n in ("pages", "slots", "k", "v")] + [
        (n, c_int64)
        for n in (
            *("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"),
            *("num_tokens", "num_blocks", "block_size", "kv_heads", "dim", "bits"),
        )
    ]


_STRUCTS = (Matrix, Norm, Group, Rope, Layer, Step, Head, Product, WriteCodes)


def library() -> ctypes.CDLL:
    """The compiled program. Raises KernelError."""
    return build.library("program")


@functools.cache
def _checked(found: ctypes.CDLL) -> str | None:
    found.millstream_program_abi.restype = c_int64
    for name in ("layers", "head", "product"):
        getattr(found, f"millstream_{name}_scratch").restype = c_int64
    for which, struct in enumerate(_STRUCTS):
        if found.millstream_program_abi(which) != ctypes.sizeof(struct):
            return f"the compiler lays {struct.__name__} out differently"
    return None


def refusal() -> Refusal | None:
    """Why there is no program on this machine."""
    try:
        wrong = _checked(library())
    except build.KernelError as error:
        return Refusal(str(error))
    return None if wrong is None else Refusal(wrong)


class Scratch:
    """Memory that grows to what a call asks for."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def call(self, name: str, args: Any) -> None:
        """Runs `millstream_<name>`. Raises IndexError when the pages or the embedding do not hold what it needs."""
        found = library()
        needed = getattr(found, f"millstream_{name}_scratch")(ctypes.byref(args))
        if needed + 64 > self._held.numel():
            self._held = torch.empty(needed + needed // 4 + 64, dtype=torch.uint8)
        # The arena deals in lines of the cache.
        start = -self._held.data_ptr() % 64
        args.scratch, args.scratch_bytes = self._held.data_ptr() + start, self._held.numel() - start
        failed = getattr(found, f"millstream_{name}")(ctypes.byref(args))
        if failed == -1:
            raise IndexError("a row needs a block that it does not hold, or has fewer tokens than queries")
        if failed == -3:
            raise IndexError("a token id is beyond the embedding")
        if failed:
            raise RuntimeError(f"millstream_{name} failed with {failed}")


def matrix(
    stream: torch.Tensor,
    outputs: int,
    inputs: int,
    bits: int,
    bias: torch.Tensor | None = None,
    kind: int = BLOCKS,
    groups: int = 0,
) -> Matrix:
    """Points at a stream. Bias float32."""
    return Matrix(stream.data_ptr(), None if bias is None else bias.data_ptr(), inputs, outputs, bits, kind, groups)
