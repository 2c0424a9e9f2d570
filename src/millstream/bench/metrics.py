"""What the load generators count, and what the numbers mean.

Seconds are of one monotonic clock, stamped where a chunk leaves the engine. For a request that arrives at a, whose
tokens come at t1 <= t2 <= ... <= tn:

ttft    t1 - a: arrival to the first token, queueing included. Arrival is when the load says that it arrives, not when
        the generator got round to sending it.
itl     t(i+1) - t(i), the gaps pooled over all requests: its p99 shows stalls. Tokens that come in one chunk have no
        gap between them and count as one arrival.
tpot    (tn - t1) / (n - 1), once per request of two tokens or more.
e2el    tn - a.
output_tokens_per_s     output tokens / duration; duration is first arrival to last token.
total_tokens_per_s      (prompt + output tokens) / duration.
prefill_tokens_per_s    prompt tokens computed / the seconds of steps that are theirs: a step's time, host work
                        included, is shared out by tokens. Tokens taken from the prefix cache are not computed.
decode_tokens_per_s     likewise for the other tokens. One long prompt step and many short decode steps do not blur.

Requests that failed are counted, and are in no percentile.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request's stamps in seconds; `token_times_s` has one entry for each chunk that brought tokens."""

    arrival_s: float
    token_times_s: tuple[float, ...]
    num_prompt: int
    num_output: int
    cached_tokens: int = 0
    finish: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def e2el_s(self) -> float | None:
        return self.token_times_s[-1] - self.arrival_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        if self.num_output < 2 or len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_output - 1)

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [after - before for before, after in itertools.pairwise(times)]


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One step: when it was settled, the seconds of its forward pass, its rows and tokens, and what was left."""

    now_s: float
    forward_s: float
    rows: int
    tokens: int
    prompt_tokens: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a sample in seconds (NaN when it is empty)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        found = sorted(values)
        if not found:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        return cls(
            len(found),
            statistics.fmean(found),
            percentile(found, 50),
            percentile(found, 90),
            percentile(found, 99),
            found[-1],
        )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One run of a load. Definitions are at the top of this file."""

    requests: int
    failed: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: Distribution
    itl_s: Distribution
    tpot_s: Distribution
    e2el_s: Distribution
    steps: int
    max_running: int


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of sorted values, linear between neighbours. Raises ValueError on none."""
    if not ordered:
        raise ValueError("no values")
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def step_seconds(steps: Sequence[StepTiming]) -> list[float]:
    """What each step took, host work included: the time since the step before, or its forward pass after a pause."""
    seconds = []
    for place, step in enumerate(steps):
        before = steps[place - 1] if place else None
        busy = before is not None and (before.running or before.waiting)
        seconds.append(step.now_s - before.now_s if before is not None and busy else step.forward_s)
    return seconds


def summarize(timings: Sequence[RequestTiming], steps: Sequence[StepTiming] = ()) -> LoadReport:
    """Folds the stamps of one run. Raises ValueError when there are no requests."""
    if not timings:
        raise ValueError("no requests")
    good = [timing for timing in timings if timing.error is None and timing.token_times_s]
    start = min(timing.arrival_s for timing in timings)
    end = max((timing.token_times_s[-1] for timing in good), default=start)
    duration = end - start
    prompt = sum(timing.num_prompt for timing in good)
    output = sum(timing.num_output for timing in good)

    prefill_s = decode_s = 0.0
    prefill_tokens = decode_tokens = 0
    for step, seconds in zip(steps, step_seconds(steps), strict=True):
        if step.tokens:
            share = step.prompt_tokens / step.tokens
            prefill_s += seconds * share
            decode_s += seconds * (1 - share)
            prefill_tokens += step.prompt_tokens
            decode_tokens += step.tokens - step.prompt_tokens
    return LoadReport(
        requests=len(timings),
        failed=len(timings) - len(good),
        duration_s=duration,
        prompt_tokens=prompt,
        cached_tokens=sum(timing.cached_tokens for timing in good),
        output_tokens=output,
        requests_per_s=_rate(len(good), duration),
        output_tokens_per_s=_rate(output, duration),
        total_tokens_per_s=_rate(prompt + output, duration),
        prefill_tokens_per_s=_rate(prefill_tokens, prefill_s),
        decode_tokens_per_s=_rate(decode_tokens, decode_s),
        ttft_s=Distribution.of(timing.ttft_s for timing in good if timing.ttft_s is not None),
        itl_s=Distribution.of(gap for timing in good for gap in timing.gaps_s),
        tpot_s=Distribution.of(timing.tpot_s for timing in good if timing.tpot_s is not None),
        e2el_s=Distribution.of(timing.e2el_s for timing in good if timing.e2el_s is not None),
        steps=len(steps),
        max_running=max((max(step.rows, step.running) for step in steps), default=0),
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else math.nan
