"""Least squares with coefficients that are not negative, for models of time: more work never takes less."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from millstream.core.errors import BadRequest, Told
from millstream.core.shape import StepShape

_SWEEPS, _CLOSE = 20_000, 1e-12


def fit_times(features: Seq[Seq[float]], seconds: Seq[float]) -> list[float]:
    """The coefficients that predict `seconds` best, by relative error; (samples, features) -> (features).

    Raises BadRequest for fewer samples than features, and for times that are none.
    """
    if not features or len(features) < len(features[0]):
        count = len(features[0]) if features else 1
        raise BadRequest("samples", Told(f"{len(features)} steps"), f"at least as many as there are features ({count})")
    if not all(0 < one < float("inf") for one in seconds):
        wrong = next(one for one in seconds if not 0 < one < float("inf"))
        raise BadRequest("seconds", wrong, "times above 0")
    rows = np.asarray(features, dtype=np.float64) / np.asarray(seconds, dtype=np.float64)[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    rows /= scale
    gram, right = rows.T @ rows, rows.sum(axis=0)
    # Coordinate descent: each coefficient in turn takes its best value that is not negative. The problem is convex.
    found = np.zeros(len(right))
    for _ in range(_SWEEPS):
        largest = 0.0
        for i in range(len(found)):
            if gram[i, i] <= 0:
                continue
            value = max(0.0, found[i] + (right[i] - gram[i] @ found) / gram[i, i])
            largest, found[i] = max(largest, abs(value - found[i])), value
        if largest < _CLOSE:
            break
    return [float(one) for one in found / scale]


def mean_error(predicted: Seq[float], seconds: Seq[float]) -> float:
    """Mean absolute error as a share of what was measured (MAPE / 100)."""
    return sum(abs(a - b) / b for a, b in zip(predicted, seconds, strict=True)) / len(seconds)


def samples_of(samples: Seq[tuple[StepShape, float]]) -> tuple[list[StepShape], list[float]]:
    return [shape for shape, _ in samples], [seconds for _, seconds in samples]
