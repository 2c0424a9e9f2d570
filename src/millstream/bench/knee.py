"""The knee: how many tokens a step should have.

Small steps read all weights for few tokens; beyond some size the arithmetic is the limit, and larger steps only make
everybody wait longer. Seconds are measured against tokens a step, one prefill chunk a step with one sampled row, on the
engine's own runner. The knee is the smallest size whose tokens a second are at least SHARE of the best.
"""

from __future__ import annotations

import datetime
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from millstream.core.errors import BadRequest, RequestFault
from millstream.core.plan import Extend, Holding, SampleAsk, StepPlan
from millstream.core.request import SamplingParams
from millstream.engine.assemble import Assembled

SHARE = 0.95
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
        """What `engine.assemble.measured_knee` reads, with the curve that it came from."""
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


def measure_knee(
    assembled: Assembled,
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Knee:
    """Runs the curve. The engine must be idle, and its KV is overwritten: close it afterwards.

    Sizes beyond what context and KV hold are left out. Repeats are interleaved, in a new order each. Raises BadRequest.
    """
    if repeats < 1:
        raise BadRequest("repeats", repeats, "an integer from 1")
    capacity = assembled.built.runner.capacity()
    room = min(assembled.engine.limits.max_context - 1, min(capacity.blocks.values()) * capacity.block_size)
    usable = sorted({size for size in sizes if 0 < size <= room})
    if not usable:
        raise BadRequest("sizes", list(sizes), f"some from 1 to {room}")
    source = random.Random(seed)
    taken: dict[int, list[float]] = {size: [] for size in usable}
    step = 0
    # The first round is the warm-up.
    for turn in range(repeats + 1):
        order = list(usable)
        source.shuffle(order)
        for size in order:
            step += 1
            seconds = _step(assembled, size, step, source)
            if turn:
                taken[size].append(seconds)
        say(f"round {turn} of {repeats}" if turn else "warm-up")
    curve = tuple(Point(size, statistics.median(took), min(took), max(took)) for size, took in taken.items())
    return Knee(find_knee(curve), datetime.date.today().isoformat(), curve)


def _step(assembled: Assembled, size: int, step: int, source: random.Random) -> float:
    runner, spec = assembled.built.runner, assembled.spec
    block_size = runner.capacity().block_size
    blocks = tuple(range(math.ceil((size + 1) / block_size)))
    seq = -step
    extend = Extend(
        seq,
        0,
        tuple(source.randrange(spec.vocab_size) for _ in range(size)),
        tuple(Holding(group.name, blocks[: math.ceil(size / block_size)], size) for group in spec.groups),
        sample=SampleAsk(SamplingParams(temperature=0.0), 0, 0, size, size),
        decode=assembled.engine.decode.name,
    )
    started = time.perf_counter()
    result = runner.collect(runner.launch(StepPlan(-step, (extend,), forgotten=(seq + 1,))))
    seconds = time.perf_counter() - started
    fault = result.settled[0].fault
    if fault is not None:
        raise RequestFault(fault)
    return seconds
