"""Floats of 6 bits: two of exponent, three of mantissa, a scale for each output.

Finer steps than e3m2 and a smaller range: values from 1/8 to 7.5 and their negatives.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.formats.weights._fpx import Fpx

CARD = Card(
    "fp6-e2m3",
    "6-bit floats e2m3 with a scale for each output, multiplied as they are read.",
    paper=32,
    lossless=False,
    error="each weight is off by at most 1/16 of itself, small ones by 1/120 of the largest of their output: "
    "perplexity +4 % on SmolLM2-135M",
)


class Fp6E2m3(Fpx):
    """Its widths are all that it adds."""

    name, exponent, mantissa = "fp6-e2m3", 2, 3


PLUGIN = Fp6E2m3
