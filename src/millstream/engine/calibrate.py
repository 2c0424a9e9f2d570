"""Measures how long an engine's steps take, by what is in them, and learns a model of it for the simulator.

Compositions (tokens of a prompt, rows that decode, keys that these read) are computed on the engine's own runner, in a
new order each round, with blocks of their own and whatever lies in them. What the host adds to a step is measured on
the engine itself, under real requests, and added. Whole regions of compositions are held out: the error that is told is
the one on those.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from millstream.core import registry
from millstream.core.client import Chunk
from millstream.core.errors import BadRequest, RequestFault, Told
from millstream.core.events import Stepped
from millstream.core.plan import Extend, Holding, SampleAsk, StepPlan
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.shape import StepShape, shape_of
from millstream.sched.fitting import mean_error
from millstream.sched.profiles import Profile
from millstream.sched.protocol import StepCost

PREFILLS = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
STARTS = (0, 512, 1536)
ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024)
# Rows that share tokens at their beginning, and have so many of their own.
SHARED_ROWS, SHARED, OWN = (2, 4, 8, 16, 32, 64), (256, 1024), 64
MIXED_ROWS, MIXED_PREFILLS = (1, 4, 16, 48), (16, 64, 128, 256)
FORMS = ("linear", "piecewise")
# An error below this, or below so many times what repeats differ by, is as good as it gets.
GOOD, NOISES = 0.05, 1.5


@dataclass(frozen=True, slots=True)
class Composition:
    """`prefill` tokens of one prompt from position `start` on, beside `rows` that each read `context` keys.

    All rows share the first `shared` of their keys, in whole blocks.
    """

    prefill: int = 0
    start: int = 0
    rows: int = 0
    context: int = 0
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Of KV that it needs a place for."""
        return (self.start + self.prefill + 1 if self.prefill else 0) + (
            self.shared + self.rows * (self.context - self.shared + 1)
        )

    @property
    def held_out(self) -> bool:
        """Regions that the model of times is not shown: all mixes of 16 rows, batches of 8, prompts of 96 and 384."""
        if self.prefill and self.rows:
            return self.rows == 16
        return self.rows == 8 or self.prefill in (96, 384)


@dataclass(frozen=True, slots=True)
class Measured:
    """One composition: its shape, the median of its repeats, and their mean distance from that, as a share."""

    composition: Composition
    shape: StepShape
    seconds: float
    spread: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`errors` are those on held-out compositions by form; `host_s` what the host adds: a step's share and a row's."""

    measured: tuple[Measured, ...]
    errors: dict[str, float]
    fit_errors: dict[str, float]
    noise: float
    host_s: tuple[float, float]
    best: str
    cost: StepCost

    @property
    def target(self) -> float:
        return max(GOOD, NOISES * self.noise)


def grid(room: int, max_context: int, block_size: int) -> list[Composition]:
    """All compositions that `room` tokens of KV and the context hold. Raises BadRequest when there are too few."""
    found = [Composition(prefill, start) for prefill in PREFILLS for start in STARTS]
    found += [Composition(rows=rows, context=context) for rows in ROWS for context in CONTEXTS]
    found += [Composition(rows=rows, context=much + OWN, shared=much) for rows in SHARED_ROWS for much in SHARED]
    found += [Composition(prefill, 0, rows, 256) for rows in MIXED_ROWS for prefill in MIXED_PREFILLS]
    fits = [
        one
        for one in found
        if max(one.start + one.prefill, one.context) + 1 < max_context
        # Every row ends in a block that is filled in part.
        and one.tokens + (one.rows + 1) * block_size <= room
    ]
    if len(fits) < 30:
        raise BadRequest("blocks", Told(f"a KV cache of {room} tokens"), "one that holds at least 30 compositions")
    return fits


class Steps:
    """Computes compositions on an idle runner, whose KV is overwritten."""

    def __init__(self, runner: Any, spec: Any, decode: str, seed: int = 0) -> None:
        self.runner, self.spec, self.decode = runner, spec, decode
        self.block_size = runner.capacity().block_size
        self._draw = random.Random(seed)
        self._seq = self._plans = 0
        self._gone: tuple[int, ...] = ()

    def seconds(self, composition: Composition) -> tuple[StepShape, float]:
        """One step's shape and seconds. Raises RequestFault.

        Where all rows decode it is their second step that is timed: most such steps follow another of the same rows,
        of which the runner knows the blocks and the caches some of the weights.
        """
        self._at = 0
        extends = []
        if composition.prefill:
            extends.append(self._extend(composition.start, composition.prefill))
        shared = self._take(composition.shared // self.block_size)
        extends += [self._extend(composition.context - 1, 1, shared) for _ in range(composition.rows)]
        if not composition.prefill:
            self._run([replace(extend, start=extend.start - 1) for extend in extends])
        return self._run(extends)

    def _run(self, extends: Sequence[Extend]) -> tuple[StepShape, float]:
        self._plans += 1
        seqs = tuple(extend.seq for extend in extends)
        plan = StepPlan(-self._plans, tuple(extends), forgotten=tuple(one for one in self._gone if one not in seqs))
        self._gone = seqs
        started = time.perf_counter()
        result = self.runner.collect(self.runner.launch(plan))
        took = time.perf_counter() - started
        for settled in result.settled:
            if settled.fault is not None:
                raise RequestFault(settled.fault)
        return shape_of(plan, self.block_size), took

    def _take(self, number: int) -> tuple[int, ...]:
        self._at += number
        return tuple(range(self._at - number, self._at))

    def _extend(self, start: int, count: int, shared: tuple[int, ...] = ()) -> Extend:
        self._seq += 1
        stop = start + count
        blocks = shared + self._take(math.ceil((stop + 1) / self.block_size) - len(shared))
        held = blocks[: math.ceil(stop / self.block_size)]
        return Extend(
            -self._seq,
            start,
            tuple(self._draw.randrange(self.spec.vocab_size) for _ in range(count)),
            tuple(Holding(group.name, held, stop) for group in self.spec.groups),
            sample=SampleAsk(SamplingParams(temperature=0.0), 0, 0, stop, stop),
            decode=self.decode,
        )

    def forget(self) -> None:
        """The runner no longer knows the last sequences."""
        self.runner.collect(self.runner.launch(StepPlan(-self._plans - 1, (), forgotten=self._gone)))
        self._gone = ()


def measure(
    steps: Steps, compositions: Sequence[Composition], repeats: int, seed: int, advance: Callable[[], None] | None
) -> list[Measured]:
    """The first round is the warm-up. Raises BadRequest and RequestFault."""
    if repeats < 3:
        raise BadRequest("repeats", repeats, "an integer from 3")
    draw = random.Random(seed)
    taken: dict[Composition, list[float]] = {one: [] for one in compositions}
    shapes: dict[Composition, StepShape] = {}
    for turn in range(repeats + 1):
        order = list(compositions)
        draw.shuffle(order)
        for one in order:
            shapes[one], seconds = steps.seconds(one)
            if turn:
                taken[one].append(seconds)
            if advance is not None:
                advance()
    steps.forget()
    out = []
    for one, times in taken.items():
        middle = statistics.median(times)
        spread = statistics.fmean(abs(second - middle) for second in times) / middle
        out.append(Measured(one, shapes[one], middle, spread))
    return out


def host_part(engine: Any, count: int, vocab_size: int, seed: int) -> tuple[float, float]:
    """What the host adds to a step: seconds a step and seconds a row, from `count` real requests of many sizes."""
    draw = random.Random(seed)
    steps: list[Stepped] = []
    engine.listeners.append(lambda event: steps.append(event) if isinstance(event, Stepped) else None)
    rows: list[tuple[int, float]] = []
    ids = iter(range(1 << 40, 1 << 41))

    def sink(chunk: Chunk) -> None:
        pass

    for turn in range(count):
        prompt = Tokens(tuple(draw.randrange(vocab_size) for _ in range(draw.randint(4, 32))))
        params = SamplingParams(max_tokens=draw.randint(8, 24), temperature=0.0, ignore_eos=True)
        engine.submit(Request(next(ids), (prompt,), params), sink)
        # They come a few at a time, so that batches of all sizes occur.
        while engine.busy and (turn % 4 or turn == count - 1):
            before = len(steps)
            started = time.perf_counter()
            engine.step()
            took = time.perf_counter() - started
            if len(steps) > before:
                rows.append((steps[-1].rows, max(0.0, took - steps[-1].seconds)))
            if turn < count - 1:
                break
    engine.listeners.pop()
    if len(rows) < 2:
        return 0.0, 0.0
    mean_rows, mean_s = statistics.fmean(row for row, _ in rows), statistics.fmean(second for _, second in rows)
    spread = sum((row - mean_rows) ** 2 for row, _ in rows)
    slope = sum((row - mean_rows) * (second - mean_s) for row, second in rows) / spread if spread else 0.0
    slope = max(0.0, slope)
    return max(0.0, mean_s - slope * mean_rows), slope


def learn(measured: Sequence[Measured], host_s: tuple[float, float]) -> Calibration:
    """Fits every form without what is held out, and the better one to everything. Raises BadRequest."""
    samples = [
        (one.shape, one.seconds + host_s[0] + host_s[1] * (one.shape.prefill_rows + one.shape.decode_rows))
        for one in measured
    ]
    held = [place for place, one in enumerate(measured) if one.composition.held_out]
    shown = [samples[place] for place in range(len(samples)) if place not in set(held)]
    errors, fit_errors = {}, {}
    for form in FORMS:
        cost: StepCost = registry.make("step-cost", form)
        cost.fit(shown)
        fit_errors[form] = cost.residual()
        seconds = [samples[place][1] for place in held]
        errors[form] = mean_error([cost.seconds(samples[place][0]) for place in held], seconds)
    best = min(errors, key=errors.__getitem__)
    whole: StepCost = registry.make("step-cost", best)
    whole.fit(samples)
    noise = statistics.fmean(one.spread for one in measured)
    return Calibration(tuple(measured), errors, fit_errors, noise, host_s, best, whole)


# -- of an engine that is assembled


def grid_of(made: Any) -> list[Composition]:
    """The compositions that its KV cache and context have room for. Raises BadRequest for too few."""
    capacity = made.engine.runner.capacity()
    room = min(capacity.blocks.values()) * capacity.block_size
    return grid(room, made.resolved.max_context, capacity.block_size)


def calibrate(
    made: Any,
    compositions: Sequence[Composition],
    repeats: int,
    seed: int = 0,
    requests: int = 32,
    advance: Callable[[], None] | None = None,
) -> Calibration:
    """Measures compositions on an engine's runner, and what its host adds under `requests`; learns from both.

    Raises BadRequest and RequestFault.
    """
    steps = Steps(made.engine.runner, made.spec, made.resolved.config.decode.name, seed)
    measured = measure(steps, compositions, repeats, seed, advance)
    return learn(measured, host_part(made.engine, requests, made.spec.vocab_size, seed))


def sizes_of(meters: Sequence[Choice]) -> tuple[int, int]:
    """Tokens of a step and rows at once, as meters have them."""
    options = {choice.name: choice.options for choice in meters}
    return int(options.get("splitfuse", {}).get("budget", 256)), int(options.get("seats", {}).get("max_rows", 256))


def profile_of(made: Any, found: Calibration) -> Profile:
    """What was learned of an engine, for the simulator; to be kept it wants a name and where it comes from."""
    resolved = made.resolved
    step_tokens, max_rows = sizes_of(resolved.meters)
    return Profile(
        name="here",
        model=made.spec.name,
        hardware="this machine",
        source="measured",
        cost=found.best,
        state=found.cost.state(),
        blocks=min(resolved.blocks.values()),
        block_size=resolved.block_size,
        step_tokens=step_tokens,
        max_rows=max_rows,
        max_context=resolved.max_context,
        error=found.errors[found.best],
        noise=found.noise,
    )
