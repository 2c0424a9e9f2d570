"""Keys and values in 4 bits, with a scale and a zero for each token and head, inside the page (QServe).

Codes are asymmetric and made when a token is written: nothing is calibrated, nothing is stored elsewhere. Attention
unpacks them in registers. Keys often have a few channels that are much larger than the others; what these cost here is
what SmoothAttention, a transform of the weights, takes away again.
"""

from __future__ import annotations

from millstream.core.registry import Card

CARD = Card(
    name="int4",
    summary="Keys and values in 4 bits, a scale and a zero for each token and head; unpacked in registers.",
    paper=27,
    lossless=False,
    error="each value is off by 1/30 of the range of its token and head: perplexity +11 % on SmolLM2-135M, six-fold on "
    "Gemma 3 270M, all of it from keys, which SmoothAttention is for",
)


def head_bytes(head_dim: int, block_size: int) -> int:
    """Bytes of one kv head in one block: K and V of `head_dim` rounded up to 32, a float16 scale and zero for each."""
    return block_size * (-(-head_dim // 32) * 32 + 8)
