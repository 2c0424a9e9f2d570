"""All scheduling policies side by side, simulated on the same recorded traffic, and what each costs a step.

    python benchmarks/scheduling.py [--only TRACE] [--requests 400] [--plot docs/plots/scheduling.svg] [--overhead]
    python benchmarks/scheduling.py --replicas 64 --load 1.3 --requests 60 --only azure-conv
    python benchmarks/scheduling.py --live [MODEL]

Prints the tables of docs/scheduling.md. The engine is that of an A100's published step times with places for 32
requests, so that there is always somebody to choose among. Three tenants send at 70, 15 and 15 % of the rate where a
trace has none of its own; the busy one wishes for a first token within 10 s, the others within 2 s. Policies that go by
lengths get guesses that are off by a factor of 1.65 (one deviation); srpt knows lengths and is what regret is told by.
With --replicas there are as many such engines behind the router least-work, and as many times the requests at as many
times the rate, and --load times that: many engines have shorter queues at the same load than one. With --live a model
decodes 64 rows while 256 wait, under fcfs and under each policy in turns: what it costs of the throughput, the order
itself apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core import registry
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Slo, Tokens
from millstream.sched import profiles
from millstream.sched.meters import usual
from millstream.sim import programs, traces, workload
from millstream.sim.compare import Row, compare
from millstream.sim.published import PUBLISHED
from millstream.sim.scenario import Prepared, Scenario, TenantConfig
from millstream.sim.workload import Call

PROFILE = "vidur-a100-llama3-8b-tp1"
STACKS: dict[str, tuple[Choice, ...]] = {
    "fcfs": (Choice("fcfs"),),
    "shortest-remaining": (Choice("shortest-remaining"),),
    "ltr": (Choice("ltr"),),
    "s3": (Choice("s3"),),
    "mlfq": (Choice("mlfq"), Choice("fcfs")),
    "autellix": (Choice("autellix"), Choice("fcfs")),
    "vtc": (Choice("vtc"), Choice("fcfs")),
    "vtc, ltr": (Choice("vtc"), Choice("ltr", {"margin": -1.0})),
    "dlpm": (Choice("dlpm"),),
    "longest-prefix": (Choice("longest-prefix"),),
    "edf": (Choice("edf"),),
    "slo-class": (Choice("slo-class"),),
    "nexus": (Choice("nexus"),),
    "srpt": (Choice("srpt"),),
}
WAITING, RUNNING = 256, 64


def tenants(rate: float) -> tuple[TenantConfig, ...]:
    shares = (("busy", 0.7, 10.0), ("quiet", 0.15, 2.0), ("calm", 0.15, 2.0))
    return tuple(
        TenantConfig(name, rate=rate * share, requests=0, ttft_s=wish, tpot_s=0.1) for name, share, wish in shares
    )


def scenarios(each: int, replicas: int, load: float) -> dict[str, tuple[Scenario, dict[str, float]]]:
    """By trace: what is simulated, `each` requests a replica, and the limits where requests have no wishes."""
    requests, times = each * replicas, replicas * load
    base = Scenario(profiles=(PROFILE,), replicas=(replicas,), max_rows=32, hint_error=0.5, requests=requests)

    def mixed(rate: float, count: int) -> tuple[TenantConfig, ...]:
        return tuple(replace(one, requests=max(1, round(count * (one.rate or 0) / rate))) for one in tenants(rate))

    # Mooncake's prompts have some ten thousand tokens: a quarter of the requests is as much work.
    limits = {"ttft": 2.0, "tpot": 0.1}
    return {
        "azure-conv": (
            replace(base, trace="azure-conv", tenants=mixed(8.0 * times, requests), burstiness=1.0),
            limits,
        ),
        "mooncake": (
            replace(base, trace="mooncake", tenants=mixed(1.0 * times, requests // 4), burstiness=1.0),
            limits,
        ),
        "servegen": (replace(base, trace="servegen", rate=12.0 * times), limits),
        "agents": (replace(base, trace="agents", rate=4.0 * times), limits),
    }


class Agents(Prepared):
    """Recorded agents as programs that begin at random, a session cut to twenty calls and to half of its tokens."""

    def calls(self, rate: float | None = None) -> list[Call]:
        rows = [*traces.load("agents-coding"), *traces.load("agents")]
        sessions = programs.recorded(rows, "agent", 0.5, most_think_s=5.0)
        cut = programs.thinned(sessions, 1_000_000, 20)
        count = max(1, (self.scenario.requests or 400) // 4)
        rate = rate or self.scenario.rate
        assert rate is not None
        found = programs.calls((cut * count)[:count], rate, 8000, self.scenario.seed, tenants=3)
        return workload.hinted(found, self.scenario.hint_error or 0.0, self.scenario.seed)


def table(rows: list[Row]) -> str:
    best = next((row for row in rows if row.policy == "srpt"), rows[0])
    lines = [
        "| policy | TTFT mean | p99 | s a token, mean | p99 | programs, mean | regret | Jain | worst tenant's p99 | "
        "within SLO | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.policy} | {row.ttft_mean_s:.2f} s | {row.ttft_p99_s:.1f} s | {row.token_mean_s:.3f} | "
            f"{row.token_p99_s:.2f} | {row.program_mean_s:.3f} | {row.token_mean_s / best.token_mean_s:.2f} | "
            f"{row.fairness:.2f} | {row.worst_ttft_p99_s:.1f} s | {100 * row.within:.0f} % | {row.tokens_per_s:.0f} |"
        )
    return "\n".join(lines)


def overhead(steps: int = 60) -> dict[str, float]:
    """By policy: microseconds of a step of 64 running and 256 waiting, all of the host's work without a model."""
    from millstream.core.clock import VirtualClock
    from millstream.sim.replica import EngineSetting, build

    profile = profiles.load(PROFILE, PUBLISHED).sized(blocks=8000, max_rows=RUNNING)
    engines = {}
    for label, policies in STACKS.items():
        # Prefixes are what some of them look up; so they are there.
        setting = EngineSetting(policies, usual(512, RUNNING))
        replica = build(label, profile, setting, VirtualClock(), 0)
        for number in range(WAITING + RUNNING):
            prompt = (*range(number % 8 << 20, (number % 8 << 20) + 200), number + (1 << 30))
            hints = Hints(200 + number, -float(number), oracle=4000 + number)
            request = Request(
                number + 1,
                (Tokens(prompt),),
                SamplingParams(max_tokens=4000, temperature=0.0, seed=3900),
                tenant=f"t{number % 5}",
                slo=Slo(ttft_s=1.0 + number % 3),
                hints=hints,
            )
            replica.engine.submit(request, lambda chunk: None)
        for _ in range(40):
            replica.engine.step()
        engines[label] = replica.engine
    took: dict[str, list[float]] = {label: [] for label in engines}
    for _ in range(steps):
        for label, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            took[label].append(1e6 * (time.perf_counter() - started))
    return {label: statistics.median(own) for label, own in took.items()}


def live(model: str, steps: int = 200) -> None:
    """Prints by policy what a step that decodes 64 rows takes more than under fcfs: the median and the quartiles.

    Two engines, each with a runner of its own, take step after step in turns, and one of them is fcfs; a step counts
    against the one before it. Steps that compute prompts as well (whoever preempts has some) count for nothing. Those
    that go by step times are given a published machine's.
    """
    from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
    from millstream.engine.assemble import assemble, build_engine
    from millstream.engine.process import collect_rarely

    cache = CacheConfig(prefix=Choice("none"), bytes="1GiB")
    base = EngineConfig(model=ModelConfig(weights="blocks"), cache=cache, seed=0)
    models = [assemble(model, base, tune=True) for _ in range(2)]
    cost = profiles.load(PROFILE, PUBLISHED).step_cost()
    # As in a server.
    collect_rarely()

    def engine(place: int, policies: tuple[Choice, ...]) -> tuple[Any, list[int]]:
        made = models[place]
        sched = replace(base.sched, policies=policies, meters=usual(512, RUNNING))
        config = replace(base, sched=sched)
        resolved = replace(made.resolved, meters=usual(512, RUNNING), config=config)
        own = build_engine(made.built.runner, made.spec, made.tokenizer, config, resolved, cost=cost)
        sizes: list[int] = []
        plan = own.scheduler.plan

        def planned(now: float) -> Any:
            found = plan(now)
            sizes.append(sum(len(extend.tokens) for extend in found.extends) if found else 0)
            return found

        own.scheduler.plan = planned
        vocab = made.spec.vocab_size
        for number in range(WAITING + RUNNING):
            prompt = tuple((number * 131 + place * 31) % vocab for place in range(128))
            hints = Hints(200 + number, -float(number), oracle=1000 + number)
            params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
            slo = Slo(ttft_s=1.0 + number % 3)
            request = Request(number + 1, (Tokens(prompt),), params, tenant=f"t{number % 5}", slo=slo, hints=hints)
            own.submit(request, lambda chunk: None)
        while sizes[-1:] != [RUNNING]:
            own.step()
        return own, sizes

    for turn, (label, policies) in enumerate(STACKS.items()):
        own, sizes = engine(turn % 2, policies)
        plain, plain_sizes = engine(1 - turn % 2, STACKS["fcfs"])
        shares = []
        order = [plain, own]
        for _ in range(steps):
            took = {}
            for one in order:
                started = time.perf_counter()
                one.step()
                took[id(one)] = time.perf_counter() - started
            order.reverse()
            if sizes[-1] == plain_sizes[-1] == RUNNING:
                shares.append(took[id(own)] / took[id(plain)] - 1)
        for one in (own, plain):
            for number in range(WAITING + RUNNING):
                one.abort(number + 1)
            while one.busy:
                one.step()
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 4 else [float("nan")] * 3
        share = f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f}, {len(shares)} steps)"
        print(f"{label}: {share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TRACE")
    parser.add_argument("--requests", type=int, default=400, help="for each replica (default: 400)")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--overhead", action="store_true", help="only what each policy costs a step")
    parser.add_argument("--live", metavar="MODEL", nargs="?", const="smollm2-135m", help="only that, on a real model")
    args = parser.parse_args()
    if args.live:
        live(args.live)
        return
    for choices in STACKS.values():
        for choice in choices:
            registry.options("policy", choice)
    # First, while the collector of garbage has little to look at.
    costs = overhead()
    plain = costs["fcfs"]
    print(f"fcfs: {plain:.0f} us a step of {RUNNING} running and {WAITING} waiting; more than that:")
    print(", ".join(f"{label} {cost - plain:+.0f}" for label, cost in costs.items() if label != "fcfs"))
    if not args.overhead:
        found = {}
        for trace, (scenario, limits) in scenarios(args.requests, args.replicas, args.load).items():
            if args.only in (None, trace):
                prepared = Agents(scenario) if trace == "agents" else Prepared(scenario)
                found[trace] = []
                for label, policies in STACKS.items():
                    started = time.perf_counter()
                    found[trace] += compare(prepared, {label: policies}, limits)
                    print(f"{trace}, {label}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
                print(f"\n### {trace}\n\n{table(found[trace])}", flush=True)
        if args.plot:
            from millstream.sim.plots import compared

            compared(found, args.plot)


if __name__ == "__main__":
    main()
