"""The knee: how many tokens a step must have before more of them no longer make it faster by the token.

Forward time is nearly flat while reading the weights dominates and nearly linear afterwards, so tokens a second grow
steeply, then level off (DeepSpeed-FastGen, section 3.1). The knee here is the smallest step whose tokens a second reach
`SHARE` of the best of the curve.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from millstream.bench.drive import drive
from millstream.core.registry import Choice
from millstream.core.request import Kind, Request, SamplingParams, Tokens
from millstream.engine.assemble import Assembled, build_engine

SIZES = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Knee:
    """`curve` holds (tokens a step, median seconds, least and most seconds)."""

    step_tokens: int
    tokens_per_s: float
    curve: tuple[tuple[int, float, float, float], ...]


def measure_knee(
    assembled: Assembled,
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Knee:
    """Times one step of each size on the real runner: a prompt's first chunk, fresh tokens each time.

    Sizes are interleaved, so that a machine that slows down does so for all of them. Nothing else may use the engine
    meanwhile.
    """
    limit = min(assembled.resolved.max_context - 1, sum(assembled.resolved.blocks.values()) * 8)
    sizes = [size for size in sizes if size < limit] or [min(sizes)]
    config = replace(assembled.resolved.config, cache=replace(assembled.resolved.config.cache, prefix=Choice("none")))
    draw = random.Random(0)
    ids = itertools.count(1)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    done = 0
    # The first round warms up and is not kept.
    for turn in range(repeats + 1):
        for size in sizes:
            meters = (Choice("splitfuse", {"budget": size}), Choice("seats"), Choice("kv-blocks"))
            resolved = replace(assembled.resolved, meters=meters)
            engine = build_engine(assembled.built.runner, assembled.spec, assembled.tokenizer, config, resolved)
            prompt = tuple(draw.randrange(assembled.spec.vocab_size) for _ in range(size))
            run = drive(engine, [Request(next(ids), (Tokens(prompt),), SamplingParams(max_tokens=1), kind=Kind.SCORE)])
            if turn:
                times[size].append(min(run.step_s))
            done += 1
            if progress is not None:
                progress(done, (repeats + 1) * len(sizes))
    curve = tuple((size, statistics.median(t), min(t), max(t)) for size, t in times.items())
    best = max(size / seconds for size, seconds, _, _ in curve)
    knee, seconds = next((size, s) for size, s, _, _ in curve if size / s >= SHARE * best)
    return Knee(knee, knee / seconds, curve)
