"""Random numbers that are a function of (seed, index, position): no state, the same in Python, torch, C++ and Triton.

All arithmetic is on unsigned 64-bit words, modulo 2^64. Starting from h = 0, each word w of (seed, index, position,
draw) is absorbed by h = mix((h xor w) + 0x9e3779b97f4a7c15), where

    mix(z): z = (z xor (z >> 30)) * 0xbf58476d1ce4e5b9
            z = (z xor (z >> 27)) * 0x94d049bb133111eb
            z xor (z >> 31)

which is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). The number is (h >> 11) * 2^-53: 53 bits, exact
in a double. `draw` tells apart several numbers asked for one position. `ops/cases/random.py` has known answers.
"""

from __future__ import annotations

import torch

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def uniform(seed: int, index: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1) for one sampled token. Arguments are taken modulo 2^64."""
    return (bits(seed, index, position, draw) >> 11) * 2.0**-53


def bits(seed: int, index: int, position: int, draw: int = 0) -> int:
    """The 64 bits behind `uniform`."""
    return _mix(((bits_before(seed, index, position) ^ (draw & _WORD)) + _GAMMA) & _WORD)


def uniform_rows(
    seed: torch.Tensor, index: torch.Tensor, position: torch.Tensor, draw: torch.Tensor | int = 0
) -> torch.Tensor:
    """`uniform` of each row: int64 tensors that broadcast -> float64, equal to the last bit."""
    h = torch.zeros((), dtype=torch.int64, device=seed.device)
    for word in (seed, index, position, torch.as_tensor(draw, dtype=torch.int64, device=seed.device)):
        h = _mix_rows((h ^ word) + _signed(_GAMMA))
    return _shift(h, 11).double() * 2.0**-53


def uniform_draws(seed: int, index: int, position: int, draws: torch.Tensor) -> torch.Tensor:
    """`uniform` of one sampled token for each of `draws` (N,) int64 -> (N,) float64, equal to the last bit."""
    h = bits_before(seed, index, position)
    return _shift(_mix_rows((draws ^ _signed(h)) + _signed(_GAMMA)), 11).double().mul_(2.0**-53)


def bits_before(seed: int, index: int, position: int) -> int:
    """The state after (seed, index, position), to which a draw is absorbed."""
    h = 0
    for word in (seed, index, position):
        h = _mix(((h ^ (word & _WORD)) + _GAMMA) & _WORD)
    return h


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)


def _mix_rows(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _shift(z, 27)) * _signed(_SECOND)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, n: int) -> torch.Tensor:
    """Shifts right without copies of the sign: torch's shift is arithmetic."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
