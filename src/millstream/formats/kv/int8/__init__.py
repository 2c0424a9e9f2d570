"""Keys and values in 8 bits, with a scale for each token and head."""

from __future__ import annotations

from millstream.core.registry import Card

CARD = Card(
    name="int8",
    summary="Keys and values in 8 bits, a scale for each token and head; attention multiplies the bytes.",
    lossless=False,
    error="each value is off by at most 1/254 of the largest of its token and head",
)


def head_bytes(head_dim: int, block_size: int) -> int:
    """Bytes of one kv head in one block: K and V of `head_dim` rounded up to 16, and two float32 scales a token."""
    return block_size * (2 * (-(-head_dim // 16) * 16) + 8)
