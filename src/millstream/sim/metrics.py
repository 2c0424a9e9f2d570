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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Name -> (short name, title) of what has percentiles.
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
# A client that sends later than this does not measure what it says.
_LATE_S = 0.005


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


def statistics_of(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Of values in seconds: mean, median, deviation and percentiles in milliseconds, by vLLM's names."""
    ordered = sorted(values) or [0.0]
    found = {
        f"mean_{name}_ms": statistics.fmean(ordered) * 1000,
        f"median_{name}_ms": percentile(ordered, 50) * 1000,
        f"std_{name}_ms": statistics.pstdev(ordered) * 1000,
    }
    return found | {f"p{spelled(q)}_{name}_ms": percentile(ordered, q) * 1000 for q in percentiles}


def spelled(q: float) -> str:
    """A percentile as names have it: 99, 99.9."""
    return str(int(q)) if q == int(q) else str(q)


def peak_rate(timings: Sequence[RequestTiming]) -> float:
    """Most output tokens in any whole second from the first token on; a chunk of several counts as their share."""
    seconds: defaultdict[int, float] = defaultdict(float)
    stamps = [at for one in timings for at in one.token_times_s]
    if not stamps:
        return 0.0
    first = min(stamps)
    for one in timings:
        if one.token_times_s:
            share = one.num_output / len(one.token_times_s)
            for at in one.token_times_s:
                seconds[int(at - first)] += share
    return max(seconds.values())


def peak_open(spans: Sequence[tuple[float, float]]) -> int:
    """The most spans (begin, end) that are open at once."""
    edges = sorted(itertools.chain(((begin, 1) for begin, _ in spans), ((end, -1) for _, end in spans)))
    return max(itertools.accumulate(change for _, change in edges), default=0)


def lines(
    found: dict[str, Any],
    metrics: Sequence[str],
    percentiles: Sequence[float],
    max_concurrency: int | None,
    rate: float,
    embeddings: bool = False,
) -> list[str]:
    """The result as a table of 50 columns, in the words of `vllm bench serve`."""
    out = ["{s:{c}^{n}}".format(s=" Serving Benchmark Result ", n=50, c="=")]

    def row(name: str, value: Any, digits: int | None = None) -> None:
        value = math.nan if value is None else value
        out.append(f"{name:<40} {value:<10}" if digits is None else f"{name:<40} {value:<10.{digits}f}")

    row("Successful requests:", found["completed"])
    row("Failed requests:", found["failed"])
    if found["shed"]:
        row("Shed requests (429):", found["shed"])
        if found["mean_retry_after_s"] is not None:
            row("Mean Retry-After (s):", found["mean_retry_after_s"], 2)
    if max_concurrency is not None:
        row("Maximum request concurrency:", max_concurrency)
    if not math.isinf(rate):
        row("Request rate configured (RPS):", rate, 2)
    row("Benchmark duration (s):", found["duration"], 2)
    row("Total input tokens:", found["total_input_tokens"])
    if found["total_cached_tokens"]:
        row("Total cached input tokens:", found["total_cached_tokens"])
    if not embeddings:
        row("Total generated tokens:", found["total_output_tokens"])
    row("Request throughput (req/s):", found["request_throughput"], 2)
    if found["request_goodput"] is not None:
        row("Request goodput (req/s):", found["request_goodput"], 2)
        row("SLO attainment (%):", found["slo_attainment"] * 100, 2)
    if not embeddings:
        row("Output token throughput (tok/s):", found["output_throughput"], 2)
        row("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"], 2)
    row("Peak concurrent requests:", found["max_concurrent_requests"], 2)
    row("Total token throughput (tok/s):", found["total_token_throughput"], 2)
    if (found.get("client_lag_p99_ms") or 0) > _LATE_S * 1000:
        row("Client lag, P99 (ms):", found["client_lag_p99_ms"], 2)
    if "probe_completed" in found:
        out.append("{s:{c}^{n}}".format(s="Probe Requests", n=50, c="-"))
        row("Probe requests completed:", found["probe_completed"])
        row("Probe requests failed:", found["probe_failed"])
        row("Median probe E2EL (ms):", found["probe_median_e2el_ms"], 2)
        row("P99 probe E2EL (ms):", found["probe_p99_e2el_ms"], 2)
        row("Max probe E2EL (ms):", found["probe_max_e2el_ms"], 2)
    for name in metrics:
        short, title = METRICS[name]
        out.append("{s:{c}^{n}}".format(s=title, n=50, c="-"))
        row(f"Mean {short} (ms):", found[f"mean_{name}_ms"], 2)
        row(f"Median {short} (ms):", found[f"median_{name}_ms"], 2)
        for q in percentiles:
            row(f"P{spelled(q)} {short} (ms):", found[f"p{spelled(q)}_{name}_ms"], 2)
    out.append("=" * 50)
    if found["errors_by_kind"]:
        out += [
            "failed requests, by what was said:",
            *(f"  {n} x {kind}" for kind, n in found["errors_by_kind"].items()),
        ]
    return out
