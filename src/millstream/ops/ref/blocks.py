"""Matrices of 4- or 8-bit codes with a scale and a minimum for every 32 inputs, times activations of 8 bits.

    w[o, i] = d[o, g] * u[o, i] + m[o, g]         u unsigned, g = i // 32, d and m in half precision
    x[t, i] ~ s[t, g] * q[t, i]                   q signed, s = largest of the run / 127

so that y[t, o] = sum over g of s * (d * dot(u, q) + m * sum(q)), with dot products that integers hold exactly.
GGUF's Q4_0, Q4_1 and Q8_0 are of this form as they are stored; Q4_K is once its two scales are multiplied.

Shapes: O outputs, I inputs, G = ceil(I / 32) runs, T tokens. A matrix is one stream of bytes in the order in which
`ops/cpu/int8.h` reads it: (pairs of 16 outputs, runs, bytes of a run), padded to 32 outputs and inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.ops.table import op

RUN, PANEL, WIDE = 32, 16, 2


def run_bytes(bits: int) -> int:
    """Bytes of one run of WIDE panels: their codes, then d and m of each."""
    return WIDE * PANEL * RUN * bits // 8 + WIDE * 2 * PANEL * 2


def stream_shape(outputs: int, inputs: int, bits: int) -> tuple[int, int, int]:
    """(pairs of panels, runs, bytes of a run)."""
    return -(-outputs // (WIDE * PANEL)), -(-inputs // RUN), run_bytes(bits)


def pack_stream(codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (O, G, 32) uint8, d and m (O, G) -> uint8 (pairs, G, run_bytes). d and m are rounded to half precision."""
    outputs, runs, _ = codes.shape
    pairs = -(-outputs // (WIDE * PANEL))
    missing = pairs * WIDE * PANEL - outputs
    if missing:
        codes, d, m = (F.pad(t, (*(0, 0) * (t.ndim - 1), 0, missing)) for t in (codes, d, m))
    # (pairs, panel, output, run, step, 4 inputs) -> the order in which they are multiplied.
    ordered = codes.view(pairs, WIDE, PANEL, runs, RUN // 4, 4).permute(0, 3, 1, 4, 2, 5)
    if bits == 4:
        ordered = ordered[:, :, :, 0::2] | (ordered[:, :, :, 1::2] << 4)
    halves = torch.stack((d, m), -1).to(torch.float16).view(pairs, WIDE, PANEL, runs, 2).permute(0, 3, 1, 4, 2)
    return torch.cat(
        (ordered.reshape(pairs, runs, -1), halves.contiguous().view(torch.uint8).reshape(pairs, runs, -1)), -1
    ).contiguous()


def unpack_stream(stream: torch.Tensor, outputs: int, inputs: int, bits: int) -> tuple[torch.Tensor, ...]:
    """The inverse of `pack_stream`: codes (O, G, 32) uint8, d and m (O, G) float32."""
    pairs, runs, _ = stream.shape
    size = WIDE * PANEL * RUN * bits // 8
    packed = stream[:, :, :size]
    if bits == 4:
        packed = packed.reshape(pairs, runs, WIDE, RUN // 8, 1, PANEL * 4)
        packed = torch.cat((packed & 15, packed >> 4), 4)
    codes = packed.reshape(pairs, runs, WIDE, RUN // 4, PANEL, 4).permute(0, 2, 4, 1, 3, 5)
    halves = stream[:, :, size:].contiguous().view(torch.float16).float().view(pairs, runs, WIDE, 2, PANEL)
    d, m = halves.permute(3, 0, 2, 4, 1).reshape(2, pairs * WIDE * PANEL, runs)
    return codes.reshape(-1, runs, RUN)[:outputs], d[:outputs], m[:outputs]


def weights_of(stream: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """The matrix (O, I) float32 that a stream stands for."""
    codes, d, m = unpack_stream(stream, outputs, inputs, bits)
    return (codes.float() * d[..., None] + m[..., None]).reshape(outputs, -1)[:, :inputs]


def rows_of(stream: torch.Tensor, rows: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """Some rows (N,) of that matrix, (N, I) float32."""
    # Only the pairs of panels that hold them are unpacked.
    pairs, place = torch.unique(rows // (WIDE * PANEL), return_inverse=True)
    held = weights_of(stream[pairs], len(pairs) * WIDE * PANEL, inputs, bits)
    return held[place * WIDE * PANEL + rows % (WIDE * PANEL)]


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, I) float32 -> q (T, G, 32) of integers from -127 to 127 as float32, s (T, G)."""
    tokens, inputs = x.shape
    runs = F.pad(x, (0, -inputs % RUN)).view(tokens, -(-inputs // RUN), RUN)
    most = runs.abs().amax(-1)
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    return torch.round(runs * inverse[..., None]), most / 127.0


@op
def linear_blocks(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (T, I) float32 times the matrix of a stream transposed, plus bias (O,) -> (T, O) float32.

    The activations are rounded to 8 bits, in runs of 32.
    """
    q, s = quantize(x)
    rounded = (q * s[..., None]).flatten(1)[:, : x.shape[1]]
    return F.linear(rounded, weights_of(stream, outputs, x.shape[1], bits), bias)
