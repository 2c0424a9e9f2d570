"""Floats of 5 bits: two of exponent, two of mantissa, a scale for each output (FP6-LLM).

Values from 1/4 to 7 and their negatives.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.formats.weights._fpx import Fpx

CARD = Card(
    "fp5-e2m2",
    "5-bit floats e2m2 with a scale for each output, multiplied as they are read.",
    paper=32,
    lossless=False,
    error="each weight is off by at most 1/8 of itself, small ones by 1/56 of the largest of their output: "
    "perplexity +16 % on SmolLM2-135M",
)


class Fp5E2m2(Fpx):
    """Its widths are all that it adds."""

    name, exponent, mantissa = "fp5-e2m2", 2, 2


PLUGIN = Fp5E2m2
