"""Loads: what arrives when, and the run of a load against a model in this process."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest
from millstream.core.events import Event, Stepped
from millstream.core.request import SamplingParams
from millstream.sim.metrics import LoadReport, RequestTiming, StepTiming, summarize

if TYPE_CHECKING:
    from millstream.engine.engine import Engine
    from millstream.engine.llm import LLM
    from millstream.engine.outputs import OutputBuilder, RequestOutput


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a load. It arrives `at_s` seconds after the load starts.

    Equal salts share the prefix cache, different ones never hit each other.
    """

    ids: tuple[int, ...]
    params: SamplingParams
    at_s: float = 0.0
    salt: str = ""


@dataclass(slots=True)
class LoadRun:
    """What came of a load: stamps in the order of the asks, the steps, and the words where they were wanted."""

    timings: list[RequestTiming]
    steps: list[StepTiming]
    outputs: list[RequestOutput] = field(default_factory=list)

    def report(self) -> LoadReport:
        return summarize(self.timings, self.steps)


@dataclass(slots=True)
class _Open:
    place: int
    arrival_s: float
    times: list[float] = field(default_factory=list)
    unfinished: int = 1
    num_output: int = 0
    cached: int = 0
    finish: str = ""
    error: str | None = None


class StepRecorder:
    """A listener that keeps the steps of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[StepTiming] = []
        self._engine = engine

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.steps.append(
                StepTiming(
                    time.perf_counter(),
                    event.seconds,
                    event.rows,
                    event.tokens,
                    event.prompt_tokens,
                    event.running,
                    event.waiting,
                )
            )

    def __enter__(self) -> StepRecorder:
        self._engine.listeners.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.listeners.remove(self)


def run_load(
    llm: LLM,
    asks: Sequence[Ask],
    *,
    concurrency: int | None = None,
    words: bool = False,
    show: Callable[[int, str], None] | None = None,
    finished: Callable[[int], None] | None = None,
) -> LoadRun:
    """Sends the asks at their times and waits for all of them.

    At most `concurrency` are inside at once: then a request arrives when it is let in, and the load is closed-loop, not
    to be presented as capacity. With `words` the outputs have their text, and `show(place, piece)` hears of it as it
    comes; both cost this process some time. Raises BadRequest before anything runs.
    """
    if concurrency is not None and concurrency < 1:
        raise BadRequest("concurrency", concurrency, "an integer from 1")
    engine = llm.assembled.engine
    for place, ask in enumerate(asks):
        try:
            engine.num_outputs(llm.request(ask.ids, ask.params))
        except BadRequest as error:
            raise BadRequest(f"asks[{place}]: {error.param}", error.got, error.allowed) from None
    order = sorted(range(len(asks)), key=lambda place: asks[place].at_s)
    chunks: queue.SimpleQueue[tuple[float, Chunk]] = queue.SimpleQueue()
    inside: dict[int, _Open] = {}
    timings: dict[int, RequestTiming] = {}
    builders: dict[int, OutputBuilder] = {}

    def sink(chunk: Chunk) -> None:
        chunks.put((time.perf_counter(), chunk))

    with StepRecorder(engine) as recorder:
        start = time.perf_counter()
        try:
            while order or inside:
                wait: float | None = None
                while order and (concurrency is None or len(inside) < concurrency):
                    place = order[0]
                    due = start + asks[place].at_s
                    now = time.perf_counter()
                    if due > now:
                        wait = due - now
                        break
                    order.pop(0)
                    # A closed loop has no schedule to be late for.
                    arrival = due if concurrency is None else max(due, now)
                    _submit(llm, asks[place], place, arrival, sink, inside, builders if words else None)
                try:
                    stamp, chunk = chunks.get(timeout=wait)
                except queue.Empty:
                    continue
                _take(chunk, stamp, asks, inside, builders, timings, show, finished)
        finally:
            for request_id in list(inside):
                llm.thread.abort(request_id)
        llm.thread.drain()
    outputs = [builders[place].output for place in sorted(builders)]
    return LoadRun([timings[place] for place in range(len(asks))], recorder.steps, outputs)


def _submit(
    llm: LLM,
    ask: Ask,
    place: int,
    arrival: float,
    sink: Callable[[Chunk], None],
    inside: dict[int, _Open],
    builders: dict[int, OutputBuilder] | None,
) -> None:
    request = llm.request(ask.ids, ask.params, cache_salt=ask.salt)
    count = llm.assembled.engine.num_outputs(request)
    inside[request.id] = _Open(place, arrival, unfinished=count)
    if builders is not None:
        from millstream.engine.outputs import OutputBuilder

        builders[place] = OutputBuilder(request.id, None, ask.ids, ask.params, count, llm.tokenizer)
    llm.thread.submit(request, sink)


def _take(
    chunk: Chunk,
    stamp: float,
    asks: Sequence[Ask],
    inside: dict[int, _Open],
    builders: dict[int, OutputBuilder],
    timings: dict[int, RequestTiming],
    show: Callable[[int, str], None] | None,
    finished: Callable[[int], None] | None,
) -> None:
    one = inside[chunk.request_id]
    if chunk.tokens:
        one.times.append(stamp)
        one.num_output += len(chunk.tokens)
    if builders:
        piece = builders[one.place].add(chunk)
        if piece and show is not None:
            show(one.place, piece)
    if chunk.usage is not None:
        one.cached = max(one.cached, chunk.usage.cached_tokens)
    if chunk.finish is None:
        return
    one.finish = chunk.finish.value
    one.error = one.error or chunk.error
    one.unfinished -= 1
    if one.unfinished:
        return
    del inside[chunk.request_id]
    timings[one.place] = RequestTiming(
        one.arrival_s, tuple(one.times), len(asks[one.place].ids), one.num_output, one.cached, one.finish, one.error
    )
    if finished is not None:
        finished(one.place)


def random_prompts(
    vocab_size: int, lengths: Sequence[int], seed: int, banned: frozenset[int] = frozenset()
) -> list[tuple[int, ...]]:
    """Prompts of uniformly random token ids, none of them in `banned` (control tokens). Raises BadRequest."""
    allowed = [token for token in range(vocab_size) if token not in banned]
    if not allowed:
        raise BadRequest("banned", f"{len(banned)} ids", f"fewer than the {vocab_size} of the vocabulary")
    source = random.Random(seed)
    return [tuple(source.choices(allowed, k=length)) for length in lengths]


def text_prompts(ids: Sequence[int], lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Windows of a tokenized text, at random places. Raises BadRequest when the text is too short for one."""
    longest = max(lengths, default=0)
    if longest > len(ids):
        raise BadRequest("text", f"{len(ids)} tokens", f"at least {longest}, the longest prompt")
    source = random.Random(seed)
    starts = [source.randrange(len(ids) - length + 1) for length in lengths]
    return [tuple(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def poisson_arrivals(count: int, per_s: float, seed: int) -> list[float]:
    """Arrival times in seconds with exponential gaps, the first at 0. Raises BadRequest."""
    if not per_s > 0:
        raise BadRequest("request_rate", per_s, "a number above 0")
    source = random.Random(seed)
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += source.expovariate(per_s)
    return times
