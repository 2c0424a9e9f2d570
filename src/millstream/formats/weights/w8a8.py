"""8-bit codes with one scale an output, symmetric; activations in 8 bits with one scale a token, taken as they come.

Nothing but integers in the main loop (SmoothQuant's O1 without its migration; the W8A8 baseline of QServe).
"""

from __future__ import annotations

from typing import Any

import torch

from millstream.core.registry import Card
from millstream.formats.weights._channel import Channel, Codes

CARD = Card(
    "w8a8",
    "8-bit weights, one scale an output; 8-bit activations, one scale a token.",
    paper=27,
    lossless=False,
    error="inputs are rounded to 8 bits a token: perplexity +2 % on SmolLM2-135M",
)


class W8A8(Channel):
    name, bits = "w8a8", 8

    def encode(self, weight: torch.Tensor, calibration: Any = None) -> Codes:
        scale = weight.abs().amax(1) / 127.0
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        codes = torch.round(weight * inverse[:, None]).clamp_(-127, 127) + 128
        return Codes(codes.to(torch.uint8), scale)


PLUGIN = W8A8
