"""What a simulation came to, in the words of the benchmarks: the table, tenants, fairness, and a trace to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millstream.core.errors import BadRequest
from millstream.core.request import Slo
from millstream.sim.metrics import RequestTiming, peak_open, peak_rate, percentile, statistics_of
from millstream.sim.scaling import ScalingLog
from millstream.sim.simulate import Result, Served

SLO_NAMES = ("ttft", "tpot", "e2el", "workflow")
# What a token of a prompt and of an output count where service is compared.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


def timing_of(one: Served) -> RequestTiming:
    return RequestTiming(
        one.arrival_s,
        tuple(one.times_s),
        one.call.num_prompt,
        len(one.times_s),
        one.cached,
        one.finish,
        one.error or None,
    )


def parse_slo(given: str) -> dict[str, float]:
    """ "ttft:0.5,tpot:0.05": seconds by metric. Raises BadRequest."""
    found = {}
    for part in filter(None, (piece.strip() for piece in given.split(","))):
        name, _, value = part.partition(":")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in SLO_NAMES or not seconds > 0:
            raise BadRequest("slo", part, f"one or more of {', '.join(f'{one}:SECONDS' for one in SLO_NAMES)}")
        found[name] = seconds
    return found


def keeps(timing: RequestTiming, slo: Mapping[str, float]) -> bool:
    """Whether a request was whole and within every limit; one of a single token has no pace to break."""
    if timing.error is not None or timing.finish not in ("stop", "length"):
        return False
    got = {"ttft": timing.ttft_s or 0.0, "tpot": timing.tpot_s or 0.0, "e2el": timing.e2el_s or 0.0}
    return all(got[name] <= limit for name, limit in slo.items() if name in got)


@dataclass(frozen=True, slots=True)
class WorkflowRow:
    """One workflow: when its first call came, seconds until the last of its calls had ended (infinite where one
    failed or never came), and whether its calls kept the limits of calls."""

    tenant: str
    session: str
    arrival_s: float
    seconds: float
    calls: int
    kept: bool = True


def workflows(result: Result, slo: Mapping[str, float] | None = None) -> list[WorkflowRow]:
    """The workflows and sessions of a run in the order in which they began, as far as their calls came."""
    by: dict[tuple[str, str], list[Served]] = {}
    for one in result.served:
        if one.call.session:
            by.setdefault((one.call.tenant, one.call.session), []).append(one)
    rows = []
    for (tenant, session), calls in by.items():
        began = min(one.arrival_s for one in calls)
        timings = [timing_of(one) for one in calls]
        whole = all(keeps(one, {}) for one in timings)
        seconds = max(one.ended_s or math.inf for one in calls) - began if whole else math.inf
        rows.append(WorkflowRow(tenant, session, began, seconds, len(calls), all(keeps(t, slo or {}) for t in timings)))
    return sorted(rows, key=lambda row: row.arrival_s)


def attainment(result: Result, slo: Mapping[str, float]) -> float:
    """The share of all calls that kept the limits; with a limit on workflows, the share of workflows that did."""
    if "workflow" in slo:
        rows = workflows(result, slo)
        return sum(row.kept and row.seconds <= slo["workflow"] for row in rows) / len(rows) if rows else 0.0
    served = result.served
    return attainment_of([timing_of(one) for one in served], [one.call.slo for one in served], slo)


def attainment_of(timings: Sequence[RequestTiming], own: Sequence[Slo | None], slo: Mapping[str, float]) -> float:
    """The same where requests have wishes of their own, which count in the place of `slo`."""
    kept = sum(keeps(timing, limits_of(wish, slo)) for timing, wish in zip(timings, own, strict=True))
    return kept / len(timings) if timings else 0.0


def limits_of(own: Slo | None, slo: Mapping[str, float]) -> Mapping[str, float]:
    if own is None:
        return slo
    wishes = {"ttft": own.ttft_s, "tpot": own.tpot_s, "e2el": own.e2e_s}
    return {name: seconds for name, seconds in wishes.items() if seconds is not None}


def found_of(
    result: Result, metrics: Sequence[str], percentiles: Sequence[float], slo: Mapping[str, float]
) -> dict[str, Any]:
    """The numbers, by the names under which `millstream bench serve` has them, and those of the cluster beside them."""
    timings = [timing_of(one) for one in result.served]
    good = [one for one in timings if one.error is None and one.token_times_s]
    duration = result.duration_s
    prompt, output = sum(one.num_prompt for one in good), sum(one.num_output for one in good)
    limits = [limits_of(one.call.slo, slo) for one in result.served]
    kept = sum(keeps(timing, own) for timing, own in zip(timings, limits, strict=True))
    slo = slo or next((own for own in limits if own), {})
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(timings) - len(good),
        "shed": 0,
        "total_input_tokens": prompt,
        "total_cached_tokens": sum(one.cached_tokens for one in good),
        "total_output_tokens": output,
        "request_throughput": _rate(len(good), duration),
        "request_goodput": _rate(kept, duration) if slo else None,
        "slo_attainment": attainment(result, slo) if slo and timings else None,
        "output_throughput": _rate(output, duration),
        "total_token_throughput": _rate(prompt + output, duration),
        "max_output_tokens_per_s": peak_rate(good),
        "max_concurrent_requests": peak_open([(one.arrival_s, one.token_times_s[-1]) for one in good]),
        "errors_by_kind": dict(Counter(one.error[:160] for one in timings if one.error).most_common()),
        "steps": result.steps,
        "preemptions": sum(one.preemptions for one in result.served),
        "retries": sum(one.retries for one in result.served),
        "busy": [round(_rate(busy, duration), 4) for busy in result.busy_s],
        "fingerprint": result.fingerprint,
    }
    if rows := workflows(result):
        ends = sorted(row.seconds for row in rows if row.seconds < math.inf)
        found["workflows"] = len(rows)
        for name, q in (("median", 50), ("p95", 95), ("p99", 99)):
            found[f"{name}_workflow_s"] = percentile(ends, q) if ends else None
    if result.scaling is not None:
        found |= scaling_of(result.scaling)
    values = {
        "ttft": [one.ttft_s for one in good if one.ttft_s is not None],
        "tpot": [one.tpot_s for one in good if one.tpot_s is not None],
        "itl": [gap for one in good for gap in one.gaps_s],
        "e2el": [one.e2el_s for one in good if one.e2el_s is not None],
    }
    for name in metrics:
        if name not in values:
            raise BadRequest("metrics", name, ", ".join(values))
        found |= statistics_of(name, values[name], percentiles)
    return found


def scaling_of(log: ScalingLog) -> dict[str, Any]:
    """What became of the number of replicas: what was paid for, and how often it changed."""
    return {
        "replica_seconds": log.replica_seconds,
        "mean_replicas": _rate(log.replica_seconds, log.end_s),
        "peak_replicas": log.peak,
        "scale_changes": len(log.changes),
        "scale_reversals": log.reversals,
        "failed_starts": sum(span.failed_starts for span in log.spans),
    }


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One tenant: requests, times in seconds, the share that kept the limits, and its service in weighted tokens."""

    tenant: str
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    attainment: float
    service: float


def tenants(result: Result, slo: Mapping[str, float]) -> list[TenantRow]:
    by: dict[str, list[Served]] = {}
    for one in result.served:
        by.setdefault(one.call.tenant, []).append(one)
    rows = []
    for tenant, served in sorted(by.items()):
        timings = [timing_of(one) for one in served]
        ttft = sorted(one.ttft_s for one in timings if one.ttft_s is not None)
        tpot = sorted(one.tpot_s for one in timings if one.tpot_s is not None)
        rows.append(
            TenantRow(
                tenant,
                len(timings),
                percentile(ttft, 50) if ttft else math.nan,
                percentile(ttft, 99) if ttft else math.nan,
                percentile(tpot, 50) if tpot else math.nan,
                attainment_of(timings, [one.call.slo for one in served], slo),
                sum(PROMPT_WEIGHT * one.num_prompt + OUTPUT_WEIGHT * one.num_output for one in timings),
            )
        )
    return rows


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all are equal, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def chrome_trace(result: Result) -> dict[str, Any]:
    """Steps of every replica and what waits there, as chrome://tracing and Perfetto read them. Microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": place, "name": "process_name", "args": {"name": replica.name}}
        for place, replica in enumerate(result.replicas)
    ]
    for step in result.made:
        kind = "mixed" if 0 < step.prompt_tokens < step.tokens else "prefill" if step.prompt_tokens else "decode"
        start = round(step.start_s * 1e6, 3)
        events.append(
            {
                "ph": "X",
                "pid": step.replica,
                "tid": 0,
                "name": kind,
                "ts": start,
                "dur": round(step.seconds * 1e6, 3),
                "args": {"rows": step.rows, "tokens": step.tokens, "prompt_tokens": step.prompt_tokens},
            }
        )
        counts = {"running": step.running, "waiting": step.waiting}
        events.append({"ph": "C", "pid": step.replica, "name": "requests", "ts": start, "args": counts})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def capacity(
    run: Callable[[float], Result], slo: Mapping[str, float], share: float, low: float, tolerance: float = 0.03
) -> float:
    """The largest rate (requests a second) at which `share` of the calls keep the limits. `run` simulates a rate; the
    others are those of `largest`."""
    return largest(lambda rate: attainment(run(rate), slo) >= share, low, tolerance)


def largest(keeps: Callable[[float], bool], low: float, tolerance: float = 0.03, step: float = 2.0) -> float:
    """The largest value that keeps a limit which smaller ones keep too, within `tolerance` of it.

    `low` is where the search begins, `step` the factor by which it goes on from there. 0 where not even a hundredth of
    `low` will do.
    """
    first = low
    if keeps(low):
        high = step * low
        while keeps(high):
            low, high = high, step * high
            if high > first * 2**20:
                return low
    else:
        high, low = low, low / step
        while not keeps(low):
            high, low = low, low / step
            if low < first / 100:
                return 0.0
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
