"""Matrices of 4- or 8-bit codes with one scale an output, times activations of 8 bits with one scale a token.

    w[o, i] = scale[o] * (u[o, i] - zero[o])       u an unsigned byte, zero a whole number
    x[t, i] ~ s[t] * q[t, i]                       q signed, s = largest of the row / 127

so that y[t, o] = float(dot(u, q) - zero * sum(q)) * scale * s: integers over the whole row, floats only behind it.
Three ways to store u (QServe, Lin et al., 2024, sections 4.1 and 5.2):

    8 bits            u = code, zero = 128: the symmetric int8 of `w8a8`
    4 bits, grouped   u = code * step + offset mod 256, both bytes of a group of inputs, zero = 128: the second level of
                      progressive quantization, offset = 128 - z * step. That no byte overflows is what the protective
                      range of the first level is for.
    4 bits, channel   u = code, zero from 0 to 15: the zero point meets the sum of the row behind the product

Shapes: O outputs, I inputs, G groups, T tokens. A matrix is one stream of bytes in the order in which
`ops/cpu/channel.h` reads it, (pairs of 16 outputs, bytes of a pair): for each group its steps and offsets, then run
after run of 32 inputs the codes; behind the last run scales in float32 (half precision has few digits left below 6e-5)
and, for 4 bits by channel, zeros. Padded to 32 outputs and inputs. How many groups there are follows from the bytes of
a pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from millstream.ops.table import op

RUN, PANEL, WIDE = 32, 16, 2
PAIR = PANEL * WIDE
# A pair's steps and offsets for one group; its scales; its zeros, half as many bytes, so that they look like no group.
HEADER, SCALES, ZEROS = 2 * PAIR, 4 * PAIR, PAIR
# Sums of products of bytes stay within 32 bits up to here.
MAX_INPUTS = 1 << 16


def pair_bytes(inputs: int, bits: int, groups: int) -> int:
    """Bytes of one pair of panels. `groups` 0: no second level."""
    runs = -(-inputs // RUN)
    return runs * PAIR * RUN * bits // 8 + groups * HEADER + SCALES + (ZEROS if bits == 4 and not groups else 0)


def groups_of(stream: torch.Tensor, inputs: int, bits: int) -> int | None:
    """How many groups a stream of that many inputs has; None where its width is none that such a stream has."""
    if bits == 8:
        return 0 if stream.shape[-1] == pair_bytes(inputs, 8, 0) else None
    if stream.shape[-1] == pair_bytes(inputs, 4, 0):
        return 0
    runs = -(-inputs // RUN)
    groups, rest = divmod(stream.shape[-1] - pair_bytes(inputs, 4, 1) + HEADER, HEADER)
    return groups if not rest and 0 < groups <= runs and runs % groups == 0 else None


def fits(stream: torch.Tensor, outputs: int, inputs: int, bits: int) -> bool:
    """Whether a stream is one of a matrix (O, I)."""
    return (
        stream.dtype == torch.uint8
        and stream.ndim == 2
        and stream.shape[0] == -(-outputs // PAIR)
        and inputs <= MAX_INPUTS
        and groups_of(stream, inputs, bits) is not None
    )


def pack_stream(
    codes: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    zero: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """codes (O, I) uint8, scale (O,), zero (O,) for 4 bits by channel, second: step and z (O, G) for 4 bits in groups.

    -> uint8 (pairs, pair_bytes).
    """
    outputs, inputs = codes.shape
    pairs, runs = -(-outputs // PAIR), -(-inputs // RUN)
    missing = pairs * PAIR - outputs
    codes = F.pad(codes, (0, runs * RUN - inputs, 0, missing))
    # (pairs, panel, output, run, step, 4 inputs) -> the order in which they are multiplied.
    ordered = codes.view(pairs, WIDE, PANEL, runs, RUN // 4, 4).permute(0, 3, 4, 1, 2, 5)
    if bits == 4:
        ordered = ordered[:, :, 0::2] | (ordered[:, :, 1::2] << 4)
    body = ordered.reshape(pairs, runs, -1)
    if second is not None:
        step, z = (F.pad(part.to(torch.int32), (0, 0, 0, missing)) for part in second)
        groups = step.shape[1]
        if runs % groups:
            raise ValueError(f"{runs} runs in {groups} groups")
        header = torch.stack((step, (128 - z * step) & 255)).to(torch.uint8)
        header = header.view(2, pairs, PAIR, groups).permute(1, 3, 0, 2).reshape(pairs, groups, HEADER)
        body = torch.cat((header, body.reshape(pairs, groups, -1)), -1)
    tail = F.pad(scale.float(), (0, missing)).contiguous().view(pairs, PAIR).view(torch.uint8)
    parts = [body.reshape(pairs, -1), tail]
    if bits == 4 and second is None:
        if zero is None:
            raise ValueError("4 bits by channel need a zero")
        parts.append(F.pad(zero.to(torch.uint8), (0, missing)).view(pairs, PAIR))
    return torch.cat(parts, -1).contiguous()


def unpack_stream(stream: torch.Tensor, outputs: int, inputs: int, bits: int) -> dict[str, torch.Tensor]:
    """The inverse: `codes` (O, I) uint8, `scale` (O,) float32, and `zero` (O,) or `step` and `z` (O, G), int32."""
    pairs, runs = stream.shape[0], -(-inputs // RUN)
    groups = groups_of(stream, inputs, bits)
    if groups is None:
        raise ValueError(f"a stream of {tuple(stream.shape)} for {outputs} x {inputs} at {bits} bits")
    tail = stream.shape[1] - SCALES - (ZEROS if bits == 4 and not groups else 0)
    body, found = stream[:, :tail], {}
    if groups:
        body = body.reshape(pairs, groups, -1)
        header = body[:, :, :HEADER].reshape(pairs, groups, 2, PAIR).permute(2, 0, 3, 1)
        step, offset = header.reshape(2, pairs * PAIR, groups)[:, :outputs].to(torch.int32)
        # The offset was kept mod 256; 128 - offset is a multiple of the step, from 0 to 255.
        z = torch.where(step > 0, ((128 - offset) & 255) // step.clamp(min=1), 0)
        found = {"step": step, "z": z.to(torch.int32)}
        body = body[:, :, HEADER:]
    packed = body.reshape(pairs, runs, -1, WIDE, PANEL, 4)
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), 3).flatten(2, 3)
    codes = packed.permute(0, 3, 4, 1, 2, 5).reshape(pairs * PAIR, runs * RUN)
    found["codes"] = codes[:outputs, :inputs]
    found["scale"] = stream[:, tail : tail + SCALES].contiguous().view(torch.float32).flatten()[:outputs]
    if bits == 4 and not groups:
        found["zero"] = stream[:, tail + SCALES : tail + SCALES + PAIR].flatten()[:outputs].to(torch.int32)
    return found


def bytes_of(
    stream: torch.Tensor, outputs: int, inputs: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is multiplied: u (O, I) uint8, zero (O,) int32, scale (O,) float32."""
    found = unpack_stream(stream, outputs, inputs, bits)
    codes = found["codes"]
    if "step" in found:
        groups = found["step"].shape[1]
        each = -(-inputs // RUN) // groups * RUN
        step = found["step"].repeat_interleave(each, 1)[:, :inputs]
        offset = (128 - found["z"] * found["step"]).repeat_interleave(each, 1)[:, :inputs]
        return ((codes.to(torch.int32) * step + offset) & 255).to(torch.uint8), _same(found, 128), found["scale"]
    return codes, found["zero"] if "zero" in found else _same(found, 128), found["scale"]


def _same(found: dict[str, torch.Tensor], zero: int) -> torch.Tensor:
    return torch.full(found["scale"].shape, zero, dtype=torch.int32)


def weights_of(stream: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """The matrix (O, I) float32 that a stream stands for."""
    u, zero, scale = bytes_of(stream, outputs, inputs, bits)
    return (u.to(torch.int32) - zero[:, None]).float() * scale[:, None]


def rows_of(stream: torch.Tensor, rows: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """Some rows (N,) of that matrix, (N, I) float32."""
    # Only the pairs of panels that hold them are unpacked.
    pairs, place = torch.unique(rows // PAIR, return_inverse=True)
    held = weights_of(stream[pairs], len(pairs) * PAIR, inputs, bits)
    return held[place * PAIR + rows % PAIR]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, I) float32 -> q (T, I) of integers from -127 to 127 as float32, s (T,). A row that is not finite: s NaN."""
    most = x.abs().amax(-1) if x.numel() else x.new_zeros(x.shape[0])
    inverse = torch.where(most > 1e-30, 127.0 / most, 0.0)
    finite = torch.isfinite(most)
    q = torch.where(finite[:, None], torch.round(x * inverse[:, None]), 0.0)
    return q, torch.where(finite, most / 127.0, torch.nan)


@op
def linear_channel(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (T, I) float32 times the matrix of a stream transposed, plus bias (O,) -> (T, O) float32.

    The activations are rounded to 8 bits, a row at a time. Implementations agree bit for bit.
    """
    q, s = quantize_rows(x)
    u, zero, scale = bytes_of(stream, outputs, x.shape[1], bits)
    # Whole numbers below 2^53: exact in whatever order they are summed.
    dot = q.double() @ (u.double() - zero[:, None].double()).T
    y = dot.float() * scale * s[:, None]
    return y if bias is None else y + bias
