"""When requests arrive: at once, at random with a rate, at a rate that grows, or when a trace says.

Gaps at a constant rate follow a gamma distribution of shape b ("burstiness") and mean 1/rate: b = 1 is a Poisson
process, smaller is burstier (coefficient of variation 1/sqrt(b)), larger is more even. The times are stretched so that
the last request arrives after count/rate seconds whatever the seed, as `vllm bench serve` does.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

from millstream.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class RampUp:
    """A rate that grows from `start` to `end` requests a second over the run."""

    strategy: Literal["linear", "exponential"]
    start: float
    end: float

    def __post_init__(self) -> None:
        if self.start < 0 or (self.strategy == "exponential" and self.start == 0):
            raise BadRequest("ramp_up_start_rps", self.start, "a number above 0")
        if self.end <= 0 or self.end < self.start:
            raise BadRequest("ramp_up_end_rps", self.end, f"a number above 0, from {self.start:g}")

    def rate(self, progress: float) -> float:
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return float(self.start * (self.end / self.start) ** progress)


def arrival_times(
    count: int, rate: float, burstiness: float = 1.0, ramp_up: RampUp | None = None, seed: int = 0
) -> list[float]:
    """Seconds from the start for each of `count` requests; all 0 when `rate` is infinite. Raises BadRequest."""
    if not rate > 0:
        raise BadRequest("request_rate", rate, "a number above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise BadRequest("burstiness", burstiness, "a number above 0")
    if count < 1:
        return []
    if ramp_up is None and math.isinf(rate):
        return [0.0] * count
    draw = random.Random(seed)
    # A ramp from 0 begins with the rate of its first quarter of a step: the gap before it would else be endless.
    rates = (
        [rate] * count if ramp_up is None else [ramp_up.rate(max(i, 0.25) / max(1, count - 1)) for i in range(count)]
    )
    times = list(itertools.accumulate(draw.gammavariate(burstiness, 1 / (burstiness * one)) for one in rates))
    if ramp_up is None and times[-1] > 0:
        stretch = count / rate / times[-1]
        times = [at * stretch for at in times]
    return times
