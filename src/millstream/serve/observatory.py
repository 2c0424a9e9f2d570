"""Everything that watches, in one place: metrics, timelines, the last steps, the completion log and traces.

A request is watched through its `Call`, from arrival to end. What the engine does is watched through its events, those
that cost nothing by the token. Nothing in here can fail a request: what raises is logged once and left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millstream.cluster.client import ClusterClient
from millstream.core.client import Chunk, EngineClient, Load, ModelFacts
from millstream.core.errors import ConfigError, EngineClosed
from millstream.core.events import Admitted, Event, Finished, Preempted, Prefilled, Stepped, Submitted
from millstream.core.request import Slo
from millstream.core.sequence import Finish
from millstream.serve import records
from millstream.serve.metrics import Metrics
from millstream.serve.records import Record
from millstream.serve.timeline import MAX_BYTES, MAX_REQUESTS, Steps, Timelines
from millstream.serve.tracing import Tracer

_log = logging.getLogger("millstream.serve")

LOAD_TIMEOUT_S = 1.0
POLL_S = 1.0
# Kept off: Computed and Emitted, of which there is one a row and step. The chunks of a call say the same.
KINDS: tuple[type[Event], ...] = (Submitted, Admitted, Prefilled, Preempted, Finished, Stepped)


class _Output:
    """How far one output of a call has come."""

    __slots__ = ("ended", "last_s", "tokens")

    def __init__(self, last_s: float) -> None:
        self.tokens, self.last_s, self.ended = 0, last_s, False


class Call:
    """One request to the API, from its arrival to its end; `Observatory.begin` makes it.

    Whoever serves it sets what becomes known of it (tenant, model, n, ...), tells every request that it sends to the
    engine (`inside`) and every chunk that comes (`heard`), and ends it with the status that its client was sent. What
    tells its end a second time is not heard, so that "in a finally" is a good place for a default.
    """

    __slots__ = (
        "_cached", "_finish", "_now", "_outputs", "_preemptions", "_prompts", "_queue_s", "_ttft_s", "_watcher",
        "ended", "id", "label", "max_tokens", "model", "n", "operation", "program", "reasoning_tokens", "route",
        "sampling", "slo", "stage", "started_ns", "started_s", "stream", "tenant", "traceparent",
    )  # fmt: skip

    def __init__(self, watcher: Observatory, request_id: str, operation: str, route: str) -> None:
        self.id, self.operation, self.route = request_id, operation, route
        self.label = self.tenant = self.model = self.traceparent = self.program = self.stage = ""
        self.stream, self.n, self.max_tokens = False, 1, None
        self.slo, self.sampling = Slo(), {}
        self.reasoning_tokens = 0
        self.ended = False
        self._watcher, self._now = watcher, watcher.now
        self.started_s, self.started_ns = self._now(), time.time_ns()
        self._outputs: dict[tuple[int, int], _Output] = {}
        self._prompts: dict[int, tuple[int, int]] = {}
        self._finish: list[str] = []
        self._preemptions = self._cached = 0
        self._queue_s: float | None = None
        self._ttft_s: float | None = None

    max_tokens: int | None
    sampling: Mapping[str, float | int]

    def inside(self, engine_id: int) -> None:
        """It is about to be sent to the engine as the request `engine_id`, perhaps one of several."""
        self._watcher.timelines.open(self.id, self.tenant, (engine_id,), self.label, self.model)

    def heard(self, chunk: Chunk) -> None:
        """The next chunk of one of its requests."""
        try:
            self._heard(chunk)
        except Exception:
            self._watcher.failure("Call.heard")

    def _heard(self, chunk: Chunk) -> None:
        now, metrics = self._now(), self._watcher.metrics
        key, count, usage = (chunk.request_id, chunk.index), len(chunk.tokens), chunk.usage
        if usage is not None and chunk.request_id not in self._prompts:
            self._prompts[chunk.request_id] = (usage.prompt_tokens, usage.cached_tokens)
            if count or chunk.finish in (Finish.STOP, Finish.LENGTH):
                metrics.prompt_served(self.tenant, usage.prompt_tokens, usage.cached_tokens)
        output = self._outputs.get(key)
        if output is None:
            output = self._outputs[key] = _Output(now)
        if count:
            if self._ttft_s is None:
                self._ttft_s = now - self.started_s
            if output.tokens:
                metrics.itl_s.observe((now - output.last_s) / count, times=count)
            elif count > 1:
                metrics.itl_s.observe(0.0, times=count - 1)
            output.tokens, output.last_s = output.tokens + count, now
            metrics.generated(self.tenant, count)
            self._watcher.timelines.decoded(chunk.request_id, chunk.index, now - self.started_s, count)
        if chunk.finish is not None and not output.ended:
            output.ended = True
            if chunk.replaced is not None:
                # A method that rewrites history gives its output whole, at the end.
                metrics.generated(self.tenant, max(0, len(chunk.replaced) - output.tokens))
                output.tokens = len(chunk.replaced)
            self._finish.append(chunk.finish.value)
            metrics.output_ended(chunk.finish, chunk.metrics)
            if chunk.metrics is not None:
                self._preemptions += chunk.metrics.preemptions
                queued = chunk.metrics.queue_s
                if queued is not None:
                    self._queue_s = queued if self._queue_s is None else min(self._queue_s, queued)

    def end(self, status: int, error: str = "", shed: str = "") -> Record | None:
        """It has ended, and this is what its client was told. None when it had ended before."""
        if self.ended:
            return None
        self.ended = True
        cut = Finish.ERROR if status >= 500 else Finish.ABORT
        for output in self._outputs.values():
            if not output.ended:
                self._finish.append(cut.value)
                self._watcher.metrics.output_ended(cut, None)
        record = Record(
            id=self.id,
            operation=self.operation,
            route=self.route,
            status=status,
            total_s=self._now() - self.started_s,
            label=self.label,
            tenant=self.tenant,
            program=self.program,
            stage=self.stage,
            model=self.model,
            stream=self.stream,
            finish=tuple(self._finish),
            error=error,
            shed=shed,
            prompt_tokens=sum(prompt for prompt, _ in self._prompts.values()),
            output_tokens=sum(output.tokens for output in self._outputs.values()),
            cached_tokens=sum(cached for _, cached in self._prompts.values()),
            reasoning_tokens=self.reasoning_tokens,
            longest_output=max((output.tokens for output in self._outputs.values()), default=0),
            n=self.n,
            max_tokens=self.max_tokens,
            queue_s=self._queue_s,
            ttft_s=self._ttft_s,
            preemptions=self._preemptions,
            slo=self.slo,
            sampling=self.sampling,
            traceparent=self.traceparent,
            started_ns=self.started_ns,
        )
        self._watcher.ended(record)
        return record


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """What may be set of it: `[serve.watch]`.

    `otlp_endpoint` is the collector that traces are sent to, in the name of `service_name`; none are sent without it.
    The timelines of the last `timeline_requests` requests are kept, in `timeline_bytes` at most.
    """

    otlp_endpoint: str = ""
    service_name: str = "millstream"
    timeline_requests: int = MAX_REQUESTS
    timeline_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        for name in ("timeline_requests", "timeline_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"serve.watch.{name}: got {getattr(self, name)}, allowed are integers from 0")


class Observatory:
    """The watchers of one server. All methods are called from the event loop of the API process."""

    @classmethod
    def of(cls, config: WatchConfig, model_name: str, max_context: int = 8192) -> Observatory:
        """As the config says. Raises ConfigError."""
        tracer = Tracer(config.otlp_endpoint, config.service_name) if config.otlp_endpoint else None
        made = cls(Metrics(model_name, max_context), tracer)
        made.timelines = Timelines(config.timeline_requests, config.timeline_bytes)
        return made

    def __init__(
        self, metrics: Metrics, tracer: Tracer | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics, self.tracer, self.now = metrics, tracer, now
        self.timelines = Timelines()
        self.steps = Steps(now=now)
        self.started_s = now()
        self._inside = 0
        self._failed: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, request_id: str, operation: str, route: str) -> Call:
        """A request has arrived. `operation` is its kind in the terms of `gen_ai` ("chat", "text_completion",
        "embeddings", ...), `route` the pattern of its path; both come from code and not from clients."""
        self._inside += 1
        self.metrics.inside.set(self._inside)
        return Call(self, request_id, operation, route)

    def ended(self, record: Record) -> None:
        """Takes the record of a request that has ended; `Call.end` calls it, once."""
        self._inside -= 1
        self.metrics.inside.set(self._inside)
        for fold in (self.metrics.ended, self.timelines.ended, records.log, self._trace):
            try:
                fold(record)
            except Exception:
                self.failure(fold.__qualname__)

    def hear(self, event: Event) -> None:
        """Takes the next event of the engine."""
        for fold in (self.metrics.hear, self.timelines.hear, self.steps.hear):
            try:
                fold(event)
            except Exception:
                self.failure(fold.__qualname__)

    def describe(self, facts: ModelFacts) -> None:
        """The model is loaded."""
        self.metrics.describe_cache(
            block_size=facts.block_size,
            num_gpu_blocks=facts.total_blocks,
            cache_dtype=facts.dtype,
            weight_bytes=facts.weight_bytes,
            kv_bytes=facts.kv_bytes,
        )

    def watch(self, client: EngineClient) -> None:
        """Begins to follow an engine, which need not be there yet, and this event loop, until `close`."""
        loop = asyncio.get_running_loop()
        self._tasks += [
            loop.create_task(one)
            for one in (self._meet(client), self._follow(client), self._poll(client), self.metrics.watch_loop())
        ]

    async def _meet(self, client: EngineClient) -> None:
        # One that is closed before its model is loaded, or that has no files, tells no facts.
        with contextlib.suppress(EngineClosed):
            self.describe(await client.facts())

    async def _follow(self, client: EngineClient) -> None:
        async for event in client.events(*KINDS):
            self.hear(event)

    async def _poll(self, client: EngineClient) -> None:
        """Keeps the sums of an engine that may be lost any moment, and notices when it was."""
        while True:
            await self.look(client)
            await asyncio.sleep(POLL_S)

    async def look(self, client: EngineClient) -> Load | None:
        """How busy the engine is now, which the gauges then show; None when it does not answer."""
        load = await load_of(client)
        for _ in range(self.metrics.look_at(client)):
            self.restarted()
        if isinstance(client, ClusterClient):
            self.metrics.replicas(client.members(), client.target, client.lost, client.migrations)
        self.metrics.loaded(load, await client.ready())
        return load

    def restarted(self) -> None:
        """The engine was lost, and another one takes its place."""
        self.metrics.restarted()
        self.timelines.restarted()

    def _trace(self, record: Record) -> None:
        if self.tracer is not None and record.generated:
            self.tracer.ended(record, self.timelines.get(record.id))

    def failure(self, what: str) -> None:
        """Logs the exception that is being handled, the first time that `what` has one."""
        if what not in self._failed:
            self._failed.add(what)
            _log.exception("%s failed; what it should count is not complete", what)

    async def close(self) -> None:
        """Sends the spans that are left, and follows nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


async def load_of(client: EngineClient, timeout_s: float = LOAD_TIMEOUT_S) -> Load | None:
    """How busy the engine is; None when it does not answer in time."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(timeout_s):
            return await client.load()
    return None


def playground_state(watched: Observatory, load: Load | None, ready: bool, since: int) -> dict[str, Any]:
    """What the playground shows: gauges, and the steps after the one numbered `since`."""
    steps = watched.steps
    prompt, output = steps.rates()
    counters = load.counters if load is not None else {}
    total = load.total_blocks if load is not None else 0
    used = total - (load.free_blocks if load is not None else 0)
    return {
        "ready": ready and load is not None,
        "model": watched.metrics.model_name,
        "uptime_s": round(watched.now() - watched.started_s, 3),
        "running": load.running if load is not None else 0,
        "waiting": load.waiting if load is not None else 0,
        "prompt_tokens_per_s": round(prompt, 2),
        "output_tokens_per_s": round(output, 2),
        "kv": {"total": total, "used": used, "prefix": int(counters.get("idle_blocks", 0))},
        "prefix": {
            "query_tokens": int(counters.get("prefix_query_tokens", 0)),
            "hit_tokens": int(counters.get("prefix_hit_tokens", 0)),
        },
        "last_step": steps.last,
        "steps": steps.since(since if since <= steps.last else 0),
    }
