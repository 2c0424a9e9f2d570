"""Fairness and locality at once: DLPM in one engine, D2LPM over many (Cao et al., 2025).

Live: SmolLM2 with a KV cache that holds some of the prefixes in use. Four tenants with prefixes of their own; one
floods the engine at once with FLOOD_TIMES what the machine does of it in all the time, the others send now and then, a
QUIET_SHARE of it each. The engine runs for a fixed time; what waits then is given up, and a first token that did not
come by then counts as coming at that moment. Two worker processes of SmolLM2 behind routers, a core each. Simulated:
eight engines of an A100's published step times behind routers, sixteen tenants of unlike rates, each with prefixes of
its own.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millstream.core.registry import Card, Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.reproduce.protocol import (
    Arm,
    CheckResult,
    CheckRow,
    Claim,
    Context,
    Experiment,
    Figure,
    Metric,
    Of,
    Required,
)
from millstream.sim.workload import Call

PROFILE = "vidur-a100-llama3-8b-tp1"
# About what a prompt costs of which nothing is held; of engines behind routers, four times as much.
QUANTUM, SMALL, LARGE, FLEET = 512.0, 128.0, 65536.0, 2048.0
POLICIES: dict[str, tuple[Choice, ...]] = {
    "fcfs": (Choice("fcfs"),),
    "vtc": (Choice("vtc"), Choice("fcfs")),
    "longest-prefix": (Choice("longest-prefix", {"patience_s": 1e6}),),
    "dlpm": (Choice("dlpm", {"quantum": QUANTUM}),),
    "dlpm-small": (Choice("dlpm", {"quantum": SMALL}),),
    "dlpm-large": (Choice("dlpm", {"quantum": LARGE}),),
}
ROUTERS = {
    "turns": Choice("round-robin"),
    "least": Choice("least-work"),
    "prefix-only": Choice("prefix-affinity", {"least": 0.01, "more": 1_000_000}),
    "d2lpm": Choice("d2lpm", {"quantum": 6_000.0}),
}
FLOOD = "flood"
QUIET = ("one", "two", "three")
# Tokens of a prefix, of a question, of an answer; prefixes a tenant; blocks of the cache, in tokens.
PREFIX, QUESTION, ANSWER, PREFIXES, CACHE = 448, (16, 48), (4, 12), 3, 3072
# The most that an admission is charged. Bounds are twice that for vtc, and twice that and the quantum for dlpm.
LONGEST = PREFIX + QUESTION[1]
# Those in QUIET keep within their fair share even where no prefix of theirs is held: a prompt then costs tenfold.
FLOOD_TIMES, QUIET_SHARE = 1.5, 0.02
TRIED, QUICK_TRIED = 120, 40
SECONDS, QUICK_SECONDS = 12.0, 5.0
# Of the two workers: tokens of KV each, requests, and the rate of all as a share of what the machine does of the
# flooder's, whose prefixes are held; tenants at equal rates.
WORKER_CACHE, ASKED, QUICK_ASKED, ASKED_SHARE = 3072, 90, 40, 0.15
ENGINES, TENANTS, SENT, QUICK_SENT, RATE = 8, 16, 1200, 300, 40.0


class Dlpm(Experiment):
    name = "dlpm"
    paper = 64
    title = "Shares for tenants that keep prefixes in use"
    arms = (
        *(
            Arm(
                f"live-{name}",
                f"one engine under {' and '.join(map(str, stack))}",
                tuple(f"policy:{one.name}" for one in stack),
            )
            for name, stack in POLICIES.items()
        ),
        *(
            Arm(f"pair-{name}", f"two worker processes under dlpm, behind {router}", (f"router:{router.name}",))
            for name, router in ROUTERS.items()
        ),
        *(
            Arm(f"route-{name}", f"eight simulated engines under dlpm, behind {router}", (f"router:{router.name}",))
            for name, router in ROUTERS.items()
        ),
    )
    metrics = (
        Metric("tokens_per_s", "tokens/s", "higher", "tokens of prompts and outputs of requests that were answered"),
        Metric("hits", "%", "higher", "prompt tokens that the prefix cache held"),
        Metric("worst_ttft_p99_s", "s", "lower", "99th percentile of the first token, of the tenant that is worst off"),
        Metric("gap_over_bound", "", "lower", "largest difference of service of two waiting tenants over its bound"),
        Metric("fairness", "", "higher", "Jain's index over tenants, of one over their mean seconds a token"),
        Metric(
            "imbalance", "", "lower", "the busiest engine over the mean of all, by time or (workers) by computed tokens"
        ),
    )
    claim = Claim(
        "2.87 times the throughput of VTC and up to 7.18 times lower latency of a client than distributed baselines, "
        "at bounded differences of service between clients",
        (Figure("throughput against vtc", Of("live-dlpm", "tokens_per_s"), Of("live-vtc", "tokens_per_s"), 1.0, 2.87),),
    )
    required = (
        Required(
            "more throughput than by counters alone",
            Of("live-dlpm", "tokens_per_s"),
            Of("live-vtc", "tokens_per_s"),
            at_least=1.0,
        ),
        Required(
            "the longest prefix alone has the most (within 5 %)",
            Of("live-longest-prefix", "tokens_per_s"),
            Of("live-dlpm", "tokens_per_s"),
            at_least=0.95,
        ),
        Required(
            "the worst tenant waits as under vtc, or longer by as much as the bound of its service is wider",
            Of("live-dlpm", "worst_ttft_p99_s"),
            Of("live-vtc", "worst_ttft_p99_s"),
            at_most=1 + QUANTUM / LONGEST,
        ),
        Required(
            "and a third of what it waits by the longest prefix alone",
            Of("live-dlpm", "worst_ttft_p99_s"),
            Of("live-longest-prefix", "worst_ttft_p99_s"),
            at_most=0.34,
        ),
        *(
            Required(
                f"{name}: service differs by no more than its bound",
                Of(f"live-{name}", "gap_over_bound"),
                at_most=1.0,
                how="every",
            )
            for name in ("dlpm", "dlpm-small", "dlpm-large")
        ),
        Required(
            "a larger quantum keeps more of the cache in use than a small one",
            Of("live-dlpm-large", "hits"),
            Of("live-dlpm-small", "hits"),
            at_least=1.0,
        ),
        Required(
            "two workers: more hits than in turns", Of("pair-d2lpm", "hits"), Of("pair-turns", "hits"), at_least=1.2
        ),
        Required(
            "over engines: more hits than in turns", Of("route-d2lpm", "hits"), Of("route-turns", "hits"), at_least=1.2
        ),
        Required("and than the least used engine", Of("route-d2lpm", "hits"), Of("route-least", "hits"), at_least=1.2),
        Required(
            "loads are nearer to each other than by prefixes alone",
            Of("route-d2lpm", "imbalance"),
            Of("route-prefix-only", "imbalance"),
            at_most=1.0,
        ),
        Required(
            "and no tenant waits longer than in turns",
            Of("route-d2lpm", "worst_ttft_p99_s"),
            Of("route-turns", "worst_ttft_p99_s"),
            at_most=1.0,
        ),
    )
    warmup = 0
    seconds = 900.0
    sources = (
        "millstream.sched.scheduler",
        "millstream.memory.prefix.radix",
        "millstream.bench.stage",
        "millstream.bench.workers",
        "millstream.cluster.client",
        "millstream.cluster.fleet",
        "millstream.sim.simulate",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench.stage import Stage
        from millstream.sched import profiles
        from millstream.sim.published import PUBLISHED

        self.profile = profiles.load(PROFILE, PUBLISHED)
        self.stage = Stage()
        self.paired: dict[int, dict[str, dict[str, float]]] = {}
        ctx.repeat = -1
        draw = random.Random(f"dlpm {ctx.seed} flood")
        flood = [(0.001 * number, FLOOD) for number in range(ctx.size(TRIED, QUICK_TRIED))]
        alone = self._made(flood, draw, PREFIX, QUESTION, ANSWER, PREFIXES)
        setting = self._setting("longest-prefix")
        taken = [self.stage.live(alone, setting).seconds for _ in range(ctx.size(3, 1))]
        self.rate = len(alone) / statistics.median(taken)
        ctx.say(f"the machine does {self.rate:.1f} requests of the flooder a second")

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        shapes = (
            *(PREFIX, QUESTION, ANSWER, PREFIXES, CACHE, FLOOD_TIMES, QUIET_SHARE, ENGINES, TENANTS, SENT, RATE),
            *(WORKER_CACHE, ASKED, ASKED_SHARE),
        )
        return {"model": self.stage.model.source.checksum().encode(), "shapes": repr(shapes).encode()}

    def _calls(self, ctx: Context) -> list[Any]:
        """What the tenants send: the flooder all at once, the others at random times."""
        draw = random.Random(f"dlpm {ctx.seed} {ctx.repeat}")
        seconds = SECONDS if not ctx.quick else QUICK_SECONDS
        sent = [(0.001 * number, FLOOD) for number in range(round(FLOOD_TIMES * seconds * self.rate))]
        for tenant in QUIET:
            at = 0.3
            while (at := at + draw.expovariate(QUIET_SHARE * self.rate)) < seconds:
                sent.append((at, tenant))
        return self._made(sorted(sent), draw, PREFIX, QUESTION, ANSWER, PREFIXES)

    @staticmethod
    def _made(
        sent: Sequence[tuple[float, str]],
        draw: random.Random,
        prefix: int,
        question: tuple[int, int],
        answer: tuple[int, int],
        prefixes: int,
        text: int = 0,
    ) -> list[Call]:
        places = {tenant: number for number, tenant in enumerate(sorted({tenant for _, tenant in sent}))}
        calls = []
        for number, (at, tenant) in enumerate(sent, start=1):
            shared = (text << 30) + ((places[tenant] * prefixes + draw.randrange(prefixes)) << 20)
            own = (1 << 38) + (text << 34) + (number << 20)
            prompt = (*range(shared, shared + prefix), *range(own, own + draw.randint(*question)))
            calls.append(Call(number, at, prompt, draw.randint(*answer), tenant))
        return calls

    def _setting(self, name: str) -> Any:
        from millstream.bench.stage import Setting

        blocks = CACHE // self.stage.model.resolved.block_size
        return Setting(POLICIES[name], seats=8, blocks=blocks)

    def check(self, ctx: Context) -> CheckResult:
        """The same tokens under every order, from a cache that is always short."""
        everyone = (FLOOD, *QUIET)
        sent = [(0.001 * number, everyone[number % len(everyone)]) for number in range(ctx.size(24, 12))]
        calls = self._made(sent, random.Random(f"dlpm {ctx.seed} check"), PREFIX, QUESTION, ANSWER, PREFIXES)
        runs = {name: self.stage.live(calls, self._setting(name)) for name in POLICIES}
        truth = runs["fcfs"].tokens
        return CheckResult(
            tuple(
                CheckRow(
                    f"{name}: whole outputs, the same as first come first served",
                    run.tokens == truth and all(len(truth[call.id]) == call.num_output for call in calls),
                    f"{len(calls)} requests",
                )
                for name, run in runs.items()
            )
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        where, _, name = arm.name.partition("-")
        if where == "pair":
            return self._pair(ctx, name)
        return self._route(ctx, name) if where == "route" else self._live(ctx, name)

    def _live(self, ctx: Context, name: str) -> Mapping[str, float]:
        calls = self._calls(ctx)
        seconds = QUICK_SECONDS if ctx.quick else SECONDS
        played = self.stage.live(calls, self._setting(name), deadline_s=seconds)
        answered = [one for one in played.served if one.finish == "stop"]
        tokens = sum(one.call.num_prompt + len(one.times_s) for one in answered)
        prompt = sum(one.call.num_prompt for one in answered)
        waits: dict[str, list[float]] = {tenant: [] for tenant in QUIET}
        for one in played.served:
            if one.call.tenant != FLOOD:
                waits[one.call.tenant].append((one.times_s[0] if one.times_s else played.seconds) - one.arrival_s)
        quantum = next((choice.options.get("quantum", 0.0) for choice in POLICIES[name]), 0.0)
        bound = 2 * (LONGEST + 2 * CACHE + quantum)
        return {
            "tokens_per_s": tokens / played.seconds,
            "hits": 100 * sum(one.cached for one in answered) / max(1, prompt),
            "worst_ttft_p99_s": max(_p99(own) for own in waits.values() if own),
            "gap_over_bound": _gap(played.served) / bound,
        }

    def _pair(self, ctx: Context, name: str) -> Mapping[str, float]:
        """All routers of a repeat have the same two workers, one after the other, each with texts of its own."""
        if ctx.repeat not in self.paired:
            self.paired[ctx.repeat] = asyncio.run(self._pairs(ctx))
        return self.paired[ctx.repeat][name]

    async def _pairs(self, ctx: Context) -> dict[str, dict[str, float]]:
        from millstream.bench.workers import workers
        from millstream.cluster.config import ClusterConfig
        from millstream.core import registry

        model = self.stage.model
        held = min(model.resolved.blocks.values()) * model.resolved.block_size
        engine = {
            "model": {"weights": "blocks"},
            "cache": {"bytes": WORKER_CACHE * model.built.kv_bytes // held},
            "sched": {"policies": [{"name": "dlpm", "quantum": FLEET}], "max_rows": 8},
            "runner": {"threads": 1},
            "seed": 0,
        }
        draw, found = random.Random(f"pair {ctx.seed} {ctx.repeat}"), {}
        async with workers(self.stage.name, engine, ClusterConfig(replicas=2)) as cluster:
            for place, name in enumerate(draw.sample(list(ROUTERS), len(ROUTERS))):
                cluster.fleet.router = registry.make("router", ROUTERS[name])
                sent, at = [], 0.0
                for _ in range(ctx.size(ASKED, QUICK_ASKED)):
                    at += draw.expovariate(ASKED_SHARE * self.rate)
                    sent.append((at, draw.choice((FLOOD, *QUIET))))
                calls = self._made(sent, draw, PREFIX, QUESTION, ANSWER, PREFIXES, text=1 + place)
                found[name] = await self._answered(cluster, calls)
        return found

    async def _answered(self, cluster: Any, calls: Sequence[Call]) -> dict[str, float]:
        """What the two workers make of calls that come when they come."""
        from millstream.sim.report import jain

        begun = time.monotonic()
        cached = computed = tokens = 0
        waits: dict[str, list[float]] = {}
        paces: dict[str, list[float]] = {}
        work: dict[int, int] = {}

        async def ask(call: Call) -> None:
            nonlocal cached, computed, tokens
            await asyncio.sleep(begun + call.at_s - time.monotonic())
            params = SamplingParams(max_tokens=call.num_output, temperature=0.0, ignore_eos=True)
            request = Request(cluster.new_id(), (Tokens(self.stage.ids(call)),), params, tenant=call.tenant)
            at, first, worker = time.monotonic(), 0.0, -1
            async for chunk in cluster.submit(request):
                if chunk.tokens and not first:
                    first = time.monotonic()
                    worker = cluster.fleet.place_of(request.id) or 0
                    waits.setdefault(call.tenant, []).append(first - at)
                if chunk.finish is not None:
                    assert chunk.finish is Finish.LENGTH, chunk.error or chunk.finish
                    usage = chunk.usage
                    own = usage.prompt_tokens - usage.cached_tokens
                    cached, computed = cached + usage.cached_tokens, computed + own
                    tokens += usage.prompt_tokens + usage.output_tokens
                    work[worker] = work.get(worker, 0) + own + usage.output_tokens
                    paces.setdefault(call.tenant, []).append((time.monotonic() - at) / usage.output_tokens)

        await asyncio.gather(*map(ask, calls))
        return {
            "tokens_per_s": tokens / (time.monotonic() - begun),
            "hits": 100 * cached / (cached + computed),
            "worst_ttft_p99_s": max(map(_p99, waits.values())),
            "fairness": jain([1 / statistics.fmean(own) for own in paces.values()]),
            "imbalance": max(work.values()) / (sum(work.values()) / 2),
        }

    def _route(self, ctx: Context, name: str) -> Mapping[str, float]:
        from millstream.core import registry
        from millstream.sim.compare import token_s
        from millstream.sim.replica import EngineSetting
        from millstream.sim.report import jain
        from millstream.sim.simulate import Simulation

        draw = random.Random(f"d2lpm {ctx.seed} {ctx.repeat}")
        # Rates of tenants fall as one over their place.
        shares = [1 / (place + 1) for place in range(TENANTS)]
        sent, at = [], 0.0
        for _ in range(ctx.size(SENT, QUICK_SENT)):
            at += draw.expovariate(RATE)
            sent.append((at, f"tenant-{draw.choices(range(TENANTS), shares)[0]:02}"))
        calls = self._made(sent, draw, 2048, (32, 256), (16, 96), 4)
        blocks = 12_000 // self.profile.block_size
        profile = self.profile.sized(blocks)
        setting = EngineSetting((Choice("dlpm", {"quantum": FLEET}),))
        router = registry.make("router", ROUTERS[name])
        result = Simulation(calls, [(f"engine {n}", profile) for n in range(ENGINES)], setting, router, seed=0).run()
        tenants: dict[str, list[Any]] = {}
        for one in result.served:
            tenants.setdefault(one.call.tenant, []).append(one)
        prompt = sum(one.call.num_prompt for one in result.served)
        output = sum(len(one.times_s) for one in result.served)
        return {
            "tokens_per_s": (prompt + output) / result.duration_s,
            "hits": 100 * sum(one.cached for one in result.served) / prompt,
            "worst_ttft_p99_s": max(_p99([one.times_s[0] - one.arrival_s for one in own]) for own in tenants.values()),
            "fairness": jain([1 / statistics.fmean(map(token_s, own)) for own in tenants.values()]),
            "imbalance": max(result.busy_s) / statistics.fmean(result.busy_s),
        }


def _p99(values: Sequence[float]) -> float:
    from millstream.sim.metrics import percentile

    return percentile(sorted(values), 99)


def _gap(served: Sequence[Any]) -> float:
    """The largest difference of service between the flooder and another tenant over any time in which both wait.

    Service: prompt tokens that were computed, when the first token comes, and twice the tokens of outputs.
    """
    worst = 0.0
    for tenant in QUIET:
        changes: list[tuple[float, str, float]] = []
        waiting: list[tuple[float, int]] = []
        for one in served:
            if one.call.tenant not in (FLOOD, tenant):
                continue
            if one.call.tenant == tenant:
                waiting += [(one.arrival_s, 1), (one.times_s[0] if one.times_s else 1e9, -1)]
            for place, at in enumerate(one.times_s):
                computed = one.call.num_prompt - one.cached if place == 0 else 0
                changes.append((at, one.call.tenant, 2.0 + computed))
        moments = sorted(
            [(at, 1, who, amount) for at, who, amount in changes] + [(at, 0, "", step) for at, step in waiting]
        )
        inside, low, high, difference = 0, 0.0, 0.0, 0.0
        for _, what, who, amount in moments:
            if what == 0:
                inside += int(amount)
                if inside == 1 and amount > 0:
                    difference = low = high = 0.0
            elif inside > 0:
                difference += amount if who == FLOOD else -amount
                low, high = min(low, difference), max(high, difference)
                worst = max(worst, high - low)
    return worst


CARD = Card("dlpm", "shares for tenants that keep prefixes in use", paper=64)
PLUGIN = Dlpm
