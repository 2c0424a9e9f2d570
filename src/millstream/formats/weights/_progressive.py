"""Rounding weights to 4 bits in two levels, and choosing ranges and roundings by what the inputs look like.

Progressive group quantization (QServe, Lin et al., 2024, section 4.1): level 0 maps a row to [-119, 119], level 1 maps
each of its groups to 16 codes with a step of whole numbers, so that what is multiplied is again whole numbers of 8
bits: (code - z) * step. 119 is the protective range: a step is then at most ceil(238 / 15) = 16, rounding is off by at
most 8, and 119 + 8 = 127 still is a byte. With 127 it would not be.

Shapes: O outputs, I inputs, G groups of I / G inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROTECTIVE = 119
TOP = 15
# Ranges that are tried, as shares of the whole one (QoQ's are 80; the error is flat between neighbours).
RATIOS = tuple(1.0 - 0.05 * i for i in range(11))
DAMP, BLOCK = 0.01, 128


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a matrix may take: scale (O, 1) times whole numbers (code - z) * step, step and z (O, G)."""

    scale: torch.Tensor
    step: torch.Tensor
    z: torch.Tensor

    def codes(self, weight: torch.Tensor, group: slice | int = slice(None)) -> torch.Tensor:
        """The nearest codes of weight (O, G, each) as floats; of one group only when `group` is its number."""
        unit, z = self._of(group)
        return (torch.round(weight / unit) + z).clamp_(0, TOP)

    def in_a_byte(self, codes: torch.Tensor, group: int) -> torch.Tensor:
        """Codes of one group, those that stand for more than a byte holds moved to the last that do not.

        The nearest code of a weight that the grid was made for is never one. What makes the errors of others good may
        lie beyond its row's range.
        """
        z, room = self.z[:, group : group + 1], torch.floor(127 / self.step[:, group : group + 1])
        return codes.maximum((z - room).clamp(min=0)).minimum((z + room).clamp(max=TOP))

    def values(self, codes: torch.Tensor, group: slice | int = slice(None)) -> torch.Tensor:
        unit, z = self._of(group)
        return (codes - z) * unit

    def _of(self, group: slice | int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(group, int):
            return self.step[:, group : group + 1] * self.scale, self.z[:, group : group + 1]
        return (self.step * self.scale)[..., None], self.z[..., None]


def first_level(weight: torch.Tensor, bound: int = PROTECTIVE) -> torch.Tensor:
    """weight (O, I) -> scale (O, 1): the largest of a row becomes `bound`."""
    most = weight.abs().amax(1, keepdim=True)
    return torch.where(most > 0, most / bound, 1.0)


def second_level(
    weight: torch.Tensor, scale: torch.Tensor, ratio: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (O, G, each), scale (O, 1) -> step, z (O, G) whole numbers as floats. `ratio` narrows the range.

    The range holds zero. A step is a byte, z has 4 bits.
    """
    low = weight.amin(-1).clamp(max=0) / scale * ratio
    high = weight.amax(-1).clamp(min=0) / scale * ratio
    # A row's largest over its own scale may come out a last digit above the bound.
    step = torch.ceil((high - low) / TOP - 1e-4).clamp(min=1)
    return step, torch.round(-low / step).clamp(0, TOP)


def one_level(weight: torch.Tensor, ratio: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (O, 1, I) -> scale (O, 1), z (O, 1): 16 codes a row, asymmetric, the range holding zero."""
    low, high = weight.amin(-1).clamp(max=0) * ratio, weight.amax(-1).clamp(min=0) * ratio
    scale = (high - low) / TOP
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, TOP)


def grid_of(weight: torch.Tensor, groups: int, ratio: float | torch.Tensor = 1.0, bound: int = PROTECTIVE) -> Grid:
    """The grid of weight (O, I) in so many groups; 0: one level, a scale and a zero an output."""
    if groups:
        scale = first_level(weight, bound)
        return Grid(scale, *second_level(weight.view(weight.shape[0], groups, -1), scale, ratio))
    scale, z = one_level(weight[:, None], ratio)
    return Grid(scale, torch.ones_like(z), z)


def clipped(weight: torch.Tensor, groups: int, gram: torch.Tensor) -> Grid:
    """The grid whose ranges give the smallest error of the layer's output, each group for itself.

    gram (I, I) is X^T X of the inputs seen: a change D of a row's weights changes what comes out by D gram D^T.
    """
    outputs, inputs = weight.shape
    number = max(1, groups)
    each = inputs // number
    parts = weight.view(outputs, number, each)
    blocks = torch.stack([gram[g * each : (g + 1) * each, g * each : (g + 1) * each] for g in range(number)])
    best = torch.full((outputs, number), torch.inf)
    ratios = torch.ones(outputs, number)
    for ratio in RATIOS:
        grid = grid_of(weight, groups, ratio)
        change = (grid.values(grid.codes(parts)) - parts).transpose(0, 1)
        error = ((change @ blocks) * change).sum(-1).T
        better = error < best
        best = torch.where(better, error, best)
        ratios = torch.where(better, ratio, ratios)
    return grid_of(weight, groups, ratios)


def rounded_in_turn(weight: torch.Tensor, grid: Grid, groups: int, gram: torch.Tensor) -> torch.Tensor:
    """Codes (O, I) by GPTQ (Frantar et al., 2022): what rounding one input costs, the later ones make good."""
    inputs = weight.shape[1]
    each = inputs // max(1, groups)
    damped = gram.double().clone()
    unseen = damped.diagonal() == 0
    damped.diagonal()[unseen] = 1.0
    damped.diagonal().add_(DAMP * damped.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    left = weight.clone()
    codes = torch.empty_like(weight)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(weight.shape[0], stop - start)
        for i in range(start, stop):
            column = left[:, i : i + 1]
            code = grid.in_a_byte(grid.codes(column, i // each), i // each)
            codes[:, i : i + 1] = code
            error = (column - grid.values(code, i // each)) / inverse[i, i]
            errors[:, i - start : i - start + 1] = error
            left[:, i:stop].addmm_(error, inverse[i : i + 1, i:stop], alpha=-1)
        left[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    return codes
