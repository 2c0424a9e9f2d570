"""Floats of 6 bits: three of exponent, two of mantissa, a scale for each output (FP6-LLM).

The format of the paper: values from 1/16 to 28 and their negatives.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.formats.weights._fpx import Fpx

CARD = Card(
    "fp6-e3m2",
    "6-bit floats e3m2 with a scale for each output, multiplied as they are read.",
    paper=32,
    lossless=False,
    error="each weight is off by at most 1/8 of itself, small ones by 1/896 of the largest of their output: "
    "perplexity +10 % on SmolLM2-135M",
)


class Fp6E3m2(Fpx):
    """Its widths are all that it adds."""

    name, exponent, mantissa = "fp6-e3m2", 3, 2


PLUGIN = Fp6E3m2
