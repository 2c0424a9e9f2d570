"""Serving on Kubernetes: rules for the number of replicas, under a day of traffic with bursts, and live.

Simulated arms serve the same day: Poisson arrivals whose rate follows the hour, with bursts of a minute at three times
the rate, lengths as in the Azure conversation trace (prompts up to MOST_PROMPT). Steps take what they were measured to
take on this machine just before, and a replica takes as long to start as a live one did. Capacity is that of one
simulated replica at 95 % attainment; the day's highest rate is that of MOST replicas.

hpa-busy has Kubernetes' default target for a CPU, and hpa-queue may spend what that does: it has the lowest target with
which other days than those that are judged take no more replica-seconds. The share of time in which an engine computes
is what its process shows as use of its CPUs: its threads work all through a step, however few requests are in it.

The live arm is the cluster that `millstream serve` runs with an autoscaler: engines of one thread in Ray actors. A step
of load makes a second one start, whose first start is killed while it loads; then one that has requests is killed; when
the load falls one is drained. The tandem arms are simulated: a model cut in two unequal groups of layers, each a
service with servers of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millstream.core.errors import MillstreamError
from millstream.core.registry import Card, Choice
from millstream.core.request import Request, SamplingParams, Slo, Tokens
from millstream.core.sequence import Finish
from millstream.reproduce.protocol import (
    Arm,
    CheckResult,
    CheckRow,
    Claim,
    Context,
    Experiment,
    Metric,
    Of,
    Required,
)
from millstream.sim.metrics import percentile

MODEL = "smollm2-135m"
TRACE = "azure-conv"
MOST_PROMPT = 1024
MOST = 8
DAY_S = 1200.0
LOW = 0.2
BURST_FOR_S, BURST_TIMES = 60.0, 3.0
BURSTS_A_DAY = 3
GOAL = 0.95
BUSY = 0.8
INSIDE = tuple(0.25 * step for step in range(4, 33))
TUNING_DAYS = 2
SAW_S, SAW_TEETH = 150.0, 4
# Of the tandem: shares of the layers, how much more comes than the slow stage can do, and requests.
SHARES, OVERLOAD, TANDEM_JOBS = (0.75, 0.25), 1.25, 200
TANDEM_TARGET = 0.7
# Live: engines of one thread; prompt and output; phases in seconds with the load as a multiple of what one engine does.
LIVE_ENGINE = {
    "model": {"weights": "blocks"},
    "cache": {"prefix": "none", "bytes": "128MiB"},
    "runner": {"threads": 1},
    "seed": 0,
}
LIVE_PROMPT, LIVE_OUTPUT = 160, 32
PHASES = ((2.0, 0.25), (20.0, 1.4), (8.0, 1.0), (10.0, 0.5))
LIVE_LOOK_S, LIVE_TARGET, LIVE_DOWN_S = 0.5, 4.0, 8.0
LIVE_SLO = 6.0
LOOK_S, START_S = 0.02, 60.0


class CloudNative(Experiment):
    name, paper = "cloud-native", 29
    title = "Rules for the number of replicas, under a day of traffic, and live"
    arms = (
        Arm("static-peak", f"always {MOST} replicas, enough for the highest burst", ("autoscaler:static",)),
        Arm("static-min", "always as many as the day's mean takes", ("autoscaler:static",)),
        Arm("hpa-busy", f"HPA on the share of time that engines compute, {100 * BUSY:.0f} %", ("autoscaler:hpa",)),
        Arm("hpa-queue", "HPA on requests per replica, those that wait and those that run", ("autoscaler:hpa",)),
        Arm("slo", "queue and attainment against the TTFT that was promised", ("autoscaler:slo",)),
        Arm("predictive", "the rate forecast one cold start ahead", ("autoscaler:predictive",)),
        Arm("oracle", "the true rate, known beforehand", ("autoscaler:oracle",)),
        Arm("sawtooth", "hpa-queue under a load that goes up and down", ("autoscaler:hpa",)),
        Arm("sawtooth-warm", "the same, where replicas start at once", ("autoscaler:hpa",)),
        Arm("sawtooth-slow", "the same, where replicas take a minute longer to start", ("autoscaler:hpa",)),
        Arm("sawtooth-bare", "the same without a stabilization window", ("autoscaler:hpa",)),
        Arm("live", "one engine process, then two, then one", ("autoscaler:hpa", "router:least-work")),
        Arm("tandem", "two groups of layers, one server each (simulated)"),
        Arm("tandem-slow", "two servers for the slow group (simulated)"),
        Arm("tandem-fast", "two servers for the fast group (simulated)"),
        Arm("tandem-hpa", "each group has an HPA of its own (simulated)", ("autoscaler:hpa",)),
    )
    metrics = (
        Metric("attainment", "%", "higher", "requests whose first token came within the SLO"),
        Metric("replica_seconds", "s", "lower", "from the start of each cold start to the end of the drain"),
        Metric("ttft_p95_s", "s", "lower"),
        Metric("changes", "", "lower", "times that the number of replicas was changed"),
        Metric("reversals", "", "lower", "times that it went up after it went down, or down after up"),
        Metric("regret", "%", "lower", "replica-seconds above the oracle's"),
        Metric("regret_attainment", "%", "lower", "points of attainment below the oracle's"),
        Metric("requests_per_s", "1/s", "higher"),
        Metric("slow_servers", "", "", "of the slow group, in the end"),
        Metric("fast_servers", "", "", "of the fast group, in the end"),
        Metric("overload_p95", "%", "lower", "live: p95 TTFT until the second engine is ready, as a share of the SLO"),
        Metric("settled_p95", "%", "lower", "live: p95 TTFT in the last third of the same load, as a share of the SLO"),
        Metric("second_ready_s", "s", "lower", "live: from the step of load to the second engine's readiness"),
        Metric("cold_start_s", "s", "lower", "live: from the order of the second engine until it took requests"),
        Metric("crashes", "", "", "live: starts of the second engine that were killed"),
        Metric("crash_moved", "", "lower", "live: requests that such a start had got: they would have gone elsewhere"),
        Metric("moved", "", "", "live: requests that went on in another engine"),
        Metric("replaced_s", "s", "lower", "live: from the kill of an engine with requests until two were up again"),
        Metric("lost", "", "lower", "live: requests that did not end with all their tokens"),
        Metric("drained_with", "", "", "live: requests that were inside the engine that was drained"),
        Metric("removed", "", "higher", "live: engines drained and ended"),
    )
    claim = Claim(
        "LLM serving as separately scaled services on Kubernetes: replicas that follow the load (HPA) serve "
        "fluctuating traffic with lower latency and higher throughput than a fixed number. A digest of "
        "the article quotes 37.2 % less latency, 2.1 times the throughput and 58 % more utilization, for LLaMA-2-13B "
        "on GPUs; not verified"
    )
    required = (
        Required(
            "HPA on the queue takes fewer replica-seconds than a static peak",
            Of("hpa-queue", "replica_seconds"),
            Of("static-peak", "replica_seconds"),
            at_most=0.9,
            how="paired",
        ),
        Required(
            "at 0.95 of its attainment or more",
            Of("hpa-queue", "attainment"),
            Of("static-peak", "attainment"),
            at_least=0.95,
            how="paired",
        ),
        Required(
            "and attains more than HPA on use",
            Of("hpa-queue", "attainment"),
            Of("hpa-busy", "attainment"),
            at_least=1.0001,
            how="paired",
        ),
        Required(
            "for no more replica-seconds than that (within 5 %)",
            Of("hpa-queue", "replica_seconds"),
            Of("hpa-busy", "replica_seconds"),
            at_most=1.05,
            how="paired",
        ),
        Required("the oracle bounds it from below", Of("hpa-queue", "regret"), at_least=0.0),
        Required(
            "a longer cold start costs attainment",
            Of("sawtooth-slow", "attainment"),
            Of("sawtooth-warm", "attainment"),
            at_most=0.98,
            how="paired",
        ),
        Required(
            "without a stabilization window a sawtooth makes it flap",
            Of("sawtooth-bare", "changes"),
            Of("sawtooth", "changes"),
            at_least=1.5,
            how="paired",
        ),
        Required("live: one engine misses the SLO under the step", Of("live", "overload_p95"), at_least=100.0),
        Required("live: with the second it is kept again", Of("live", "settled_p95"), at_most=100.0),
        Required("live: a start that crashes", Of("live", "crashes"), at_least=1.0, how="every"),
        Required("live: gets no request", Of("live", "crash_moved"), at_most=0.0, how="every"),
        Required("live: an engine that is killed is replaced", Of("live", "replaced_s"), at_most=30.0, how="every"),
        Required("live: nothing is lost, not while draining either", Of("live", "lost"), at_most=0.0, how="every"),
        Required("live: one engine is drained and ended", Of("live", "removed"), at_least=1.0, how="every"),
        Required(
            "more servers for the slow group of layers help",
            Of("tandem-slow", "requests_per_s"),
            Of("tandem", "requests_per_s"),
            at_least=1.1,
        ),
        Required(
            "more for the fast group do not",
            Of("tandem-fast", "requests_per_s"),
            Of("tandem", "requests_per_s"),
            at_most=1.02,
        ),
        Required("an HPA at each group grows the slow one", Of("tandem-hpa", "slow_servers"), at_least=2.0),
        Required("and not the fast one", Of("tandem-hpa", "fast_servers"), at_most=1.0),
    )
    warmup = 0
    seconds, quick_seconds = 600.0, 300.0
    sources = (
        "millstream.sim.simulate",
        "millstream.sim.scaling",
        "millstream.sim.tandem",
        "millstream.sim.arrivals",
        "millstream.cluster.fleet",
        "millstream.cluster.scaling",
        "millstream.cluster.client",
        "millstream.cluster.ray_backend",
        "millstream.engine.calibrate",
    )

    def open(self, ctx: Context) -> None:
        from millstream.sim import traces

        draw = random.Random(ctx.seed)
        self.rows = [row for row in traces.load(TRACE) if row.num_prompt <= MOST_PROMPT]
        draw.shuffle(self.rows)
        self._calibrate(ctx)
        # Twice what the longest prompt takes on an idle replica: the longest thus have as long to wait as to compute.
        alone = self._simulate(self._calls_of([replace(self.rows[0], num_prompt=MOST_PROMPT)], None, 1), 1)
        self.slo_s = 2 * (alone.served[0].times_s[0] - alone.served[0].arrival_s)
        self._live = asyncio.run(_learn(ctx.size(24, 12), ctx.size(3, 1)))
        self.cold_start_s = self._live.cold_start_s
        self.capacity = self._capacity(ctx)
        self.mean = MOST * self.capacity * (1 + LOW) / 2 / BURST_TIMES
        self._days: dict[int, Any] = {}
        self._runs: dict[tuple[int, str], dict[str, float]] = {}
        self._live_found: dict[str, float] | None = None
        self.inside = self._tune(ctx)
        ctx.say(
            f"a replica does {self.capacity:.2f} requests/s within {self.slo_s:.1f} s and starts in "
            f"{self.cold_start_s:.1f} s; the day has {self.mean:.2f} requests/s; hpa-queue aims at "
            f"{self.inside:g} requests a replica"
        )

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.sim import data

        return {"model": self.checksum, "trace": data.find(TRACE)}

    def _calibrate(self, ctx: Context) -> None:
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine import calibrate
        from millstream.engine.assemble import assemble
        from millstream.sim.replica import EngineSetting

        config = EngineConfig(
            model=ModelConfig(weights="blocks"), cache=CacheConfig(prefix=Choice("none"), bytes="512MiB"), seed=0
        )
        model = assemble(MODEL, config, tune=True)
        resolved, capacity = model.resolved, model.engine.runner.capacity()
        self.vocab, self.checksum = model.spec.vocab_size, model.source.checksum().encode()
        # Sequences of these lengths are all that will come.
        room = min(min(capacity.blocks.values()) * capacity.block_size, 16 * MOST_PROMPT)
        compositions = calibrate.grid(room, 2 * MOST_PROMPT, capacity.block_size)
        if ctx.quick:
            compositions = [one for one in compositions if one.tokens <= 4 * MOST_PROMPT]
        self.found = calibrate.calibrate(model, compositions, 3, ctx.seed)
        model.engine.close()
        self.profile = calibrate.profile_of(model, self.found)
        self.setting = EngineSetting((Choice("fcfs"),), resolved.meters, Choice("none"), plans=resolved.plans)

    # -- the simulated day

    def _calls_of(self, rows: list[Any], rate: float | None, seed: int, **source: Any) -> Any:
        from millstream.sim import workload

        return workload.calls([workload.Source(rows, rate=rate, **source)], 4096, seed)

    def _simulate(self, calls: Any, count: int, **scaled: Any) -> Any:
        from millstream.sim.simulate import Simulation

        replicas = [(f"here/{place}", self.profile) for place in range(count)]
        return Simulation(calls, replicas, self.setting, max_tokens=MOST_PROMPT, **scaled).run()

    def _capacity(self, ctx: Context) -> float:
        """Requests a second that one replica serves with GOAL of them within the SLO."""
        from millstream.sim import report

        rows = self.rows[: ctx.size(600, 200)]

        def run(rate: float) -> Any:
            return self._simulate(self._calls_of(rows, rate, ctx.seed, burstiness=1.0), 1)

        return report.capacity(run, {"ttft": self.slo_s}, GOAL, 1 / self.slo_s, 0.05)

    def _day(self, seed: int) -> tuple[Any, tuple[list[float], list[float]]]:
        """The calls of a day, and its true rates."""
        from millstream.sim.arrivals import Bursts, Diurnal, RateCurve

        if seed not in self._days:
            diurnal = Diurnal(DAY_S, LOW)
            bursts = Bursts(DAY_S / BURSTS_A_DAY, BURST_FOR_S, BURST_TIMES)
            draw = random.Random(seed)
            start = draw.randrange(len(self.rows))
            rows = self.rows[start:] + self.rows[:start]
            most = int(self.mean * BURST_TIMES * DAY_S)
            calls = self._calls_of(rows, self.mean, seed, diurnal=diurnal, bursts=bursts, count=most, seconds=DAY_S)
            curve = RateCurve(self.mean, diurnal, bursts, seed)
            self._days[seed] = calls, curve.sampled(DAY_S, 15.0)
        return self._days[seed]  # type: ignore[no-any-return]

    def _rule(self, arm: str, curve: tuple[list[float], list[float]]) -> Choice:
        return {
            "static-min": Choice("static", {"n": self._least()}),
            "static-peak": Choice("static", {"n": MOST}),
            "hpa-busy": self._hpa("busy", BUSY),
            "hpa-queue": self._hpa("inside", self.inside),
            "slo": Choice("slo", {"ttft_s": self.slo_s, "goal": GOAL}),
            "predictive": Choice("predictive", {"cold_start_s": self.cold_start_s}),
            "oracle": Choice(
                "oracle",
                {
                    "times": curve[0],
                    "rates": curve[1],
                    "capacity": self.capacity,
                    "cold_start_s": self.cold_start_s,
                },
            ),
        }[arm]

    def _least(self) -> int:
        return max(1, math.ceil(self.mean / self.capacity))

    def _scaled(self, calls: Any, rule: Choice, count: int, cold_start_s: float) -> tuple[dict[str, float], Any]:
        from millstream.core import registry

        result = self._simulate(
            calls,
            count,
            autoscaler=registry.make("autoscaler", rule),
            cold_start_s=cold_start_s,
            max_replicas=MOST,
            promise=Slo(ttft_s=self.slo_s),
        )
        waits = sorted(one.times_s[0] - one.arrival_s for one in result.served if one.times_s)
        log = result.scaling
        whole = sum(len(one.times_s) == one.call.num_output for one in result.served)
        return {
            "attainment": 100 * sum(wait <= self.slo_s for wait in waits) / len(result.served),
            "replica_seconds": log.replica_seconds,
            "ttft_p95_s": percentile(waits, 95),
            "changes": float(len(log.changes)),
            "reversals": float(log.reversals),
            "lost": float(len(calls) - whole),
        }, result

    def _hpa(self, metric: str, target: float, **options: Any) -> Choice:
        return Choice("hpa", {"metric": metric, "target": target, **options})

    def _tune(self, ctx: Context) -> float:
        """The lowest target, and so the best attainment, for what use would spend; on days that no arm is judged on."""
        days = [self._day(ctx.seed + 90 + day)[0] for day in range(ctx.size(TUNING_DAYS, 1))]

        def spent(rule: Choice) -> float:
            paid = [self._scaled(calls, rule, self._least(), self.cold_start_s)[1].scaling for calls in days]
            return float(sum(log.replica_seconds for log in paid))

        most = spent(self._hpa("busy", BUSY))
        return next((target for target in INSIDE if spent(self._hpa("inside", target)) <= most), INSIDE[-1])

    def check(self, ctx: Context) -> CheckResult:
        """Nothing is lost while replicas come and go, runs repeat themselves, and cold starts matter."""
        calls, _ = self._day(ctx.seed + 100)
        rule = self._hpa("inside", self.inside, down_window_s=15.0)
        prints = []
        for cold_start_s in (0.0, self.cold_start_s, self.cold_start_s):
            found, result = self._scaled(calls, rule, 1, cold_start_s)
            prints.append(result.fingerprint)
        drained = sum(span.drained_s is not None for span in result.scaling.spans)
        error, target = self.found.errors[self.found.best], self.found.target
        return CheckResult(
            (
                CheckRow(
                    "every simulated request has all its tokens, though replicas are drained",
                    found["lost"] == 0 and drained > 0,
                    f"{len(calls)} requests; {drained} replicas were drained",
                ),
                CheckRow("runs repeat themselves", prints[1] == prints[2], prints[1]),
                CheckRow(
                    "a cold start changes them", prints[0] != prints[1], f"{self.cold_start_s:.1f} s against none"
                ),
                CheckRow(
                    "step times on compositions that were held out",
                    error <= target,
                    f"{self.found.best}: {100 * error:.1f} % off, at most {100 * target:.1f} %; repeats differ by "
                    f"{100 * self.found.noise:.1f} %",
                ),
            )
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        name = arm.name
        if name == "live":
            return self._measure_live(ctx)
        if name.startswith("tandem"):
            return self._tandem(ctx, name)
        if name.startswith("sawtooth"):
            return self._sawtooth(ctx, name)
        oracle = self._arm(ctx, "oracle")
        found = self._arm(ctx, name)
        ctx.expect(f"{name}: every request has all its tokens", found["lost"] == 0)
        return {
            **{key: value for key, value in found.items() if key != "lost"},
            "regret": 100 * (found["replica_seconds"] / oracle["replica_seconds"] - 1),
            "regret_attainment": oracle["attainment"] - found["attainment"],
        }

    def _arm(self, ctx: Context, name: str) -> dict[str, float]:
        """Simulations repeat themselves: the oracle's is made once a repeat."""
        key = (ctx.repeat, name)
        if key not in self._runs:
            calls, curve = self._day(ctx.seed + 100 + ctx.repeat)
            count = MOST if name == "static-peak" else self._least()
            self._runs[key], _ = self._scaled(calls, self._rule(name, curve), count, self.cold_start_s)
        return self._runs[key]

    def _sawtooth(self, ctx: Context, name: str) -> dict[str, float]:
        """Up to twice what one replica can do, and down to nearly nothing, tooth after tooth."""
        from millstream.sim.arrivals import Diurnal

        points = ((0.0, 0.05), (0.49, 0.05), (0.5, 1.0), (0.99, 1.0))
        seconds = SAW_S * ctx.size(SAW_TEETH, 3)
        rate = 1.5 * self.capacity
        calls = self._calls_of(
            self.rows,
            rate,
            ctx.seed + 200 + ctx.repeat,
            diurnal=Diurnal(SAW_S, points=points),
            count=int(4 * rate * seconds),
            seconds=seconds,
        )
        rule = self._hpa("inside", self.inside, **({"down_window_s": 0.0} if name == "sawtooth-bare" else {}))
        cold_start_s = {"sawtooth-warm": 0.0, "sawtooth-slow": self.cold_start_s + 60.0}.get(name, self.cold_start_s)
        found, _ = self._scaled(calls, rule, 1, cold_start_s)
        ctx.expect(f"{name}: every request has all its tokens", found.pop("lost") == 0)
        return found

    # -- groups of layers

    def _tandem(self, ctx: Context, name: str) -> dict[str, float]:
        from millstream.core import registry
        from millstream.core.shape import StepShape
        from millstream.sim.tandem import Job, tandem

        cost = self.found.cost
        draw = random.Random(ctx.seed + 300 + ctx.repeat)
        chosen = draw.sample(self.rows, ctx.size(TANDEM_JOBS, 60))

        def steps(row: Any) -> tuple[float, ...]:
            count = row.num_prompt
            own = [cost.seconds(StepShape(1, count, count * (count + 1) // 2, 0, 0, 0, 1))]
            own += [cost.seconds(StepShape(0, 0, 0, 1, count + one, 0, 1)) for one in range(1, row.num_output)]
            return tuple(own)

        made = [steps(row) for row in chosen]
        slow_s = max(SHARES) * sum(map(sum, made)) / len(made)
        at = 0.0
        jobs = []
        for own in made:
            at += draw.expovariate(OVERLOAD / slow_s)
            jobs.append(Job(at, own))
        servers = {"tandem-slow": (2, 1), "tandem-fast": (1, 2)}.get(name, (1, 1))
        rules = []
        if name == "tandem-hpa":
            rules = [registry.make("autoscaler", self._hpa("busy", TANDEM_TARGET)) for _ in SHARES]
        passed = tandem(jobs, SHARES, servers, rules, cold_start_s=self.cold_start_s, most=2)
        waits = sorted(first - job.at_s for first, job in zip(passed.first_s, jobs, strict=True))
        return {
            "requests_per_s": len(jobs) / (max(passed.ended_s) - jobs[0].at_s),
            "ttft_p95_s": percentile(waits, 95),
            "slow_servers": float(passed.servers[0]),
            "fast_servers": float(passed.servers[1]),
        }

    # -- live

    def _measure_live(self, ctx: Context) -> dict[str, float]:
        """Once a repeat; in a quick run once, for it takes as long as it takes."""
        if self._live_found is None or not ctx.quick:
            self._live_found = asyncio.run(_live_run(self._live, random.Random(ctx.seed + ctx.repeat)))
        return self._live_found


@dataclass(frozen=True, slots=True)
class _Learned:
    """Of a live engine: seconds from its order until it takes requests, requests it does in a second, the SLO."""

    cold_start_s: float
    rate: float
    slo_s: float
    vocab: int


@dataclass(slots=True)
class _Asked:
    """One live request: when it was sent and had its first token, and whether all its tokens came."""

    at_s: float
    first_s: float = math.inf
    whole: bool = False


def _cluster(rule: Choice | None = None) -> contextlib.AbstractAsyncContextManager[Any]:
    """One engine, and room for another."""
    from millstream.bench.workers import workers
    from millstream.cluster.config import ClusterConfig

    config = ClusterConfig(replicas=1, max_replicas=2, interval_s=LIVE_LOOK_S)
    return workers(MODEL, LIVE_ENGINE, config, autoscaler=rule)


async def _ask(cluster: Any, vocab: int, asked: _Asked, number: int) -> None:
    draw = random.Random(number)
    ids = tuple(draw.randrange(vocab) for _ in range(LIVE_PROMPT))
    params = SamplingParams(max_tokens=LIVE_OUTPUT, temperature=0.0, ignore_eos=True)
    tokens = 0
    with contextlib.suppress(MillstreamError):
        async for chunk in cluster.submit(Request(cluster.new_id(), (Tokens(ids),), params)):
            if chunk.tokens and not tokens:
                asked.first_s = time.monotonic()
            tokens += len(chunk.tokens)
            asked.whole = asked.whole or (chunk.finish is Finish.LENGTH and tokens == LIVE_OUTPUT)


async def _learn(count: int, starts: int) -> _Learned:
    """Of one engine behind a cluster: `starts` are made of a second one, `count` requests come at once."""
    async with _cluster() as cluster:
        vocab = (await cluster.facts()).limits.vocab_size
        alone = []
        for number in range(6):
            asked = _Asked(time.monotonic())
            await _ask(cluster, vocab, asked, number)
            alone.append(asked.first_s - asked.at_s)
        begin = time.monotonic()
        await asyncio.gather(*(_ask(cluster, vocab, _Asked(begin), number) for number in range(count)))
        rate = count / (time.monotonic() - begin)
        taken = []
        for _ in range(starts):
            cluster.target = 2
            await _until(lambda: len(cluster.fleet.up) == 2)
            taken.append(cluster.members()[-1].age_s)
            cluster.target = 1
            await _until(lambda: len(cluster.members()) == 1)
        return _Learned(statistics.median(taken), rate, LIVE_SLO * statistics.median(alone[1:]), vocab)


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(START_S):
        while not true():
            await asyncio.sleep(LOOK_S)


async def _live_run(learned: _Learned, draw: random.Random) -> dict[str, float]:
    """Traffic in phases before a cluster that scales itself. What did not happen took START_S.

    The second engine's first start is killed while it loads; in the third phase an engine with requests is killed.
    """
    options = {"metric": "inside", "target": LIVE_TARGET, "up_period_s": 1.0, "down_window_s": LIVE_DOWN_S}
    async with _cluster(Choice("hpa", options)) as cluster:
        watch = _Watch(cluster)
        watching = asyncio.create_task(watch.run())
        sent: list[list[_Asked]] = [[] for _ in PHASES]
        tasks: list[asyncio.Task[None]] = []
        begins, until = [], time.monotonic()
        for own, (seconds, share) in zip(sent, PHASES, strict=True):
            at, until = until, until + seconds
            begins.append(at)
            while (at := at + draw.uniform(0.7, 1.3) / (learned.rate * share)) < until:
                await asyncio.sleep(at - time.monotonic())
                own.append(_Asked(at))
                tasks.append(asyncio.create_task(_ask(cluster, learned.vocab, own[-1], len(tasks))))
                if own is sent[2] and len(own) == 2:
                    watch.kill(max(cluster.members(), key=lambda one: one.requests))
            await asyncio.sleep(until - time.monotonic())
        await asyncio.gather(*tasks)
        with contextlib.suppress(TimeoutError):
            await _until(lambda: len(watch.seen[-1][1]) == 1)
        watching.cancel()
        moved = cluster.migrations
    ready_s, cold_start_s = watch.two_up(begins[1])
    killed_s = watch.killed[-1][0]
    waits = {
        "overload_p95": [one for one in sent[1] if one.at_s < ready_s],
        "settled_p95": [one for one in sent[1] if one.at_s > begins[2] - (begins[2] - begins[1]) / 3],
    }
    p95 = {name: percentile(sorted(one.first_s - one.at_s for one in own), 95) for name, own in waits.items()}
    seen = [one for _, members in watch.seen for one in members]
    ended = {one.pid for one in seen if one.pid is not None} - {one.pid for one in watch.seen[-1][1]}
    return {
        **{name: 100 * min(seconds, START_S) / learned.slo_s for name, seconds in p95.items()},
        "ttft_p95_s": min(p95["settled_p95"], START_S),
        "second_ready_s": ready_s - begins[1],
        "cold_start_s": cold_start_s,
        "crashes": float(len(watch.killed) - 1),
        "crash_moved": float(watch.killed[-1][1]),
        "moved": float(moved),
        "replaced_s": watch.two_up(killed_s)[0] - killed_s,
        "lost": float(sum(not one.whole for own in sent for one in own)),
        "drained_with": float(max((one.requests for one in seen if one.state == "draining"), default=0)),
        "removed": float(len(ended - {pid for _, _, pid in watch.killed})),
    }


class _Watch:
    """Looks at a cluster's engines, and kills the first one that it sees loading."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.seen: list[tuple[float, list[Any]]] = []
        self.killed: list[tuple[float, int, int]] = []  # when, how many requests had moved until then, and whom

    async def run(self) -> None:
        while True:
            self.seen.append((time.monotonic(), self.cluster.members()))
            starting = [one for one in self.seen[-1][1] if one.state == "starting" and one.pid is not None]
            if starting and not self.killed:
                self.kill(starting[0])
            await asyncio.sleep(LOOK_S)

    def kill(self, replica: Any) -> None:
        self.killed.append((time.monotonic(), self.cluster.migrations, replica.pid))
        os.kill(replica.pid, signal.SIGKILL)

    def two_up(self, after_s: float) -> tuple[float, float]:
        """When two engines were up that were not killed before, and how long the younger took to start."""
        gone = {pid for at_s, _, pid in self.killed if at_s <= after_s}
        for now, members in self.seen:
            up = [one for one in members if one.state == "up" and one.pid not in gone]
            if now > after_s and len(up) > 1:
                return now, min(one.age_s for one in up)
        return after_s + START_S, START_S


CARD = Card("cloud-native", "Autoscaling: HPA, promises and forecasts against static fleets and the oracle", paper=29)
PLUGIN = CloudNative
