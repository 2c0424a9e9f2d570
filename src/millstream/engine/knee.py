"""The knee: how many tokens a step should have.

Small steps read all weights for few tokens; beyond some size the arithmetic is the limit, and larger steps only make
everybody wait longer. Seconds are measured against tokens a step, one prefill chunk a step with one sampled row, on the
engine's own runner. The knee is the smallest size whose tokens a second are at least SHARE of the best.

`first_knee` is what a model's first start can afford, `measure_knee` the curve with its spread. Either is kept by
model, way of keeping weights and machine, and sets the automatic sched.step_tokens.
"""

from __future__ import annotations

import datetime
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.config.load import home
from millstream.core.errors import BadRequest, RequestFault
from millstream.core.plan import Extend, Holding, SampleAsk, StepPlan
from millstream.core.request import SamplingParams
from millstream.models.home import write_atomically
from millstream.models.spec import ModelSpec

SHARE = 0.95
FIRST_SECONDS = 3.0
SIZES = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Point:
    """`seconds` is the median of the repeats; low and high are the quickest and the slowest of them."""

    tokens: int
    seconds: float
    low: float
    high: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Knee:
    step_tokens: int
    date: str
    curve: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        """What `known_knee` reads, with the curve that it came from."""
        return {
            "step_tokens": self.step_tokens,
            "date": self.date,
            "share_of_best": SHARE,
            "curve": [
                {
                    "tokens": point.tokens,
                    "seconds": point.seconds,
                    "low": point.low,
                    "high": point.high,
                    "tokens_per_s": point.tokens_per_s,
                }
                for point in self.curve
            ],
        }


def find_knee(curve: Sequence[Point], share: float = SHARE) -> int:
    """The smallest step with at least `share` of the best tokens a second. Raises ValueError on an empty curve."""
    best = max(point.tokens_per_s for point in curve)
    return min(point.tokens for point in curve if point.tokens_per_s >= share * best)


def knee_file(source: Any, weights: str) -> Path:
    """Where the knee of a model is kept whose matrices are kept as `weights`."""
    return Path(home() / "profiles" / f"knee-{source.checksum()[:16]}-{weights}.json")


def measured_on(date: str) -> str:
    return f"measured on {date}"


def known_knee(source: Any, weights: str) -> tuple[int | None, str]:
    """The step size that was measured for these weights, kept so, on this machine, and when."""
    try:
        found = json.loads(knee_file(source, weights).read_text())
        return int(found["step_tokens"]), measured_on(found["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def keep_knee(source: Any, weights: str, knee: Knee, **more: Any) -> Path:
    """Keeps a knee, and what else is worth knowing of it, for the starts to come. Returns where. Raises OSError."""
    path = knee_file(source, weights)
    write_atomically(path, json.dumps({**knee.as_json(), **more}).encode())
    return path


@dataclass(slots=True)
class Bench:
    """What is measured: an idle runner, whose KV is overwritten, with a model of `spec`.

    `max_context` in tokens; `decode` is the method that settles the one sampled row.
    """

    runner: Any
    spec: ModelSpec
    max_context: int
    decode: str
    _step: int = 0

    def usable(self, sizes: Sequence[int]) -> list[int]:
        """The sizes that context and KV hold, in order. Raises BadRequest when there is none."""
        capacity = self.runner.capacity()
        room = min(self.max_context - 1, min(capacity.blocks.values()) * capacity.block_size)
        usable = sorted({size for size in sizes if 0 < size <= room})
        if not usable:
            raise BadRequest("sizes", list(sizes), f"some from 1 to {room}")
        return usable

    def seconds(self, size: int, source: random.Random) -> float:
        """One step of `size` tokens. Raises RequestFault."""
        self._step += 1
        block_size = self.runner.capacity().block_size
        blocks = tuple(range(math.ceil((size + 1) / block_size)))
        extend = Extend(
            -self._step,
            0,
            tuple(source.randrange(self.spec.vocab_size) for _ in range(size)),
            tuple(Holding(group.name, blocks[: math.ceil(size / block_size)], size) for group in self.spec.groups),
            sample=SampleAsk(SamplingParams(temperature=0.0), 0, 0, size, size),
            decode=self.decode,
        )
        started = time.perf_counter()
        result = self.runner.collect(self.runner.launch(StepPlan(-self._step, (extend,), forgotten=(1 - self._step,))))
        seconds = time.perf_counter() - started
        fault = result.settled[0].fault
        if fault is not None:
            raise RequestFault(fault)
        return seconds

    def forget(self) -> None:
        """The runner no longer knows the last step's sequence."""
        self.runner.collect(self.runner.launch(StepPlan(-self._step - 1, (), forgotten=(-self._step,))))


def measure_knee(
    bench: Bench,
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Knee:
    """Runs the curve: repeats interleaved, in a new order each.

    Sizes beyond what context and KV hold are left out. Raises BadRequest and RequestFault.
    """
    if repeats < 1:
        raise BadRequest("repeats", repeats, "an integer from 1")
    usable = bench.usable(sizes)
    source = random.Random(seed)
    taken: dict[int, list[float]] = {size: [] for size in usable}
    # The first round is the warm-up.
    for turn in range(repeats + 1):
        order = list(usable)
        source.shuffle(order)
        for size in order:
            seconds = bench.seconds(size, source)
            if turn:
                taken[size].append(seconds)
        say(f"round {turn} of {repeats}" if turn else "warm-up")
    bench.forget()
    return _knee([Point(size, statistics.median(took), min(took), max(took)) for size, took in taken.items()])


def first_knee(bench: Bench, limit_s: float = FIRST_SECONDS, sizes: Sequence[int] = SIZES) -> Knee:
    """The curve from its small end until it turns down or `limit_s` seconds are over, the best of two of each size.

    The best and not the median: what else runs on the machine can only make a step slower. Raises BadRequest and
    RequestFault.
    """
    usable = bench.usable(sizes)
    source = random.Random(0)
    start = time.perf_counter()
    bench.seconds(usable[0], source)
    curve: list[Point] = []
    for size in usable:
        left = limit_s - (time.perf_counter() - start)
        if curve and (2 * curve[-1].seconds * size / curve[-1].tokens > left or _turned(curve)):
            break
        took = [bench.seconds(size, source) for _ in range(2)]
        curve.append(Point(size, min(took), min(took), max(took)))
    bench.forget()
    return _knee(curve)


def _turned(curve: Sequence[Point]) -> bool:
    """Neither of the last two sizes was worth more than the best of those before."""
    rates = [point.tokens_per_s for point in curve]
    return len(rates) > 2 and max(rates[-2:]) < max(rates[:-2]) / SHARE


def _knee(curve: Sequence[Point]) -> Knee:
    return Knee(find_knee(curve), datetime.date.today().isoformat(), tuple(curve))
