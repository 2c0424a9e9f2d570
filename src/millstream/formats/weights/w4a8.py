"""4-bit codes in two levels that multiply as whole numbers of 8 bits; activations in 8 bits with one scale a token.

QServe (Lin et al., 2024): progressive group quantization, or with `group` 0 its per-channel variant. `_progressive.py`
has the rounding; what is stored says itself how many groups it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from millstream.core.errors import ConfigError
from millstream.core.registry import Card
from millstream.formats.weights._channel import Channel, Codes
from millstream.formats.weights._progressive import clipped, grid_of, rounded_in_turn
from millstream.ops.ref.channel import RUN

CARD = Card(
    "w4a8",
    "4-bit weights with integer steps for groups of inputs; 8-bit activations, one scale a token.",
    paper=27,
    lossless=False,
    error="weights of 4 bits: perplexity +10 % on SmolLM2-135M when calibrated",
)


@dataclass(frozen=True, slots=True)
class Config:
    """`group` inputs share a step: a multiple of 32 that divides them, 0 for one scale and zero an output.

    "auto" is 128, 64 or 32, the first that divides a matrix's inputs, else all of them. `clip` and `gptq` choose ranges
    and roundings by the inputs seen, where `pack` is given any.
    """

    group: int | str = "auto"
    clip: bool = True
    gptq: bool = True

    def __post_init__(self) -> None:
        if self.group == "auto":
            return
        if not isinstance(self.group, int) or self.group < 0 or self.group % RUN:
            raise ConfigError(f"w4a8: group is {self.group!r}, allowed are 'auto', 0 and multiples of {RUN}")


class W4A8(Channel):
    """`calibration` of `pack` is X^T X (I, I) of the inputs seen, or None: round to nearest."""

    name, bits = "w4a8", 4

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def groups(self, inputs: int) -> int:
        """How many groups a matrix of that many inputs gets. Raises ConfigError where they do not divide."""
        group = self.config.group
        if isinstance(group, str):
            return next((inputs // size for size in (128, 64, 32) if inputs % size == 0), 1)
        if group and inputs % group:
            sizes = ", ".join(str(size) for size in (256, 128, 64, 32) if inputs % size == 0) or "none but 0 and 'auto'"
            raise ConfigError(f"groups of {group} do not divide {inputs} inputs; these do: {sizes}")
        return inputs // group if group else 0

    def encode(self, weight: torch.Tensor, calibration: Any = None) -> Codes:
        groups = self.groups(weight.shape[1])
        if calibration is None or not self.config.clip:
            grid = grid_of(weight, groups)
        else:
            grid = clipped(weight, groups, calibration)
        if calibration is None or not self.config.gptq:
            codes = grid.codes(weight.view(weight.shape[0], max(1, groups), -1)).view(weight.shape)
        else:
            codes = rounded_in_turn(weight, grid, groups, calibration)
        codes, scale = codes.to(torch.uint8), grid.scale.flatten()
        if not groups:
            return Codes(codes, scale, grid.z.flatten())
        return Codes(codes, scale, None, (grid.step, grid.z))


PLUGIN = W4A8
