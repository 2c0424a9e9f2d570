"""What is done with the vectors that an encoder gives: cut, packed, compared."""

from __future__ import annotations

import base64
import math
import operator
import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from millstream.core.errors import BadRequest


def floats(data: bytes) -> array[float]:
    """The numbers of a vector as an engine sends it: float32, little-endian."""
    found = array("f")
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def in_base64(vector: array[float]) -> str:
    """float32, little-endian, in base64: what OpenAI's clients decode."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode("ascii")


def check_dimensions(dimensions: int | None, facts: Mapping[str, Any]) -> None:
    """Raises BadRequest for a number of dimensions that a model's vectors (`ModelFacts.vectors`) do not have."""
    width = int(facts["width"])
    if dimensions is not None and (
        isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= width
    ):
        raise BadRequest("dimensions", dimensions, f"an integer from 1 to {width}")


def shortened(vector: array[float], dimensions: int | None) -> array[float]:
    """Its first `dimensions` numbers, at length 1 again. Only models that were trained for it lose little by that."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    cut = vector[:dimensions]
    length = math.sqrt(math.fsum(one * one for one in cut))
    return array("f", (one / length for one in cut)) if length > 0 else cut


def similarity(one: array[float], other: array[float]) -> float:
    """The cosine of two vectors, 0 where one has no length."""
    lengths = math.sqrt(_dot(one, one)) * math.sqrt(_dot(other, other))
    return max(-1.0, min(1.0, _dot(one, other) / lengths)) if lengths > 0 else 0.0


def probability(logit: float) -> float:
    """What a classifier with one label says of a pair, from 0 to 1."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def check_pairs(facts: Mapping[str, Any]) -> bool:
    """Whether a model scores pairs itself; else texts are compared by their vectors. Raises BadRequest for neither."""
    labels = facts.get("labels", 0)
    if labels > 1:
        raise BadRequest("model", f"a classifier with {labels} labels", "an embedding model, or one that scores pairs")
    return bool(labels)


def best(scores: Iterable[float], top_n: int | None = None) -> list[tuple[int, float]]:
    """(place, score) from the best on; of equal ones the first."""
    ranked = sorted(enumerate(scores), key=lambda pair: (-pair[1], pair[0]))
    return ranked if top_n is None else ranked[:top_n]


def _dot(one: array[float], other: array[float]) -> float:
    return float(sum(map(operator.mul, one, other)))
