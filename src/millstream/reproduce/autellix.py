"""Programs of many calls under Autellix and the orders that it is compared with (Luo et al., 2025).

Simulated on the published step times of an A100: short chats with some wide tree searches among them (a heavy tail),
and searches beside long chains of calls (programs that fan out). Programs come at random at what one engine can just
serve. Then four engines behind a router, and a small mix live on SmolLM2. Policies know nothing of lengths; one arm
knows what is left of each program, which tells how far from the best they are. Preempted calls go to the host.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millstream.core.registry import Card, Choice
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

PROFILE = "vidur-a100-llama3-8b-tp1"
SEATS, CONTEXT = 16, 8000
PROGRAMS, QUICK_PROGRAMS = 60, 24
RATE = 1.0
ENGINES, ROUTED, QUICK_ROUTED, ROUTED_RATE = 4, 60, 24, 4.0
LIVE_PROGRAMS, QUICK_LIVE = 24, 10
POLICIES = {
    "fcfs": Choice("fcfs"),
    "mlfq": Choice("mlfq", {"quantum": 64.0}),
    "plas": Choice("autellix", {"count": "plas", "starving": 0}),
    "plas-starving": Choice("autellix", {"count": "plas", "starving": 2.0}),
    "atlas": Choice("autellix", {"count": "atlas", "starving": 0}),
    "srpt": Choice("srpt", {"patience_s": 0.0}),
}
ROUTERS = {"route-turns": "round-robin", "route-least": "least-work", "route-autellix": "autellix"}
LIVE = ("fcfs", "mlfq", "plas")
# What is swapped: a context of so many tokens, in blocks wherever they are.
SWAPPED, SWAPS, QUICK_SWAPS = 2048, 40, 10
SWAP = {"swap-each": "KV to the host and back, block by block", "swap-bulk": "KV to the host and back, all at once"}
# Small, so that levels mean something in seconds of a two-core machine.
LIVE_OPTIONS = {"mlfq": Choice("mlfq", {"quantum": 16.0}), "plas": Choice("autellix", {"count": "plas"})}


class Autellix(Experiment):
    name = "autellix"
    paper = 42
    title = "Programs of many calls: by their service, first come first served, and by levels"
    arms = (
        *(Arm(f"sim-{name}", f"simulated: {choice}", (f"policy:{choice.name}",)) for name, choice in POLICIES.items()),
        *(
            Arm(name, f"four simulated engines behind {router}", (f"router:{router}",))
            for name, router in ROUTERS.items()
        ),
        *(Arm(f"live-{name}", f"live: {LIVE_OPTIONS.get(name, name)}") for name in LIVE),
        *(Arm(name, told) for name, told in SWAP.items()),
    )
    metrics = (
        Metric("token_mean_s", "s", "lower", "heavy tail: mean over programs of time inside over output tokens"),
        Metric("token_p95_s", "s", "lower", "the same, 95th percentile"),
        Metric("token_p99_s", "s", "lower", "the same, 99th percentile"),
        Metric("fan_mean_s", "s", "lower", "searches and chains: mean response of searches, which fan out"),
        Metric("all_mean_s", "s", "lower", "searches and chains: mean response of all programs"),
        Metric("all_p99_s", "s", "lower", "searches and chains: 99th percentile of responses"),
        Metric("swap_gb_s", "GB/s", "higher", f"KV of {SWAPPED} tokens swapped, median of {SWAPS} times"),
    )
    claim = Claim(
        "4 to 15 times the throughput of programs at equal latency against a call-by-call engine, and 1.5 to 5.5 times "
        "against a multi-level feedback queue; a gap to an oracle remains",
        (
            Figure(
                "token latency of programs against fcfs",
                Of("sim-fcfs", "token_mean_s"),
                Of("sim-plas", "token_mean_s"),
                1.5,
                4.0,
            ),
        ),
    )
    required = (
        Required(
            "by service less than by levels on the heavy tail",
            Of("sim-plas", "token_mean_s"),
            Of("sim-mlfq", "token_mean_s"),
            at_most=1.0,
        ),
        Required(
            "and by levels less than first come first served",
            Of("sim-mlfq", "token_mean_s"),
            Of("sim-fcfs", "token_mean_s"),
            at_most=1.0,
        ),
        Required(
            "programs that fan out gain by counting their longest path",
            Of("sim-atlas", "fan_mean_s"),
            Of("sim-plas", "fan_mean_s"),
            at_most=1.0,
        ),
        Required(
            "raising who starves cuts the 99th percentile",
            Of("sim-plas-starving", "all_p99_s"),
            Of("sim-plas", "all_p99_s"),
            at_most=1.0,
        ),
        Required(
            "at a small cost of the mean",
            Of("sim-plas-starving", "all_mean_s"),
            Of("sim-plas", "all_mean_s"),
            at_most=1.1,
        ),
        Required(
            "its router does better than turns",
            Of("route-autellix", "token_mean_s"),
            Of("route-turns", "token_mean_s"),
            at_most=1.0,
        ),
        Required(
            "and than the least used engine",
            Of("route-autellix", "token_mean_s"),
            Of("route-least", "token_mean_s"),
            at_most=1.0,
        ),
        Required(
            "live: by service less than first come first served",
            Of("live-plas", "token_mean_s"),
            Of("live-fcfs", "token_mean_s"),
            at_most=1.0,
        ),
        Required(
            "how far from who knows what is left (reported)",
            Of("sim-plas", "token_mean_s"),
            Of("sim-srpt", "token_mean_s"),
            at_least=1.0,
        ),
    )
    warmup = 0
    seconds = 600.0
    sources = (
        "millstream.sched.scheduler",
        "millstream.sim.simulate",
        "millstream.sim.programs",
        "millstream.bench.stage",
        "millstream.cluster.fleet",
        "millstream.formats.kv._blocks",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench.stage import Stage
        from millstream.sched import profiles
        from millstream.sim import data
        from millstream.sim.published import PUBLISHED

        self.profile = profiles.load(PROFILE, PUBLISHED)
        self.lengths = [
            (min(prompt, 400), max(8, min(output, 80)))
            for prompt, output in data.lengths("sharegpt-lengths")
            if output >= 4
        ]
        self.stage = Stage()
        self.texts: dict[int, Mapping[int, tuple[int, ...]]] = {}

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.sim import data

        return {
            "lengths": data.find("sharegpt-lengths"),
            "model": self.stage.model.source.checksum().encode(),
            "shapes": repr((PROFILE, SEATS, PROGRAMS, RATE, POLICIES)).encode(),
        }

    # -- programs

    def _heavy(self, ctx: Context, count: int, rate: float, long: bool = False) -> list[Any]:
        """Chats of three turns in the mean, and one in eight a search of ten rounds of sixteen calls."""
        from millstream.sim import programs

        seed = 100 * ctx.seed + ctx.repeat
        draw = random.Random(f"heavy {seed}")
        # Behind the router prompts are longer than its bound for short calls, as those of agents are.
        lengths = [(prompt + 2500, output) for prompt, output in self.lengths] if long else self.lengths
        chats = programs.chats(lengths, count, seed, turns=3.0, think_s=1.0)
        trees = programs.trees(count, seed, rounds=10, width=16, output=160)
        # Every eighth place at random: each run has its tail.
        tail = {draw.randrange(place, min(place + 8, count)) for place in range(0, count, 8)}
        return programs.calls([trees[n] if n in tail else chats[n] for n in range(count)], rate, CONTEXT, seed)

    def _fans(self, ctx: Context, count: int, rate: float) -> list[Any]:
        """Half of the programs are searches of one to three rounds, the others chains of ten to thirty calls."""
        from millstream.sim import programs
        from millstream.sim.programs import Step, Template

        seed = 100 * ctx.seed + ctx.repeat
        draw = random.Random(f"fans {seed}")
        templates = []
        for number in range(count):
            if number % 2:
                (tree,) = programs.trees(1, 1000 * seed + number, rounds=1, width=draw.choice([8, 16, 24]), output=60)
                templates.append(Template("tree", (tree.steps * 3)[: draw.choice([1, 2, 3])]))
            else:
                steps = tuple(Step(((300 + 40 * turn, 60),)) for turn in range(draw.choice([10, 20, 30])))
                templates.append(Template("chain", steps))
        return programs.calls(templates, rate, CONTEXT, seed)

    # -- runs

    def _simulate(
        self, calls: Sequence[Any], policy: Choice, engines: int = 1, router: Any = None, oracle: Any = False
    ) -> Any:
        from millstream.sched.meters import usual
        from millstream.sim.replica import EngineSetting
        from millstream.sim.simulate import Simulation

        meters = usual(self.profile.step_tokens, SEATS)
        setting = EngineSetting((policy, Choice("fcfs")), meters, preemption="swap", host_blocks=self.profile.blocks)
        kinds = [(f"engine {place}", self.profile) for place in range(engines)]
        return Simulation(calls, kinds, setting, router, oracle=oracle, seed=0).run()

    def check(self, ctx: Context) -> CheckResult:
        """Every call has its whole output, with and without what the policies do; the small example of the paper is a
        unit test."""
        ctx.repeat = 0
        calls = self._heavy(ctx, 12, RATE)
        rows = []
        for name in ("fcfs", "plas", "atlas"):
            served = self._simulate(calls, POLICIES[name]).served
            whole = sum(len(one.times_s) == one.call.num_output for one in served)
            rows.append(CheckRow(f"{name}: outputs are whole", whole == len(calls), f"{whole} of {len(calls)}"))
        return CheckResult(tuple(rows))

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        from millstream.core import registry
        from millstream.sim import programs

        if arm.name in ROUTERS:
            calls = self._heavy(ctx, ctx.size(ROUTED, QUICK_ROUTED), ROUTED_RATE, long=True)
            router = registry.make("router", Choice(ROUTERS[arm.name]))
            return _heavy_of(self._simulate(calls, POLICIES["atlas"], ENGINES, router).served)
        where, _, name = arm.name.partition("-")
        if where == "live":
            return self._live(ctx, name)
        if where == "swap":
            return self._swap(ctx, name == "bulk")
        count, policy = ctx.size(PROGRAMS, QUICK_PROGRAMS), POLICIES[name]
        heavy, fans = self._heavy(ctx, count, RATE), self._fans(ctx, count, RATE)
        knows = name == "srpt"
        result = self._simulate(heavy, policy, oracle=programs.remaining(heavy) if knows else False)
        other = self._simulate(fans, policy, oracle=programs.remaining(fans) if knows else False)
        return _heavy_of(result.served) | _fans_of(other.served)

    def _live(self, ctx: Context, name: str) -> Mapping[str, float]:
        from millstream.bench.stage import Setting
        from millstream.sim import programs

        seed = 100 * ctx.seed + ctx.repeat
        count = ctx.size(LIVE_PROGRAMS, QUICK_LIVE)
        lengths = [(max(4, prompt // 8), max(4, output // 4)) for prompt, output in self.lengths]
        chats = programs.chats(lengths, count, seed, turns=3.0, think_s=0.1)
        trees = programs.trees(count, seed, rounds=3, width=8, prompt=64, output=32)
        templates = [trees[n] if n % 6 == 0 else chats[n] for n in range(count)]
        calls = programs.calls(templates, 12.0, 1000, seed)
        policy = LIVE_OPTIONS.get(name, Choice(name))
        setting = Setting((policy, Choice("fcfs")), seats=4, preemption="swap")
        played = self.stage.live(calls, setting)
        reference = self.texts.setdefault(ctx.repeat, played.tokens)
        ctx.expect(
            "live outputs are the same, token for token, under every policy",
            played.tokens == reference and all(len(played.tokens[call.id]) == call.num_output for call in calls),
            f"{len(calls)} calls",
        )
        return _heavy_of(played.served)

    def _swap(self, ctx: Context, bulk: bool) -> Mapping[str, float]:
        """One request's KV to the host and back: places drawn by chance, as they are after some hours of traffic."""
        import time

        from millstream.core import registry
        from millstream.core.plan import Tier

        (group, *_), size = self.stage.model.spec.groups, self.stage.model.resolved.block_size
        count = SWAPPED // size
        pages = registry.make("kv", "plain", device=True).allocate(group, 4 * count, size, "float32", 4 * count)
        draw, seconds = random.Random(f"swap {ctx.seed} {ctx.repeat}"), []
        for _ in range(ctx.size(SWAPS, QUICK_SWAPS)):
            here, there = draw.sample(range(4 * count), count), draw.sample(range(4 * count), count)
            runs = [(here, there)] if bulk else [([one], [other]) for one, other in zip(here, there, strict=True)]
            started = time.perf_counter()
            for sources, targets in runs:
                pages.move(sources, targets, Tier.DEVICE, Tier.HOST)
            for sources, targets in runs:
                pages.move(targets, sources, Tier.HOST, Tier.DEVICE)
            seconds.append(time.perf_counter() - started)
        moved = 2 * count * registry.make("kv", "plain").page_bytes(group, size, "float32")
        return {"swap_gb_s": moved / statistics.median(seconds) / 1e9}


def _heavy_of(served: Sequence[Any]) -> dict[str, float]:
    from millstream.sim.compare import program_token_s
    from millstream.sim.metrics import percentile

    found = sorted(program_token_s(served).values())
    return {
        "token_mean_s": statistics.fmean(found),
        "token_p95_s": percentile(found, 95),
        "token_p99_s": percentile(found, 99),
    }


def _fans_of(served: Sequence[Any]) -> dict[str, float]:
    from millstream.sim.metrics import percentile

    spans: dict[str, tuple[float, float]] = {}
    for one in served:
        start, end = spans.get(one.call.session, (one.arrival_s, 0.0))
        spans[one.call.session] = (min(start, one.arrival_s), max(end, one.times_s[-1]))
    every = sorted(end - start for start, end in spans.values())
    fans = [end - start for name, (start, end) in spans.items() if name.startswith("tree")]
    return {
        "fan_mean_s": statistics.fmean(fans),
        "all_mean_s": statistics.fmean(every),
        "all_p99_s": percentile(every, 99),
    }


CARD = Card("autellix", "programs of many calls, by the service that they had", paper=42)
PLUGIN = Autellix
