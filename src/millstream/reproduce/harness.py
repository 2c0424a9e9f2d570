"""Runs an experiment: correctness first, then its arms interleaved in one process, then a verdict.

The order rotates with every repeat (AB, BA, AB ... for two arms; ABC, BCA, CAB for three), so that a machine that
slowly warms up or slows down cannot favour one arm. Numbers are medians over the repeats with their quartiles and
range; ratios are also taken repeat by repeat, where drift cancels.

Verdicts: `void` when a correctness check failed (no number counts then), `failed` when a required row does not hold,
`partly` when the only ones that do not hold are known to be out of reach here, else `works`.
"""

from __future__ import annotations

import gc
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from millstream.core.errors import ConfigError
from millstream.reproduce import machine
from millstream.reproduce.ledger import (
    MIN_QUICK_REPEATS,
    MIN_REPEATS,
    SCHEMA,
    SOURCE_ROOT,
    ArmRecord,
    CheckRecord,
    FigureRecord,
    MetricRecord,
    Outcome,
    Record,
    RequiredRecord,
    SideRecord,
    Spread,
    Verdict,
    combined,
    hash_files,
)
from millstream.reproduce.protocol import Arm, CheckResult, CheckRow, Context, Experiment, Figure, Of, Required, audit

Stage = Literal["open", "check", "warm-up", "measure", "note"]


@dataclass(frozen=True, slots=True)
class Tick:
    """Progress: `done` of `total` runs of arms are over; `text` is the arm about to run, or a note."""

    stage: Stage
    done: int
    total: int
    text: str


Samples = dict[str, list[Mapping[str, float]]]


def run(
    experiment: Experiment,
    *,
    quick: bool = False,
    repeats: int | None = None,
    data: Path | None = None,
    seed: int = 0,
    progress: Callable[[Tick], None] | None = None,
    root: Path = SOURCE_ROOT,
) -> Record:
    """Runs `experiment` and returns its record (not written anywhere).

    `repeats` raises the number of repeats above what the experiment declares. Raises ConfigError when the experiment
    contradicts itself, and whatever typed error `open` and `measure` raise (a missing model is no verdict).
    """
    audit(experiment)
    declared = experiment.quick_repeats if quick else experiment.repeats
    num_repeats = declared if repeats is None else repeats
    fewest = MIN_QUICK_REPEATS if quick else MIN_REPEATS
    if num_repeats < fewest:
        raise ConfigError(f"repeats: got {num_repeats}, allowed is at least {fewest}")
    tell = progress or (lambda tick: None)
    files = hash_files(experiment.files(), root)
    load_before = machine.load()
    start = time.monotonic()
    total = (experiment.warmup + num_repeats) * len(experiment.arms)

    with tempfile.TemporaryDirectory(prefix="millstream-reproduce-") as scratch:
        ctx = Context(quick, seed, data, Path(scratch), lambda text: tell(Tick("note", 0, total, text)))
        try:
            tell(Tick("open", 0, total, experiment.title))
            experiment.open(ctx)
            inputs = {name: _hash_input(name, value) for name, value in sorted(experiment.inputs(ctx).items())}
            tell(Tick("check", 0, total, "correctness"))
            checks = list(_check(experiment, ctx))
            samples: Samples = {arm.name: [] for arm in experiment.arms}
            order: list[tuple[str, ...]] = []
            if CheckResult(tuple(checks)).passed:
                _measure_all(experiment, ctx, num_repeats, samples, order, tell, total)
                checks = _merged([*checks, *ctx.late_checks])
            described = machine.describe(load_before)
        finally:
            experiment.close()
            gc.collect()

    seconds = time.monotonic() - start
    sound = CheckResult(tuple(checks)).passed
    figures = tuple(_figure(row, samples) for row in experiment.claim.figures)
    required = tuple(_required(row, samples, sound) for row in experiment.required)
    verdict, why = _verdict(checks, required)
    commit, dirty = machine.commit(root)
    return Record(
        schema=SCHEMA,
        name=experiment.name,
        paper=experiment.paper,
        title=experiment.title,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        quick=quick,
        verdict=verdict,
        why=why,
        claim=experiment.claim.text,
        figures=figures,
        required=required,
        checks=tuple(CheckRecord(row.name, row.passed, row.detail) for row in checks),
        metrics=tuple(MetricRecord(m.name, m.unit, m.better, m.description) for m in experiment.metrics),
        arms=tuple(_arm(arm, samples[arm.name]) for arm in experiment.arms),
        order=tuple(order),
        warmup=experiment.warmup,
        seconds=round(seconds, 3),
        warnings=_warnings(experiment, samples, figures, required, quick, seconds, described),
        inputs=inputs,
        files=files,
        hash=combined(files),
        commit=commit,
        dirty=dirty,
        machine=described,
    )


def rotated(arms: Sequence[Arm], repeat: int) -> tuple[Arm, ...]:
    """The arms in the order of one repeat."""
    first = repeat % len(arms)
    return (*arms[first:], *arms[:first])


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles (linear between order statistics) and range. `values` is not empty."""
    ordered = sorted(values)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    return Spread(tuple(values), statistics.median(ordered), quantile(0.25), quantile(0.75), ordered[0], ordered[-1])


def _check(experiment: Experiment, ctx: Context) -> tuple[CheckRow, ...]:
    try:
        rows = experiment.check(ctx).rows
    except AssertionError as error:
        rows = (CheckRow("check", False, str(error) or "an assertion failed"),)
    # `expect` may be used inside of check as well.
    rows, ctx.late_checks = (*rows, *ctx.late_checks), []
    return rows or (CheckRow("check", False, "the experiment checked nothing"),)


def _measure_all(
    experiment: Experiment,
    ctx: Context,
    num_repeats: int,
    samples: Samples,
    order: list[tuple[str, ...]],
    tell: Callable[[Tick], None],
    total: int,
) -> None:
    done = 0
    for repeat in range(-experiment.warmup, num_repeats):
        ctx.repeat = repeat
        arms = rotated(experiment.arms, repeat)
        taken: dict[str, dict[str, float]] = {}
        for arm in arms:
            tell(Tick("measure" if repeat >= 0 else "warm-up", done, total, arm.name))
            gc.collect()
            try:
                taken[arm.name] = _sample(experiment, ctx, arm)
            except AssertionError as error:
                ctx.expect(f"{arm.name}, repeat {repeat}", False, str(error) or "an assertion failed")
            if not all(row.passed for row in ctx.late_checks):
                # A wrong answer voids the record: no more time goes into it, and only whole repeats stay.
                return
            done += 1
        if repeat < 0:
            continue
        for name, values in taken.items():
            earlier = samples[name]
            if earlier and set(earlier[0]) != set(values):
                raise ConfigError(
                    f"experiment {experiment.name!r}: arm {name!r} measured {sorted(earlier[0])}, then {sorted(values)}"
                )
            earlier.append(values)
        order.append(tuple(arm.name for arm in arms))
    tell(Tick("measure", done, total, "done"))


def _sample(experiment: Experiment, ctx: Context, arm: Arm) -> dict[str, float]:
    taken = experiment.measure(ctx, arm)
    known = [metric.name for metric in experiment.metrics]
    for name, value in taken.items():
        if name not in known:
            raise ConfigError(
                f"experiment {experiment.name!r}: arm {arm.name!r} measured {name!r}; declared are {', '.join(known)}"
            )
        if not math.isfinite(value):
            raise ConfigError(f"experiment {experiment.name!r}: {name} of {arm.name} is {value}, not a finite number")
    return {name: float(value) for name, value in taken.items()}


def _merged(rows: Sequence[CheckRow]) -> list[CheckRow]:
    """One row a name: checks that every repeat makes again are told once, with the first failure if there is one."""
    by_name: dict[str, CheckRow] = {}
    for row in rows:
        seen = by_name.get(row.name)
        if seen is None or (seen.passed and not row.passed):
            by_name[row.name] = row
    return list(by_name.values())


def _hash_input(name: str, value: bytes | Path) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    try:
        with value.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"input {name!r} cannot be read: {error.strerror or error}") from error


def _arm(arm: Arm, samples: Sequence[Mapping[str, float]]) -> ArmRecord:
    names = list(samples[0]) if samples else []
    return ArmRecord(arm.name, arm.description, {name: spread([taken[name] for taken in samples]) for name in names})


def _values(side: Of, samples: Samples) -> list[float] | None:
    taken = samples[side.arm]
    if not taken or side.metric not in taken[0]:
        return None
    return [one[side.metric] for one in taken]


def _quotients(of: Of, over: Of | None, samples: Samples) -> tuple[float | None, list[float] | None]:
    """(ratio of medians, ratios repeat by repeat); of one side alone its median and values. None: not measured."""
    upper = _values(of, samples)
    if upper is None:
        return None, None
    if over is None:
        return statistics.median(upper), upper
    lower = _values(over, samples)
    if lower is None:
        return None, None
    below = statistics.median(lower)
    ratio = statistics.median(upper) / below if below else None
    paired = [a / b for a, b in zip(upper, lower, strict=True)] if all(lower) else None
    return ratio, paired


def _side(side: Of) -> SideRecord:
    return SideRecord(side.arm, side.metric)


def _figure(row: Figure, samples: Samples) -> FigureRecord:
    ours, each = _quotients(row.of, row.over, samples)
    return FigureRecord(
        text=row.text,
        of=_side(row.of),
        over=_side(row.over) if row.over else None,
        low=row.low,
        high=row.high,
        ours=ours,
        repeats=spread(each) if each else None,
    )


def _required(row: Required, samples: Samples, sound: bool) -> RequiredRecord:
    value, each = _quotients(row.of, row.over, samples)
    if row.how == "paired":
        value = statistics.median(each) if each else None
    bounded = row.at_least is not None or row.at_most is not None
    if row.how == "every":
        held = each is not None and all(_within(one, row) for one in each)
        if each:
            value = next((one for one in each if not _within(one, row)), value)
    else:
        held = value is not None and _within(value, row)
    outcome: Outcome
    reason = ""
    if held and bounded and sound:
        outcome = "passed"
    elif row.elsewhere:
        outcome, reason = "elsewhere", row.elsewhere
    elif row.out_of_reach and sound:
        outcome, reason = "out of reach", row.out_of_reach
    else:
        outcome = "failed"
        reason = "a correctness check failed" if not sound else "not measured" if value is None else ""
    return RequiredRecord(
        text=row.text,
        of=_side(row.of),
        over=_side(row.over) if row.over else None,
        at_least=row.at_least,
        at_most=row.at_most,
        how=row.how,
        value=value,
        repeats=spread(each) if each else None,
        outcome=outcome,
        reason=reason,
    )


def _within(value: float, row: Required) -> bool:
    return (row.at_least is None or value >= row.at_least) and (row.at_most is None or value <= row.at_most)


def _verdict(checks: Sequence[CheckRow], required: Sequence[RequiredRecord]) -> tuple[Verdict, tuple[str, ...]]:
    wrong = [row for row in checks if not row.passed]
    if wrong:
        return "void", tuple(f"{row.name}: {row.detail}" if row.detail else row.name for row in wrong)
    missed = [row for row in required if row.outcome == "failed"]
    if missed:
        return "failed", tuple(f"{row.text}: {_found(row)}" for row in missed)
    beyond = [row for row in required if row.outcome == "out of reach"]
    if beyond:
        return "partly", tuple(f"{row.text}: {row.reason}" for row in beyond)
    return "works", ()


def _found(row: RequiredRecord) -> str:
    return row.reason if row.value is None else f"{row.value:.4g}"


# Above this share of the median between the quartiles, a number is called noisy.
NOISY = 0.2
# Other work per core above which the machine is called busy.
BUSY = 0.5


def _warnings(
    experiment: Experiment,
    samples: Samples,
    figures: Sequence[FigureRecord],
    required: Sequence[RequiredRecord],
    quick: bool,
    seconds: float,
    described: machine.Machine,
) -> tuple[str, ...]:
    found: list[str] = []
    for arm in experiment.arms:
        for metric in experiment.metrics:
            values = _values(Of(arm.name, metric.name), samples)
            if values is None:
                continue
            one = spread(values)
            if one.median and (one.q3 - one.q1) / abs(one.median) > NOISY:
                share = (one.q3 - one.q1) / abs(one.median)
                found.append(
                    f"noise: {metric.name} of {arm.name} varies by {share:.0%} of its median between quartiles"
                )
    rows: Sequence[FigureRecord | RequiredRecord] = (*required, *figures)
    for row in rows:
        each = row.repeats
        if row.over is None or each is None:
            continue
        effect, width = abs(each.median - 1.0), each.q3 - each.q1
        if width > effect:
            found.append(f"noise: {row.text}: the spread {width:.3g} is larger than the effect {effect:.3g}")
    for row in required:
        if row.outcome == "passed" and row.how != "every" and row.repeats is not None:
            low = -math.inf if row.at_least is None else row.at_least
            high = math.inf if row.at_most is None else row.at_most
            misses = sum(not low <= value <= high for value in row.repeats.values)
            if misses:
                found.append(f"close: {row.text}: {misses} of {len(row.repeats.values)} repeats miss the bound")
    if described.load_before is not None and described.load_before > BUSY * described.cores:
        found.append(
            f"busy: the machine had a load of {described.load_before} on {described.cores} cores before the run"
        )
    meant = experiment.quick_seconds if quick else experiment.seconds
    if seconds > meant:
        found.append(f"slow: took {seconds:.0f} s, meant to take {meant:.0f} s")
    return tuple(dict.fromkeys(found))
