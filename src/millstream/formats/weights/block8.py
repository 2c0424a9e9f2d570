"""Codes of 8 bits with a scale and a minimum for every 32 inputs: 9 bits a weight. Inputs are rounded to 8 bits.

GGUF's Q8_0, Q5_0 and Q5_1 fit in as they are stored; other types are rounded to it.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.formats.weights._blocks import Blocks

CARD = Card(
    "block8",
    "8-bit codes, scale and minimum for every 32 inputs; products with 8-bit inputs in integers.",
    lossless=False,
    error="inputs are rounded to 8 bits in runs of 32: perplexity +0.3 % on SmolLM2-135M",
)


class Block8(Blocks):
    """Its `bits` are all that it adds."""

    name, bits = "block8", 8


PLUGIN = Block8
