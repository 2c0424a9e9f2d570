"""Stored GGUF blocks to float tensors, in torch, bit for bit what the reference decoder gives.

A block is a run of 32 (or, for the K types, 256) values of one row with their scales in half precision:

    Q4_0 Q5_0 Q8_0   x = d * (q - centre)
    Q4_1 Q5_1        x = d * q + m
    Q4_K Q5_K        eight groups of 32:   x = (d * scale) * q - (dmin * min), scale and min of 6 bits
    Q6_K             sixteen groups of 16: x = (d * scale) * (q - 32), scale of 8 bits

The products are rounded in this order. Layouts: the ggml project.

Shapes: n blocks in a chunk, g groups of a block, w values of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from millstream.core.errors import BadFile, Unsupported
from millstream.models.gguf import BLOCKS

# Values of one chunk. It bounds the memory used beside the result, and it is the size up to which torch works in one
# thread. Larger chunks win on two idle cores (2^20: 0.12 s for SmolLM2) and lose on busy ones: each of the dozen
# calls of a chunk waits for a thread: at a load of 8, 2^16 to 2^20 took 7 to 44 s, this 2 to 3 s.
CHUNK_VALUES = 1 << 15

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
_LOW_BITS = 0x0101010101010101
_LOW_PAIRS = 0x0303030303030303


def dequantize(
    raw: Any, type_name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, name: str = "tensor"
) -> Tensor:
    """A new tensor of `shape` and `dtype` from the stored bytes of one GGUF tensor.

    `raw` is any writable buffer of bytes, or a uint8 tensor. The arithmetic is in float32, rounded once to `dtype`.
    Raises Unsupported for a type that cannot be read, BadFile when the bytes do not match the shape.
    """
    data = raw if isinstance(raw, Tensor) else torch.frombuffer(raw, dtype=torch.uint8)
    data = data.reshape(-1)
    if type_name not in PLAIN and type_name not in _DECODE:
        known = ", ".join([*PLAIN, *_DECODE])
        raise Unsupported(f"{name} is stored as {type_name}; the types that can be read are {known}")
    values, block_bytes = BLOCKS[type_name]
    num_values = 1
    for d in shape:
        num_values *= d
    if num_values % values or data.numel() != num_values // values * block_bytes:
        raise BadFile(name, f"{data.numel()} bytes of {type_name} do not hold the shape {list(shape)}")
    if type_name in PLAIN:
        return _plain(data, PLAIN[type_name]).to(dtype, copy=True).reshape(tuple(shape))
    num_blocks = num_values // values
    blocks = data.reshape(num_blocks, block_bytes)
    out = torch.empty(num_blocks, values, dtype=dtype)
    decode = _DECODE[type_name]
    step = max(1, CHUNK_VALUES // values)
    scratch = None if dtype == torch.float32 else torch.empty(min(step, num_blocks), values)
    for first in range(0, num_blocks, step):
        part = out[first : first + step]
        if scratch is None:
            decode(blocks[first : first + step], part)
        else:
            wide = scratch[: len(part)]
            decode(blocks[first : first + step], wide)
            part.copy_(wide)
    return out.reshape(tuple(shape))


def coded(raw: Tensor, type_name: str, shape: Sequence[int]) -> tuple[int, Tensor, Tensor, Tensor] | None:
    """A stored matrix (O, I) as bits (4 or 8), codes (O, G, 32) uint8, and d and m (O, G): a value is d * code + m.

    Exactly what is stored, but that d and m of Q4_K and Q5_K are products, which whoever keeps them may have to round.
    None for types that are not of this form.
    """
    found = _CODED.get(type_name)
    if found is None or len(shape) != 2:
        return None
    bits, decode = found
    codes, d, m = decode(raw.reshape(-1, BLOCKS[type_name][1]))
    outputs = shape[0]
    return bits, codes.reshape(outputs, -1, 32), d.reshape(outputs, -1), m.reshape(outputs, -1)


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _plain(data: Tensor, stored: torch.dtype) -> Tensor:
    if data.data_ptr() % stored.itemsize:
        data = data.clone()
    return data.view(stored)


def _compact(part: Tensor) -> Tensor:
    """A copy without gaps, at an address that wider types can be read from (`contiguous` leaves a lone row alone)."""
    return part.clone(memory_format=torch.contiguous_format)


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at byte `at` of each block, as float32 [n, 1]."""
    return _compact(blocks[:, at : at + 2]).view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, g, w] bytes -> [n, g, 2, w]: the low halves of a group, then its high halves."""
    n, g, w = packed.shape
    # Eight bytes at a time: torch's shifts on bytes are several times slower than on words.
    words = _compact(packed).view(torch.int64)
    out = torch.empty(n, g, 2, w // 8, dtype=torch.int64)
    torch.bitwise_and(words, _LOW_NIBBLES, out=out[:, :, 0])
    torch.bitwise_and(words >> 4, _LOW_NIBBLES, out=out[:, :, 1])
    return out.view(torch.uint8)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 high bits at bytes `at`..`at + 3` of each block as bytes 0 or 16, [n, 32]."""
    return _BITS_OF_BYTE[blocks[:, at : at + 4].int()].view(torch.uint8).view(len(blocks), 32)


# Byte -> its eight bits, lowest first, each as a byte 0 or 16, all eight in one word.
_BITS_OF_BYTE = (
    ((torch.arange(256)[:, None] >> torch.arange(8) & 1) << 4).to(torch.uint8).view(torch.int64).reshape(256)
)


def _scaled(out: Tensor, q: Tensor, d: Tensor) -> None:
    out.copy_(q)
    out.mul_(d)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, None, 2:]).view(out.shape)
    out.copy_(q)
    out.sub_(8.0).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _scaled(out, _nibbles(blocks[:, None, 4:]).view(out.shape), _halves(blocks, 0))
    out.add_(_halves(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, None, 6:]).view(out.shape)
    out.copy_(q.bitwise_or_(_fifth_bits(blocks, 2)))
    out.sub_(16.0).mul_(_halves(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, None, 8:]).view(out.shape)
    _scaled(out, q.bitwise_or_(_fifth_bits(blocks, 4)), _halves(blocks, 0))
    out.add_(_halves(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    _scaled(out, blocks[:, 2:].view(torch.int8), _halves(blocks, 0))


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of a Q4_K or Q5_K block, float32 [n, 8, 1], times d and dmin."""
    a, b, c = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scale = torch.cat([a & 0x3F, (c & 0x0F) | (a >> 2 & 0x30)], 1)
    minimum = torch.cat([b & 0x3F, (c >> 4) | (b >> 2 & 0x30)], 1)
    return (_halves(blocks, 0) * scale)[..., None], (_halves(blocks, 2) * minimum)[..., None]


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    groups = out.view(-1, 8, 32)
    scale, minimum = _six_bit_scales(blocks)
    _scaled(groups, _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(groups.shape), scale)
    groups.sub_(minimum)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    groups = out.view(-1, 8, 32)
    scale, minimum = _six_bit_scales(blocks)
    q = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(groups.shape)
    high = _compact(blocks[:, 16:48]).view(torch.int64)
    q = q.view(torch.int64)
    for group in range(8):
        q[:, group] |= (high >> group & _LOW_BITS) << 4
    _scaled(groups, q.view(torch.uint8), scale)
    groups.sub_(minimum)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    groups = out.view(-1, 16, 16)
    # Half a block is 64 low bytes: their low halves are values 0..63, their high halves 64..127.
    q = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32).view(torch.int64)
    high = _compact(blocks[:, 128:192]).view(torch.int64).view(-1, 2, 4)
    for quarter in range(4):
        q[:, :, quarter] |= (high >> (2 * quarter) & _LOW_PAIRS) << 4
    scale = _halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    groups.copy_(q.view(torch.uint8).view(groups.shape))
    groups.sub_(32.0).mul_(scale[..., None])


_DECODE: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _coded_4(at: int, centre: int | None) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def decode(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = _halves(blocks, 0)
        m = _halves(blocks, 2) if centre is None else d * -centre
        return _nibbles(blocks[:, None, at:]), d, m

    return decode


def _coded_5(at: int, centre: int | None) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def decode(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = _halves(blocks, 0)
        m = _halves(blocks, 2) if centre is None else d * -centre
        codes = _nibbles(blocks[:, None, at + 4 :]).view(-1, 32)
        return codes.bitwise_or_(_fifth_bits(blocks, at)), d, m

    return decode


def _coded_q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _halves(blocks, 0)
    return _compact(blocks[:, 2:]) ^ 128, d, d * -128.0


def _coded_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, minimum = _six_bit_scales(blocks)
    return _nibbles(blocks[:, 16:].view(-1, 4, 32)), scale, -minimum


def _coded_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, minimum = _six_bit_scales(blocks)
    codes = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    high = blocks[:, 16:48]
    for group in range(8):
        codes[:, group] |= (high >> group & 1) << 4
    return codes, scale, -minimum


_CODED: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]] = {
    "Q4_0": (4, _coded_4(2, 8)),
    "Q4_1": (4, _coded_4(4, None)),
    "Q5_0": (8, _coded_5(2, 16)),
    "Q5_1": (8, _coded_5(4, None)),
    "Q8_0": (8, _coded_q8_0),
    "Q4_K": (4, _coded_q4_k),
    "Q5_K": (8, _coded_q5_k),
}
