"""Drives an engine in this thread and keeps the times: what experiments measure, with no server or thread between.

Arrivals are open-loop (each request at its `arrival`, in seconds from the start) or closed-loop (`clients`, each
sending its next request when the last one has finished).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from millstream.core.client import Chunk
from millstream.core.events import Stepped
from millstream.core.request import Request
from millstream.engine.engine import Engine


@dataclass(slots=True)
class Timeline:
    """One output as a client saw it; seconds on one clock. `tokens` and `times` belong together."""

    request: Request
    index: int
    sent: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finished: float | None = None
    error: str | None = None
    preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(slots=True)
class Drive:
    """A whole run. `step_s` are seconds a step, host work included; `rows` and `tokens` are what each computed."""

    timelines: list[Timeline]
    seconds: float
    step_s: list[float]
    rows: list[int]
    tokens: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(len(timeline.tokens) for timeline in self.timelines)

    @property
    def gaps_s(self) -> list[float]:
        return [gap for timeline in self.timelines for gap in timeline.gaps_s]


def drive(
    engine: Engine,
    requests: Sequence[Request],
    clients: int | None = None,
    after_step: Callable[[], None] | None = None,
    keep: Callable[[Chunk], None] | None = None,
) -> Drive:
    """Runs `requests` to their ends. Without `clients` each is sent at its own `arrival`; ids must differ.

    `after_step` is called after every step (its time is not in `step_s`), `keep` with every chunk. Raises what
    `Engine.submit` raises.
    """
    start = time.perf_counter()
    offset = engine.clock.now()
    timelines: dict[tuple[int, int], Timeline] = {}
    waiting = list(requests) if clients is not None else sorted(requests, key=lambda request: request.arrival)
    waiting.reverse()
    out = Drive([], 0.0, [], [], [])
    open_outputs: dict[int, int] = {}

    def sink(chunk: Chunk) -> None:
        now = time.perf_counter() - start
        if keep is not None:
            keep(chunk)
        timeline = timelines[(chunk.request_id, chunk.index)]
        tokens = chunk.tokens if chunk.replaced is None else chunk.replaced
        timeline.tokens += tokens
        timeline.times += [now] * len(tokens)
        if chunk.finish is not None:
            timeline.finished, timeline.error = now, chunk.error
            timeline.preemptions = chunk.metrics.preemptions if chunk.metrics else 0
            open_outputs[chunk.request_id] -= 1
            if not open_outputs[chunk.request_id]:
                del open_outputs[chunk.request_id]

    def send() -> None:
        request = waiting.pop()
        now = time.perf_counter() - start
        sent = now if clients is not None else request.arrival
        count = engine.num_outputs(request)
        open_outputs[request.id] = count
        for index in range(count):
            timelines[(request.id, index)] = Timeline(request, index, sent)
            out.timelines.append(timelines[(request.id, index)])
        engine.submit(replace(request, arrival=offset + sent), sink)

    def tell(event: object) -> None:
        if isinstance(event, Stepped):
            out.rows.append(event.rows)
            out.tokens.append(event.tokens)

    engine.listeners.append(tell)
    try:
        while waiting or engine.busy:
            if clients is not None:
                while waiting and len(open_outputs) < clients:
                    send()
            else:
                while waiting and waiting[-1].arrival <= time.perf_counter() - start:
                    send()
            if not engine.busy:
                time.sleep(max(0.0, waiting[-1].arrival - (time.perf_counter() - start)))
                continue
            before = time.perf_counter()
            if engine.step():
                out.step_s.append(time.perf_counter() - before)
            if after_step is not None:
                after_step()
    finally:
        engine.listeners.remove(tell)
    out.seconds = time.perf_counter() - start
    return out
