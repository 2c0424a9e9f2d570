"""Tokens drawn natively: the rows of a step at once, over the whole vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from millstream.ops.cpu import build
from millstream.ops.ref.random import bits_before
from millstream.ops.ref.sampling import Draw, sample_tokens
from millstream.ops.table import Ask, Refusal


class SamplingAsk(ctypes.Structure):
    """Mirrors MillstreamAsk in sampling.cpp."""

    _fields_ = [
        ("state", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


class SamplingArgs(ctypes.Structure):
    """Mirrors MillstreamSampling in sampling.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("logits", "asks", "tokens", "parallel")] + [
        (name, ctypes.c_int64) for name in ("stride", "vocabulary", "num_asks", "num_threads")
    ]


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"logits on {ask.device}")
    if ask.dtype != torch.float32:
        return Refusal(f"logits of {ask.dtype}")
    try:
        library = build.library("sampling")
    except build.KernelError as error:
        return Refusal(str(error))
    library.millstream_sampling_abi.restype = ctypes.c_int64
    library.millstream_sample.restype = None
    sizes = [library.millstream_sampling_abi(which) for which in (0, 1)]
    if sizes != [ctypes.sizeof(SamplingAsk), ctypes.sizeof(SamplingArgs)]:
        return Refusal("the compiler lays the kernel's arguments out differently")
    return None


@sample_tokens.implement("cpu", accepts=_accepts)
def sample_tokens_cpu(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """See `ops.ref.sampling.sample_tokens`. Raises IndexError for a row that is not there."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    for draw in draws:
        if not 0 <= draw.row < logits.shape[0]:
            raise IndexError(f"row {draw.row} of {logits.shape[0]}")
    rows: Any = (
        (
            bits_before(draw.seed, draw.index, draw.position),
            draw.temperature, draw.top_p, draw.min_p, draw.top_k, draw.row,
        )
        for draw in draws
    )  # fmt: skip
    asks = (SamplingAsk * len(draws))(*rows)
    tokens = (ctypes.c_int64 * len(draws))()
    args = SamplingArgs(
        logits.data_ptr(), ctypes.addressof(asks), ctypes.addressof(tokens), build.team(),
        logits.stride(0), logits.shape[1], len(draws), torch.get_num_threads(),
    )  # fmt: skip
    build.library("sampling").millstream_sample(ctypes.byref(args))
    return list(tokens)
