"""Matrices of small floats: a sign, E bits of exponent, M of mantissa, no infinities, and a scale for each output.

A code of bits s e m stands for (-1)^s * 2^(e - bias) * (1 + m / 2^M), with bias = 2^(E - 1) - 1; for e = 0 it is
(-1)^s * 2^(1 - bias) * m / 2^M (FP6-LLM; six bits as e3m2 reach 28 in steps of at least 1 / 16).

The low four bits of all codes are in one region, what is above them in another, both in the order in which
`ops/cpu/fpx.cpp` reads them, padded to 32 outputs and 64 inputs.

Shapes: O outputs, I inputs, T tokens, P = ceil(O / 32) pairs of panels, G = ceil(I / 64) runs, H = 1 or 2 high bits.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from millstream.ops.table import op

PANEL, WIDE, RUN, VECTORS = 16, 2, 64, 16
LOW_BITS = 4


@functools.cache
def values_of(exponent: int, mantissa: int) -> torch.Tensor:
    """What each code stands for, (2^(1 + E + M),) float32, exactly."""
    code = torch.arange(1 << (1 + exponent + mantissa))
    e, m = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    fraction = m.double() / (1 << mantissa) + (e > 0)
    value = fraction * torch.exp2((e.clamp(min=1) - bias).double())
    return torch.where(code >> (exponent + mantissa) == 1, -value, value).float()


def step_of(exponent: int, mantissa: int) -> float:
    """The smallest value: all others are whole multiples of it."""
    return 2.0 ** (2 - (1 << (exponent - 1)) - mantissa)


def largest_of(exponent: int, mantissa: int) -> float:
    """The largest value."""
    return float(values_of(exponent, mantissa).max())


def encode(weight: torch.Tensor, exponent: int, mantissa: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (O, I) -> codes (O, I) uint8, scale (O,) float16: the nearest code, ties to the even one.

    The scale takes the largest value of a row to the largest of the format.
    """
    weight = weight.float()
    top = weight.abs().amax(-1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = (top / largest_of(exponent, mantissa)).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    by = scale.float()[:, None]
    size = torch.where(by > 0, weight.abs() / by, 0.0)
    positive = values_of(exponent, mantissa)[: 1 << (exponent + mantissa)]
    middles = (positive[1:] + positive[:-1]) / 2
    code = torch.bucketize(size, middles)
    tie = size == F.pad(middles, (0, 1), value=torch.inf)[code]
    code += (tie & (code % 2 == 1)).to(code.dtype)
    return (code | (weight < 0).to(code.dtype) << (exponent + mantissa)).to(torch.uint8), scale


def pack_codes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """codes (O, I) uint8 -> low (P, G, 8, 2, 64), high (P, G, 2 * H, 2, 64) uint8."""
    outputs, inputs = codes.shape
    wide = PANEL * WIDE
    codes = F.pad(codes, (0, -inputs % RUN, 0, -outputs % wide))
    pairs, runs, high = codes.shape[0] // wide, codes.shape[1] // RUN, bits - LOW_BITS
    # (pair, panel, four outputs, output, run, vector, two inputs, input) -> vectors as they are read.
    vectors = codes.view(pairs, WIDE, 4, 4, runs, VECTORS, 2, 2).permute(0, 4, 5, 1, 2, 6, 3, 7)
    vectors = vectors.reshape(pairs, runs, VECTORS, WIDE, RUN)
    low = vectors[:, :, 0::2] & 15 | (vectors[:, :, 1::2] & 15) << 4
    each = 8 // high
    upper = torch.zeros(pairs, runs, VECTORS // each, WIDE, RUN, dtype=torch.uint8)
    for place in range(each):
        upper |= (vectors[:, :, place::each] >> LOW_BITS) << (place * high)
    return low.contiguous(), upper


def unpack_codes(low: torch.Tensor, high: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The inverse of `pack_codes`: codes (O, I) uint8."""
    pairs, runs = low.shape[:2]
    bits = high.shape[2] * 8 // VECTORS
    upper = torch.stack([high >> (place * bits) & ((1 << bits) - 1) for place in range(8 // bits)], 3)
    vectors = torch.stack((low & 15, low >> 4), 3).flatten(2, 3) | upper.flatten(2, 3) << LOW_BITS
    shape = (pairs, runs, VECTORS, WIDE, 4, 2, 4, 2)
    codes = vectors.view(shape).permute(0, 3, 4, 6, 1, 2, 5, 7).reshape(pairs * WIDE * PANEL, runs * RUN)
    return codes[:outputs, :inputs]


def weights_of(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, inputs: int, exponent: int, mantissa: int
) -> torch.Tensor:
    """The matrix (O, I) float32 that codes and scale (O,) float16 stand for."""
    codes = unpack_codes(low, high, scale.shape[0], inputs)
    return values_of(exponent, mantissa)[codes.int()] * scale.float()[:, None]


@op
def linear_fpx(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    exponent: int,
    mantissa: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (T, I) times the matrix transposed, plus bias (O,) -> (T, O) float32."""
    return F.linear(x.float(), weights_of(low, high, scale, x.shape[1], exponent, mantissa), bias)


@op
def embedding_fpx(
    which: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    inputs: int,
    exponent: int,
    mantissa: int,
) -> torch.Tensor:
    """Rows `which` (T,) int64 of the matrix -> (T, I) float32. Raises IndexError for one beyond it."""
    if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < scale.shape[0]:
        raise IndexError(f"row {int(which.max())} of a matrix of {scale.shape[0]}")
    # Only the pairs of panels that hold them are unpacked.
    wide = PANEL * WIDE
    pairs, place = torch.unique(which // wide, return_inverse=True)
    codes = unpack_codes(low[pairs], high[pairs], len(pairs) * wide, inputs)[place * wide + which % wide]
    return values_of(exponent, mantissa)[codes.int()] * scale[which].float()[:, None]
