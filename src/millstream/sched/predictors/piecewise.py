"""A better form: what the weights cost by the number of tokens, in pieces, and what attention and rows cost beside it.

Products with the weights are bound by memory for few tokens and by arithmetic for many, and kernels change with the
number of rows, so time by tokens is a line in pieces between `KNOTS`, none of which falls. Attention goes with pairs
of queries and keys, where those that another row reads too have a price of their own; sampling with the rows that are
sampled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from millstream.core.errors import MillstreamError
from millstream.core.registry import Card
from millstream.core.shape import StepShape
from millstream.sched.fitting import fit_times, mean_error, samples_of

CARD = Card("piecewise", "step time, a line in pieces by the number of tokens, and the cost of attention and of rows")

KNOTS = (0, 1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OTHERS = ("constant", "prefill_pairs", "decode_keys", "prefill_rows", "decode_rows", "sampled", "shared_keys")
_READ, _SHARED = OTHERS.index("decode_keys"), OTHERS.index("shared_keys")


class Piecewise:
    def __init__(self) -> None:
        self._slopes: list[float] = []
        self._others: list[float] = []
        self._base: list[float] = []
        self._residual = 0.0

    def fit(self, samples: Seq[tuple[StepShape, float]]) -> None:
        shapes, seconds = samples_of(samples)
        # Pieces that no sample reaches take part in no sample; they go on with the slope of the one before.
        most = max((shape.tokens for shape in shapes), default=0)
        used = [knot for knot in KNOTS if knot < most] or [0]
        rows = [[*_others(shape), *_pieces(shape.tokens, used)] for shape in shapes]
        found = fit_times(rows, seconds)
        others, slopes = found[: len(OTHERS)], found[len(OTHERS) :]
        if not any(shape.shared_keys for shape in shapes):
            # Nothing is known of what sharing saves.
            others[_SHARED] = others[_READ]
        self._set(others, slopes + [slopes[-1]] * (len(KNOTS) - len(slopes)))
        self._residual = mean_error([self.seconds(shape) for shape in shapes], seconds)

    def _set(self, others: list[float], slopes: list[float]) -> None:
        self._others, self._slopes, self._base = others, slopes, [0.0]
        for place in range(1, len(KNOTS)):
            self._base.append(self._base[-1] + slopes[place - 1] * (KNOTS[place] - KNOTS[place - 1]))

    def seconds(self, shape: StepShape) -> float:
        if not self._slopes:
            raise MillstreamError("this model of step times has not been fitted")
        tokens = shape.prefill_tokens + shape.decode_rows
        place = bisect_right(KNOTS, tokens) - 1
        a, b, c, d, e, f, g = self._others
        return (
            a
            + self._base[place]
            + self._slopes[place] * (tokens - KNOTS[place])
            + b * shape.prefill_pairs
            + c * shape.decode_keys
            - (c - g) * shape.shared_keys
            + d * shape.prefill_rows
            + e * shape.decode_rows
            + f * shape.sampled
        )

    def residual(self) -> float:
        return self._residual

    def state(self) -> Mapping[str, Any]:
        return {
            "coefficients": dict(zip(OTHERS, self._others, strict=True)),
            "slopes": {str(knot): slope for knot, slope in zip(KNOTS, self._slopes, strict=True)},
            "residual": self._residual,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        others, slopes = state.get("coefficients"), state.get("slopes")
        if isinstance(others, Mapping) and "decode_keys" in others:
            # Those that were learned before sharing had a price.
            others = {"shared_keys": others["decode_keys"], **others}
        if not isinstance(others, Mapping) or set(others) != set(OTHERS):
            raise ValueError(f"coefficients of {', '.join(OTHERS)} are expected")
        if not isinstance(slopes, Mapping) or set(slopes) != {str(knot) for knot in KNOTS}:
            raise ValueError(f"slopes from {', '.join(map(str, KNOTS))} tokens on are expected")
        numbers = [float(others[name]) for name in OTHERS], [float(slopes[str(knot)]) for knot in KNOTS]
        if not all(0 <= one < float("inf") for one in (*numbers[0], *numbers[1])):
            raise ValueError("a coefficient is negative or not finite")
        self._set(*numbers)
        self._residual = float(state.get("residual", 0.0))


def _others(shape: StepShape) -> list[float]:
    read, shared = shape.decode_keys - shape.shared_keys, shape.shared_keys
    return [1.0, shape.prefill_pairs, read, shape.prefill_rows, shape.decode_rows, shape.sampled, shared]


def _pieces(tokens: int, knots: Seq[int]) -> list[float]:
    ends = [*knots[1:], max(tokens, knots[-1])]
    return [float(max(0, min(tokens, end) - start)) for start, end in zip(knots, ends, strict=True)]


PLUGIN = Piecewise
