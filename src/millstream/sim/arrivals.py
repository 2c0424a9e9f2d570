"""When requests arrive: at once, at random with a rate, at a rate that grows, or when a trace says.

Gaps at a constant rate follow a gamma distribution of shape b ("burstiness") and mean 1/rate: b = 1 is a Poisson
process, smaller is burstier (coefficient of variation 1/sqrt(b)), larger is more even. The times are stretched so that
the last request arrives after count/rate seconds whatever the seed, as `vllm bench serve` does.

A rate that follows the hour of the day, with bursts of a minute or so on top (`RateCurve`), makes a Poisson process
whose rate changes. It is drawn by thinning (Lewis and Shedler, 1979): candidates come at the highest rate there is, and
each is kept with the probability rate / highest rate.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator
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


@dataclass(frozen=True, slots=True)
class Diurnal:
    """How traffic goes up and down in a day that takes `period_s` seconds: 1 is the mean of the day.

    A sine with its lowest point, `low` times its highest, at the begin of the day; or a line through `points`, each a
    share of the day from 0 and a level, which after the last goes back to the first. Raises BadRequest.
    """

    period_s: float
    low: float = 0.2
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.period_s < math.inf:
            raise BadRequest("diurnal", self.period_s, "a period above 0, in seconds")
        if not 0 <= self.low <= 1:
            raise BadRequest("diurnal", self.low, "a lowest rate from 0 to 1, as a share of the highest")
        shares = [share for share, _ in self.points]
        if shares and (shares != sorted(set(shares)) or shares[0] < 0 or shares[-1] >= 1):
            raise BadRequest("points", shares, "shares of the day from 0 to below 1, each above the one before")
        if self.points and (min(level for _, level in self.points) < 0 or not self._mean() > 0):
            raise BadRequest("points", [level for _, level in self.points], "levels from 0, not all of them 0")

    def level(self, at_s: float) -> float:
        """The rate at a second, as a multiple of the mean."""
        share = at_s / self.period_s % 1.0
        if not self.points:
            return (self.low + (1 - self.low) * (1 - math.cos(2 * math.pi * share)) / 2) / self._mean()
        after = bisect.bisect_right(self.points, share, key=lambda one: one[0])
        (begin, low), (end, high) = self._corner(after - 1), self._corner(after)
        return (low + (high - low) * (share - begin) / (end - begin)) / self._mean()

    @property
    def most(self) -> float:
        """The highest level."""
        return (max(level for _, level in self.points) if self.points else 1.0) / self._mean()

    def _corner(self, place: int) -> tuple[float, float]:
        turns, place = divmod(place, len(self.points))
        return self.points[place][0] + turns, self.points[place][1]

    def _mean(self) -> float:
        if not self.points:
            return (1 + self.low) / 2
        corners = [self._corner(place) for place in range(len(self.points) + 1)]
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(corners))


@dataclass(frozen=True, slots=True)
class Bursts:
    """For `for_s` seconds the rate is `times` what it would be; such times come at random, one in `every_s` seconds."""

    every_s: float = 600.0
    for_s: float = 60.0
    times: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.for_s < self.every_s < math.inf:
            raise BadRequest("bursts", self.for_s, f"seconds above 0 and below the {self.every_s:g} between bursts")
        if not 0 < self.times < math.inf:
            raise BadRequest("bursts", self.times, "a factor above 0")


class RateCurve:
    """Requests a second by the time: `mean` over a day, bursts not counted. A function of its seed. Raises BadRequest.

    Bursts are drawn apart from arrivals: with another `mean` they come when they did.
    """

    def __init__(
        self, mean: float, diurnal: Diurnal | None = None, bursts: Bursts | None = None, seed: int = 0
    ) -> None:
        if not 0 < mean < math.inf:
            raise BadRequest("rate", mean, "a number above 0")
        self.mean, self.diurnal, self.bursts, self.seed = mean, diurnal, bursts, seed
        self._draw = random.Random(f"bursts {seed}")
        self._begins: list[float] = []

    @property
    def most(self) -> float:
        """The rate is never higher."""
        day = 1.0 if self.diurnal is None else self.diurnal.most
        return self.mean * day * (1.0 if self.bursts is None else max(1.0, self.bursts.times))

    def at(self, at_s: float) -> float:
        """The rate at a second from 0 on."""
        rate = self.mean * (1.0 if self.diurnal is None else self.diurnal.level(at_s))
        if self.bursts is not None and self._bursts_at(at_s, self.bursts):
            rate *= self.bursts.times
        return rate

    def arrivals(self) -> Iterator[float]:
        """Seconds at which requests come, without an end: by thinning."""
        draw, most, at_s = random.Random(f"arrivals {self.seed}"), self.most, 0.0
        while True:
            at_s += draw.expovariate(most)
            if draw.random() * most < self.at(at_s):
                yield at_s

    def sampled(self, until_s: float, step_s: float) -> tuple[list[float], list[float]]:
        """The begins of steps of `step_s` seconds, and the highest rate in each: what an oracle knows."""
        begins = [place * step_s for place in range(max(1, math.ceil(until_s / step_s)))]
        fine = 8
        rates = [max(self.at(begin + step_s * part / fine) for part in range(fine + 1)) for begin in begins]
        return begins, rates

    def _bursts_at(self, at_s: float, bursts: Bursts) -> bool:
        while not self._begins or self._begins[-1] <= at_s:
            last = self._begins[-1] + bursts.for_s if self._begins else 0.0
            self._begins.append(last + self._draw.expovariate(1 / (bursts.every_s - bursts.for_s)))
        before = bisect.bisect_right(self._begins, at_s) - 1
        return before >= 0 and at_s < self._begins[before] + bursts.for_s
