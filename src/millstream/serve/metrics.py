"""Metrics: what the calls, the records of ended requests and the engine's steps come to, as Prometheus text.

Every family is called `millstream_*`; where vLLM has the same number, its name is there too, so that dashboards,
autoscalers and routers made for it work unchanged. Counters are sums, never rates; an interval is taken between stamps
of one process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from platform import python_version
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

import millstream
from millstream.cluster.client import Replica
from millstream.core.client import EngineClient, Load, RequestMetrics
from millstream.core.events import Event, Preempted, Stepped
from millstream.core.sequence import Finish
from millstream.serve.families import OTHER, Counter, Family, Gauge, Histogram, Summary
from millstream.serve.records import Record

# The bounds of vLLM's histograms, so that boards and alerts made for these mean the same.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAG_PROBE_S = 0.25
# The plain form for every scraper: in the OpenMetrics form the colon of vLLM's names would be written as an underscore.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
NO_TENANT = "default"


def lost_times(client: EngineClient) -> int:
    """How often the engine's process was lost; one in this process never is."""
    return int(getattr(client, "losses", 0))


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most` tokens."""
    bounds: list[int] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > max(1, most):
                return tuple(bounds)
            bounds.append(mantissa * scale)
        scale *= 10


@dataclass(slots=True)
class _Tally:
    """Counters of an engine, kept when another one takes its place and begins again at 0."""

    sums: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)

    def update(self, now: Mapping[str, float]) -> None:
        for name, value in now.items():
            before = self.seen.get(name, 0.0)
            self.sums[name] = self.sums.get(name, 0.0) + (value - before if value >= before else value)
            self.seen[name] = value


class Metrics:
    """The metrics of one API process and its engine. `observatory.py` feeds it, from one event loop.

    `max_context` bounds the histograms over tokens. There is no global state and no registry.
    """

    def __init__(self, model_name: str, max_context: int = 8192, engine: str = "0", process: bool = True) -> None:
        self.model_name = model_name
        self.base = {"model_name": model_name, "engine": engine}
        self.families: list[Family] = []
        # Sums and levels of parts of the API process, asked when the text is made. Names come from code.
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        self._tally = _Tally()
        self._kv_total_bytes = 0
        self._tokens = token_bounds(max_context)
        self._declare_engine()
        self._declare_replicas()
        self._declare_requests()
        self._declare_server()
        self.build.set(1, millstream.__version__, python_version())
        self._engine_pid: int | None = None
        self._processes: list[Collector] = []
        if process:
            of_engine = ProcessCollector("millstream_engine", self._pid_of_engine, registry=None)
            self._processes = [ProcessCollector(registry=None), of_engine]

    # -- what there is

    def _counter(self, name: str, told: str, *labels: str, vllm: tuple[str, ...] = ()) -> Counter:
        family = Counter(f"millstream_{name}", told, labels, [f"vllm:{alias}" for alias in vllm], self.base)
        self.families.append(family)
        return family

    def _gauge(self, name: str, told: str, *labels: str, vllm: tuple[str, ...] = ()) -> Gauge:
        family = Gauge(f"millstream_{name}", told, labels, [f"vllm:{alias}" for alias in vllm], self.base)
        self.families.append(family)
        return family

    def _histogram(
        self, name: str, told: str, bounds: tuple[float, ...], *labels: str, vllm: tuple[str, ...] = ()
    ) -> Histogram:
        aliases = [f"vllm:{alias}" for alias in vllm]
        family = Histogram(f"millstream_{name}", told, bounds, labels=labels, aliases=aliases, base=self.base)
        self.families.append(family)
        return family

    def _declare_engine(self) -> None:
        self.running = self._gauge(
            "requests_running", "Sequences that hold a place on the device.", vllm=("num_requests_running",)
        )
        self.waiting = self._gauge(
            "requests_waiting", "Sequences that wait for a place.", vllm=("num_requests_waiting",)
        )
        self.kv_usage = self._gauge(
            "kv_cache_usage_ratio",
            "Share of KV blocks in use, 0 to 1; those kept only for prefixes count as free.",
            vllm=("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        )
        self.kv_blocks = self._gauge("kv_blocks", "KV blocks by what they hold: used, prefix, free.", "state")
        self.prompt_tokens = self._counter(
            "prompt_tokens",
            "Prompt tokens of requests that were computed or found in the cache.",
            vllm=("prompt_tokens",),
        )
        self.generation_tokens = self._counter(
            "generation_tokens", "Output tokens generated.", vllm=("generation_tokens",)
        )
        self.tenant_tokens = self._counter(
            "tenant_tokens", "Tokens served to a tenant: prompt, cached (of these), generation.", "tenant", "kind"
        )
        self.success = self._counter(
            "request_success",
            "Outputs that ended, by reason; a request with n=3 has three.",
            "finished_reason",
            vllm=("request_success",),
        )
        self.preemptions = self._counter("preemptions", "Sequences that lost their place, by recovery.", "how")
        self.num_preemptions = self._counter(
            "num_preemptions", "Sequences that lost their place.", vllm=("num_preemptions",)
        )
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Tokens looked up in the prefix cache.", vllm=("prefix_cache_queries",)
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Tokens found in the prefix cache.", vllm=("prefix_cache_hits",)
        )
        self.cache_moves = self._counter(
            "kv_block_moves", "KV blocks evicted, copied, deduplicated, distrusted, swapped_out, swapped_in.", "kind"
        )
        self.kv_bytes = self._gauge("kv_bytes", "Bytes of the KV cache, by tier: in use, and in all.", "tier", "state")
        self.part_counters = self._counter(
            "part_counters", "What parts and plug-ins of the engine and the API count themselves.", "name"
        )
        self.part_levels = self._gauge("part_levels", "What their caches hold, in items and bytes.", "name")
        self.step_seconds = self._histogram("step_seconds", "Seconds of one forward pass.", STEP_S)
        self.plan_seconds = self._histogram("step_plan_seconds", "Seconds to plan one step on the host.", STEP_S)
        self.step_tokens = self._histogram(
            "step_tokens", "Tokens computed by one step.", STEP_TOKENS, vllm=("iteration_tokens_total",)
        )
        self.step_rows = self._histogram("step_rows", "Sequences that share one step.", STEP_ROWS)
        self.computed = self._counter("step_computed_tokens", "Tokens computed: of prompts, of outputs.", "phase")
        self.mixed_steps = self._counter("mixed_steps", "Steps in which prompts and outputs were computed together.")
        self.queue_s = self._histogram(
            "request_queue_seconds", "From arrival to the first place in a step.", REQUEST_S,
            vllm=("request_queue_time_seconds",),
        )  # fmt: skip
        self.prefill_s = self._histogram(
            "request_prefill_seconds", "From the first place in a step to the first token.", REQUEST_S,
            vllm=("request_prefill_time_seconds",),
        )  # fmt: skip
        self.decode_s = self._histogram(
            "request_decode_seconds", "From the first token to the last.", REQUEST_S,
            vllm=("request_decode_time_seconds",),
        )  # fmt: skip
        self.inference_s = self._histogram(
            "request_inference_seconds", "From the first place in a step to the last token.", REQUEST_S,
            vllm=("request_inference_time_seconds",),
        )  # fmt: skip
        self.itl_s = self._histogram(
            "inter_token_latency_seconds", "Between one token of an output and the next.", TOKEN_S,
            vllm=("inter_token_latency_seconds", "time_per_output_token_seconds"),
        )  # fmt: skip
        self.cache_info: Gauge | None = None
        self.engine_up = self._gauge("engine_up", "1 while the engine answers.")
        self.restarts = self._counter("engine_restarts", "Engines that were lost; a new one takes their place.")
        self.resumed = self._counter("resumed_requests", "Requests that a new engine took up where one was lost.")
        self.engine_up.set(0)

    def _declare_replicas(self) -> None:
        self.replica_up = self._gauge("replica_up", "1 while an engine of the cluster takes requests.", "replica")
        self.replica_requests = self._gauge("replica_requests", "Requests inside an engine of the cluster.", "replica")
        self.replica_work = self._gauge(
            "replica_work_tokens", "Prompt tokens of the requests inside an engine of the cluster.", "replica"
        )
        self.replica_speed = self._gauge(
            "replica_speed", "How fast an engine is beside the others, as routers see it: 1 is as the usual.", "replica"
        )
        self.replicas_wanted = self._gauge("replicas_wanted", "Engines that the cluster should have.")
        self.replicas_lost = self._counter("replicas_lost", "Engines of the cluster that were lost.")
        self.migrations = self._counter("migrations", "Requests that went on in another engine of the cluster.")

    def replicas(self, found: Iterable[Replica], wanted: int, lost: int, migrations: int) -> None:
        """Takes how the engines of a cluster get on."""
        gauges = (self.replica_up, self.replica_requests, self.replica_work, self.replica_speed)
        shown = {(one.name,): one for one in found}
        for gauge in gauges:
            # One that is gone is not up; its name is the next one's.
            gauge.values = {key: 0.0 for key in gauge.values if key not in shown}
        for (name,), one in shown.items():
            for gauge, value in zip(
                gauges, (one.state == "up", one.requests, one.prompt_tokens, one.speed), strict=True
            ):
                gauge.set(value, name)
        self.replicas_wanted.set(wanted)
        self.replicas_lost.values[()] = float(lost)
        self.migrations.values[()] = float(migrations)

    def _declare_requests(self) -> None:
        self.requests = self._counter(
            "requests", "Requests ended, once each, by kind of call and HTTP status (499: the client left).",
            "operation", "status",
        )  # fmt: skip
        self.inside = self._gauge("requests_inside", "Requests that have arrived and not ended.")
        self.inside.set(0)
        self.shed = self._counter("shed_requests", "Requests turned away, by reason.", "reason")
        self.corrupted = self._counter(
            "corrupted_requests", "Outputs whose logits were not finite, computed anew neither.",
            vllm=("corrupted_requests",),
        )  # fmt: skip
        self.cold_retries = self._counter("cold_retries", "Outputs computed anew because logits were not finite.")
        self.slo = self._counter(
            "slo_requests", "Requests with a target for ttft, tpot or deadline, by whether it was met.", "slo", "met"
        )
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_S,
            vllm=("time_to_first_token_seconds",),
        )  # fmt: skip
        self.tpot_s = self._histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a request.", TOKEN_S,
            vllm=("request_time_per_output_token_seconds",),
        )  # fmt: skip
        self.e2e_s = self._histogram(
            "request_latency_seconds", "From a request's arrival to its end.", REQUEST_S,
            vllm=("e2e_request_latency_seconds",),
        )  # fmt: skip
        self.request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", self._tokens, vllm=("request_prompt_tokens",)
        )
        self.request_generation = self._histogram(
            "request_generation_tokens", "Output tokens of a request.", self._tokens,
            vllm=("request_generation_tokens",),
        )  # fmt: skip
        self.longest_output = self._histogram(
            "request_longest_output_tokens", "Tokens of the longest output of a request.", self._tokens,
            vllm=("request_max_num_generation_tokens",),
        )  # fmt: skip
        self.params_n = self._histogram(
            "request_params_n", "The parameter n of requests.", (1, 2, 5, 10, 20, 50, 128), vllm=("request_params_n",)
        )
        self.params_max_tokens = self._histogram(
            "request_params_max_tokens", "The parameter max_tokens of requests.", self._tokens,
            vllm=("request_params_max_tokens",),
        )  # fmt: skip

    def _declare_server(self) -> None:
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the API's event loop is, probed four times a second.", LAG_S
        )
        self.ready = self._gauge("ready", "1 while the server takes requests.")
        self.build = self._gauge("build_info", "1; what is running, in its labels.", "version", "python")
        # The names of Prometheus' HTTP instrumentation; `handler` is the route's pattern, never a path.
        self.http_requests = Counter("http_requests", "HTTP requests.", ("method", "handler", "status"))
        self.http_seconds = Histogram(
            "http_request_duration_seconds", "Until the last byte.", REQUEST_S, labels=("method", "handler")
        )
        self.http_request_bytes = Summary("http_request_size_bytes", "Bodies of requests.", ("handler",))
        self.http_response_bytes = Summary("http_response_size_bytes", "Bodies of responses.", ("handler",))
        self.families += [self.http_requests, self.http_seconds, self.http_request_bytes, self.http_response_bytes]

    # -- while a request is inside

    def prompt_served(self, tenant: str, tokens: int, cached: int) -> None:
        """A prompt has been computed, but for `cached` tokens of it."""
        tenant = tenant or NO_TENANT
        self.prompt_tokens.add(tokens)
        self.tenant_tokens.add(tokens, tenant, "prompt")
        self.tenant_tokens.add(cached, tenant, "cached")

    def generated(self, tenant: str, tokens: int) -> None:
        self.generation_tokens.add(tokens)
        self.tenant_tokens.add(tokens, tenant or NO_TENANT, "generation")

    def output_ended(self, reason: Finish, took: RequestMetrics | None) -> None:
        """One output has ended; `took` is what the engine measured of it."""
        self.success.add(1, reason.value)
        if took is None or took.queue_s is None:
            return
        self.queue_s.observe(took.queue_s)
        if took.ttft_s is not None and took.total_s is not None:
            self.prefill_s.observe(max(0.0, took.ttft_s - took.queue_s))
            self.decode_s.observe(max(0.0, took.total_s - took.ttft_s))
            self.inference_s.observe(max(0.0, took.total_s - took.queue_s))

    # -- what the engine tells

    def hear(self, event: Event) -> None:
        """Takes the next event of the engine."""
        if isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Preempted):
            self.preemptions.add(1, event.how)
            self.num_preemptions.add()

    def _stepped(self, event: Stepped) -> None:
        decode = event.tokens - event.prompt_tokens
        self.step_seconds.observe(event.seconds)
        self.plan_seconds.observe(event.planning_s)
        self.step_tokens.observe(event.tokens)
        self.step_rows.observe(event.rows)
        self.computed.add(event.prompt_tokens, "prefill")
        self.computed.add(decode, "decode")
        if event.prompt_tokens and decode:
            self.mixed_steps.add()
        self.running.set(event.running)
        self.waiting.set(event.waiting)

    def ended(self, record: Record) -> None:
        """Takes the record of a request that has ended. Called once a request."""
        self.requests.add(1, record.operation, str(record.status))
        if record.shed:
            self.shed.add(1, record.shed)
        self._levels(record)
        if not record.generated:
            return
        self.e2e_s.observe(record.total_s)
        if record.ttft_s is not None:
            self.ttft_s.observe(record.ttft_s)
        if record.tpot_s is not None:
            self.tpot_s.observe(record.tpot_s)
        self.request_prompt.observe(record.prompt_tokens)
        self.request_generation.observe(record.output_tokens)
        self.longest_output.observe(record.longest_output)
        self.params_n.observe(record.n)
        if record.max_tokens is not None:
            self.params_max_tokens.observe(record.max_tokens)

    def _levels(self, record: Record) -> None:
        """Service levels: a target that was asked for is met or not, and a request turned away met none of its own."""
        served = record.status < 400
        for name, target, got in (
            ("ttft", record.slo.ttft_s, record.ttft_s),
            ("tpot", record.slo.tpot_s, record.tpot_s),
            ("deadline", record.slo.deadline_s, record.total_s),
        ):
            if target is None or (name == "tpot" and served and got is None):
                continue  # with one token there is no pace
            met = served and got is not None and got <= target and "timeout" not in record.finish
            self.slo.add(1, name, "true" if met else "false")

    def http(
        self, method: str, handler: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """Takes what passed over one HTTP exchange. `handler` is a route's pattern."""
        method = method if method in _METHODS else OTHER
        self.http_requests.add(1, method, handler, f"{status // 100}xx")
        self.http_seconds.observe(seconds, method, handler)
        self.http_request_bytes.observe(request_bytes, handler)
        self.http_response_bytes.observe(response_bytes, handler)

    def look_at(self, client: EngineClient) -> int:
        """Takes what a client knows of its engine's process. Gives how often that was lost since this was last asked:
        one in this process is never lost."""
        self.resumed.values[()] = float(getattr(client, "resumed", 0))
        self._engine_pid = getattr(client, "engine_pid", None)
        return lost_times(client) - int(self.restarts.total())

    def loaded(self, load: Load | None, ready: bool = True) -> None:
        """Takes how busy the engine is now; None when it does not answer."""
        # Of one that is away nothing is known but who waits for it.
        up = load is not None and bool(load.counters)
        self.engine_up.set(up)
        self.ready.set(ready)
        if load is None or not up:
            return
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        used = load.total_blocks - load.free_blocks
        self.kv_usage.set(used / load.total_blocks if load.total_blocks else 0.0)
        idle = int(load.counters.get("idle_blocks", 0))
        self.kv_blocks.set(used, "used")
        self.kv_blocks.set(idle, "prefix")
        self.kv_blocks.set(max(0, load.free_blocks - idle), "free")
        if self._kv_total_bytes and load.total_blocks:
            self.kv_bytes.set(self._kv_total_bytes * used / load.total_blocks, "device", "used")
        self._tally.update({name: value for name, value in load.counters.items() if name not in _LEVELS})

    def restarted(self) -> None:
        """Another engine has taken the place of one that failed: what that one had inside is gone."""
        self.restarts.add()
        self._tally.seen.clear()
        self.running.set(0)
        self.waiting.set(0)

    def describe_cache(self, kv_bytes: int = 0, **info: object) -> None:
        """The settings of the cache, as the labels of an info series; `kv_bytes` is what it takes on the device."""
        self._kv_total_bytes = kv_bytes
        self.kv_bytes.set(kv_bytes, "device", "total")
        named = {name: str(value) for name, value in sorted(info.items())}
        self.cache_info = Gauge(
            "millstream_cache_config_info", "1; settings of the cache, in its labels.", tuple(named),
            ["vllm:cache_config_info"], self.base,
        )  # fmt: skip
        self.cache_info.set(1, *named.values())

    async def watch_loop(self, now: Callable[[], float] = time.monotonic) -> None:
        """Probes how late the event loop is, until cancelled."""
        while True:
            before = now()
            await asyncio.sleep(LAG_PROBE_S)
            self.loop_lag.observe(max(0.0, now() - before - LAG_PROBE_S))

    # -- text

    def collect(self) -> Iterator[Any]:
        """Every family as it is now."""
        sums = self._tally.sums
        self.prefix_queries.values[()] = sums.get("prefix_query_tokens", 0.0)
        self.prefix_hits.values[()] = sums.get("prefix_hit_tokens", 0.0)
        self.corrupted.values[()] = sums.get("corrupted_requests", 0.0)
        self.cold_retries.values[()] = sums.get("cold_retries", 0.0)
        for kind in _MOVES:
            self.cache_moves.values[(kind,)] = sums.get(f"{kind}_blocks", 0.0)
        for name, value in sums.items():
            if name not in _OWN_FAMILY:
                self.part_counters.values[(name,)] = value
        for source in self.sources:
            for name, value in source().items():
                holds = name.endswith(("_items", "_bytes"))
                (self.part_levels if holds else self.part_counters).values[(name,)] = value
        for family in [*self.families, *([self.cache_info] if self.cache_info else [])]:
            yield from family.collect()

    def text(self, families: Iterable[Any] | None = None) -> bytes:
        """All metrics as text, of type `CONTENT_TYPE`.

        With `families`, which `collect` gave on the event loop, it may be called on another thread.
        """
        return generate_latest(_Given(self.collect() if families is None else families, self._processes))

    def _pid_of_engine(self) -> int:
        # No process has the number 0: where the engine has none of its own, there are no numbers of it.
        return self._engine_pid or 0


class _Given(Collector):
    """Families that are there already, and those of the process."""

    def __init__(self, families: Iterable[Any], processes: Iterable[Collector]) -> None:
        self._families, self._processes = families, processes

    def collect(self) -> Iterator[Any]:
        yield from self._families
        for process in self._processes:
            yield from process.collect()


_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})
# Of the engine's counters, those that are levels and not sums.
_LEVELS = frozenset({"idle_blocks", "used_blocks", "holders"})
_MOVES = ("evicted", "copied", "deduplicated", "distrusted", "swapped_out", "swapped_in")
_OWN_FAMILY = frozenset(
    {"prefix_query_tokens", "prefix_hit_tokens", "corrupted_requests", "cold_retries", *(f"{m}_blocks" for m in _MOVES)}
)
