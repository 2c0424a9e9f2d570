"""Scheduling policies side by side: the same calls under each, one row of numbers a policy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from millstream.core.registry import Choice
from millstream.sim.metrics import percentile
from millstream.sim.report import attainment_of, jain, timing_of
from millstream.sim.scenario import Prepared
from millstream.sim.simulate import Result, Served


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one policy. Seconds; `token_*` are a call's time from its arrival over its output tokens.

    `program_*` are that of programs (calls of one session; a call of none is one): the time in which any of its calls
    is inside, over all their output tokens. `fairness` is Jain's index over what tenants got for what they asked, 1 /
    mean `token_s` of each; `worst_ttft_p99_s` that of the tenant that is worst off. `within` is the share of calls that
    kept their limits. `planning_us` is what scheduling took a step, in real microseconds, the engine's books included.
    """

    policy: str
    ttft_mean_s: float
    ttft_p99_s: float
    token_mean_s: float
    token_p99_s: float
    program_mean_s: float
    program_p99_s: float
    fairness: float
    worst_ttft_p99_s: float
    within: float
    tokens_per_s: float
    preemptions: int
    cached: float
    planning_us: float


def compare(
    prepared: Prepared,
    stacks: Mapping[str, Sequence[Choice]],
    slo: Mapping[str, float],
    progress: Callable[[], None] | None = None,
    oracles: Sequence[str] = ("srpt",),
) -> list[Row]:
    """Runs each stack of policies, by its label, on the same calls. `oracles` are labels that may know true lengths."""
    calls = prepared.calls()
    rows = []
    for label, policies in stacks.items():
        scenario = replace(prepared.scenario, policies=tuple(policies), oracle=label in oracles)
        started = time.perf_counter()
        result = prepared.run(calls=calls, progress=progress, scenario=scenario)
        rows.append(row_of(label, result, slo, time.perf_counter() - started))
    return rows


def row_of(label: str, result: Result, slo: Mapping[str, float], wall_s: float = math.nan) -> Row:
    good = [one for one in result.served if not one.error and one.times_s]
    ttft = sorted(one.times_s[0] - one.arrival_s for one in good)
    token = sorted(token_s(one) for one in good)
    programs = sorted(program_token_s(result.served).values())
    tenants: dict[str, list[Served]] = {}
    for one in good:
        tenants.setdefault(one.call.tenant, []).append(one)
    shares = [1 / statistics.fmean(token_s(one) for one in own) for own in tenants.values()]
    worst = max(
        (percentile(sorted(one.times_s[0] - one.arrival_s for one in own), 99) for own in tenants.values()),
        default=math.nan,
    )
    prompt = sum(one.call.num_prompt for one in good)
    output = sum(len(one.times_s) for one in good)
    return Row(
        label,
        _mean(ttft),
        percentile(ttft, 99) if ttft else math.nan,
        _mean(token),
        percentile(token, 99) if token else math.nan,
        _mean(programs),
        percentile(programs, 99) if programs else math.nan,
        jain(shares),
        worst,
        attainment_of([timing_of(one) for one in result.served], [one.call.slo for one in result.served], slo),
        output / result.duration_s if result.duration_s else 0.0,
        sum(one.preemptions for one in result.served),
        sum(one.cached for one in good) / prompt if prompt else 0.0,
        1e6 * wall_s / max(1, result.steps),
    )


def token_s(one: Served) -> float:
    """A call's time from its arrival to its last token, over its tokens."""
    return (one.times_s[-1] - one.arrival_s) / len(one.times_s)


def program_token_s(served: Sequence[Served]) -> dict[str, float]:
    """By program: the time in which any of its calls was inside, over all its output tokens."""
    spans: dict[str, list[tuple[float, float]]] = {}
    tokens: dict[str, int] = {}
    for one in served:
        if not one.times_s:
            continue
        name = f"{one.call.tenant}\0{one.call.session}" if one.call.session else f"\0{one.call.id}"
        spans.setdefault(name, []).append((one.arrival_s, one.times_s[-1]))
        tokens[name] = tokens.get(name, 0) + len(one.times_s)
    found = {}
    for name, own in spans.items():
        own.sort()
        inside, until = 0.0, -math.inf
        for start, end in own:
            if end > until:
                inside += end - max(start, until)
                until = end
        found[name] = inside / tokens[name]
    return found


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
