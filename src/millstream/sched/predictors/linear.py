"""HyGen's form: linear in token sums, their squares and request counts (Sun et al., HyGen, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from millstream.core.errors import MillstreamError
from millstream.core.registry import Card
from millstream.core.shape import StepShape
from millstream.sched.fitting import fit_times, mean_error, samples_of

CARD = Card("linear", "step time, linear in sums of prefill and decode tokens, their squares and row counts", paper=58)

NAMES = (
    "constant",
    "prefill_tokens",
    "decode_keys",
    "prefill_tokens^2",
    "decode_keys^2",
    "prefill_rows",
    "decode_rows",
)


class Linear:
    def __init__(self) -> None:
        self._found: list[float] = []
        self._residual = 0.0

    def fit(self, samples: Seq[tuple[StepShape, float]]) -> None:
        shapes, seconds = samples_of(samples)
        self._found = fit_times([_features(shape) for shape in shapes], seconds)
        self._residual = mean_error([self.seconds(shape) for shape in shapes], seconds)

    def seconds(self, shape: StepShape) -> float:
        if not self._found:
            raise MillstreamError("this model of step times has not been fitted")
        a, b, c, d, e, f, g = self._found
        tokens, keys = shape.prefill_tokens, shape.decode_keys
        return (
            a
            + b * tokens
            + c * keys
            + d * tokens * tokens
            + e * keys * keys
            + f * shape.prefill_rows
            + g * shape.decode_rows
        )

    def residual(self) -> float:
        return self._residual

    def state(self) -> Mapping[str, Any]:
        return {"coefficients": dict(zip(NAMES, self._found, strict=True)), "residual": self._residual}

    def restore(self, state: Mapping[str, Any]) -> None:
        held = state.get("coefficients")
        if not isinstance(held, Mapping) or set(held) != set(NAMES):
            raise ValueError(f"coefficients of {', '.join(NAMES)} are expected")
        found = [float(held[name]) for name in NAMES]
        if not all(0 <= one < float("inf") for one in found):
            raise ValueError("a coefficient is negative or not finite")
        self._found, self._residual = found, float(state.get("residual", 0.0))


def _features(shape: StepShape) -> list[float]:
    tokens, keys = shape.prefill_tokens, shape.decode_keys
    return [1.0, tokens, keys, tokens**2, keys**2, shape.prefill_rows, shape.decode_rows]


PLUGIN = Linear
