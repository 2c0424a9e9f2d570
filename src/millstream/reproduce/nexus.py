"""How much of a step is for prompts: by a cost model, fixed, and by feedback (after Nexus, Shi et al., 2025).

What the paper does between two parts of a GPU that run at once is done here inside one step; the parts wait for a
device that has them. SmolLM2 live: long and short prompts beside decodes, at LOAD of what the machine does of them when
they are all there at once. Arms: steps of 512 tokens whatever is in them (chunked prefill), steps of a fixed small
size, a controller that lowers the step's tokens when decodes were late and raises them when they were early, and nexus.
How much longer nexus lets decodes take is tuned, as in the paper: the least with which the simulator, whose steps were
calibrated just before, keeps the throughput of mixed steps and the first tokens of small ones, on other traffic.
Simulated: the same on ENGINES engines of an A100's published times, behind the least loaded.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millstream.core.events import Event, Stepped
from millstream.core.registry import Card, Choice
from millstream.core.sequence import SeqView
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
from millstream.sched.protocol import Budget, LoadView, Policy

PROFILE = "vidur-a100-llama3-8b-tp1"
MIXED, STATIC = 512, 96
REQUESTS, QUICK_REQUESTS = 60, 14
LOAD = 0.7
ENGINES, SIM_REQUESTS, SIM_RATE = 4, 1200, 20.0
# Of what decodes alone would take: those that are tried, and what is left of the throughput with the one that is taken.
# First tokens are to come in SOONER of what they take with small steps.
SLACKS, KEPT, SOONER, TUNING = (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0), 0.98, 0.85, 4
SIM_SLACK = 4.0


class Feedback(Policy):
    """Reacts to what steps took: the reactive baseline. Halves the tokens of a step after a slow one, adds after a fast
    one; knows nothing ahead."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.tokens = MIXED

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        return (0.0 if seq.left <= 1 else 1.0, seq.arrival)

    def budget(self, view: LoadView) -> Budget:
        return Budget(tokens=self.tokens) if view.running else Budget()

    def observe(self, event: Event) -> None:
        if isinstance(event, Stepped):
            if event.seconds > self.limit_s:
                self.tokens = max(16, self.tokens // 2)
            else:
                self.tokens = min(MIXED, self.tokens + 16)


class Nexus(Experiment):
    name = "nexus"
    paper = 57
    title = "How much of a step is for prompts"
    arms = tuple(
        Arm(f"{where}-{name}", f"{'live' if where == 'live' else f'{ENGINES} simulated engines'}: {text}", uses)
        for where in ("live", "sim")
        for name, text, uses in (
            ("mixed", f"steps of {MIXED} tokens", ()),
            ("static", f"steps of {STATIC} tokens", ()),
            ("feedback", "tokens by what the last step took", ()),
            ("nexus", "by the cost model", ("policy:nexus",)),
            ("no-buffer", "by the cost model, changed at every step", ("policy:nexus",)),
        )
    )
    metrics = (
        Metric("tbt_p95_s", "s", "lower", "95th percentile of the time between two tokens"),
        Metric("ttft_mean_s", "s", "lower", "mean time to the first token"),
        Metric(
            "tokens_per_s",
            "tokens/s",
            "higher",
            "tokens of prompts and outputs, from the first arrival to the last end",
        ),
        Metric("switches", "", "lower", "times at which another split was adopted, on all engines"),
    )
    claim = Claim(
        "up to 2.2 times the throughput, 20 times the TTFT and 2.5 times the time between tokens of an engine that "
        "mixes prompts and decodes, on one GPU whose parts run prompts and decodes at once",
        (
            Figure(
                "time between tokens against mixed steps",
                Of("live-mixed", "tbt_p95_s"),
                Of("live-nexus", "tbt_p95_s"),
                1.0,
                2.5,
            ),
        ),
    )
    required = (
        Required(
            "less time between tokens than mixed steps",
            Of("live-nexus", "tbt_p95_s"),
            Of("live-mixed", "tbt_p95_s"),
            at_most=0.9,
        ),
        Required(
            "at the same throughput, within 5 %",
            Of("live-nexus", "tokens_per_s"),
            Of("live-mixed", "tokens_per_s"),
            at_least=0.95,
        ),
        Required(
            "simulated: less time between tokens",
            Of("sim-nexus", "tbt_p95_s"),
            Of("sim-mixed", "tbt_p95_s"),
            at_most=0.95,
        ),
        Required(
            "and the same throughput, within 5 %",
            Of("sim-nexus", "tokens_per_s"),
            Of("sim-mixed", "tokens_per_s"),
            at_least=0.95,
        ),
        Required(
            "first tokens sooner than with small steps",
            Of("live-nexus", "ttft_mean_s"),
            Of("live-static", "ttft_mean_s"),
            at_most=1.0,
        ),
        Required(
            "the buffer cuts changes of the split",
            Of("live-nexus", "switches"),
            Of("live-no-buffer", "switches"),
            at_most=0.7,
        ),
        Required(
            "parts of one device that run at once",
            Of("live-nexus", "tbt_p95_s"),
            out_of_reach="one device computes a step at a time here; the paper's parts need a GPU's streams",
        ),
    )
    warmup = 0
    seconds = 600.0
    sources = ("millstream.sched.scheduler", "millstream.engine.calibrate", "millstream.bench.stage")

    def open(self, ctx: Context) -> None:
        from millstream.bench.stage import Stage
        from millstream.sched import profiles
        from millstream.sim.published import PUBLISHED

        self.profile = profiles.load(PROFILE, PUBLISHED)
        self.stage = Stage()
        ctx.say("measuring how long steps take")
        self.stage.calibrate(repeats=3, thin=1 if not ctx.quick else 2)
        self.texts: dict[int, Mapping[int, tuple[int, ...]]] = {}
        ctx.repeat = -1
        calls = self._calls(ctx, ctx.size(REQUESTS, QUICK_REQUESTS), 1e6, 1.0)
        self.slack = SLACKS[0]
        taken = [self._live("mixed", calls).seconds for _ in range(ctx.size(3, 1))]
        self.rate = LOAD * len(calls) / statistics.median(taken)
        ctx.say(f"requests come at {self.rate:.1f} a second, {LOAD:g} of what the machine does")
        self.slack = self._tune(ctx)
        ctx.say(f"steps take up to {self.slack:g} times what decodes alone would")

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        shapes = (MIXED, STATIC, REQUESTS, LOAD, ENGINES, SIM_REQUESTS, SIM_RATE, SLACKS, KEPT, SOONER, SIM_SLACK)
        return {"model": self.stage.model.source.checksum().encode(), "shapes": repr(shapes).encode()}

    def _calls(self, ctx: Context, count: int, rate: float, scale: float) -> list[Any]:
        """Four in ten are long documents, six are chats."""
        from millstream.sim.workload import Call

        draw, at, calls = random.Random(f"nexus {ctx.seed} {ctx.repeat} {count}"), 0.0, []
        for number in range(1, count + 1):
            at += draw.expovariate(rate)
            long = draw.random() < 0.4
            prompt = draw.randint(400, 900) if long else draw.randint(16, 120)
            output = draw.randint(8, 24) if long else draw.randint(24, 72)
            own = (1 << 38) + (number << 20)
            length = max(2, round(prompt * scale))
            calls.append(
                Call(
                    number,
                    at,
                    tuple(range(own, own + length)),
                    round(output * min(scale, 4.0)),
                    "long" if long else "short",
                )
            )
        return calls

    def _tune(self, ctx: Context) -> float:
        """The least slack that costs next to no throughput, and has first tokens sooner than small steps."""
        traffic = []
        for place in range(TUNING):
            ctx.repeat = -2 - place
            traffic.append(self._calls(ctx, ctx.size(REQUESTS, QUICK_REQUESTS), self.rate, 1.0))

        def found(name: str, slack: float = 0.0) -> tuple[float, float]:
            setting = self._setting(name, slack)
            runs = [self._numbers(self.stage.simulate(calls, setting).served, ()) for calls in traffic]
            return statistics.fmean(one["tokens_per_s"] for one in runs), statistics.fmean(
                one["ttft_mean_s"] for one in runs
            )

        most, soonest = found("mixed")[0], found("static")[1]
        for slack in SLACKS:
            tokens_per_s, ttft_s = found("nexus", slack)
            if tokens_per_s >= KEPT * most and ttft_s <= SOONER * soonest:
                return slack
        return SLACKS[-1]

    def _setting(self, name: str, slack: float) -> Any:
        from millstream.bench.stage import Setting

        policies, tokens = self._policies(name, slack)
        return Setting(policies, step_tokens=tokens, prefix=Choice("none"))

    def _policies(self, name: str, slack: float) -> tuple[tuple[Any, ...], int]:
        if name == "static":
            return (Choice("fcfs"),), STATIC
        if name == "nexus":
            return (Choice("nexus", {"decode_slack": slack}),), 4096
        if name == "no-buffer":
            return (Choice("nexus", {"decode_slack": slack, "buffer": 0.0}),), 4096
        return (Choice("fcfs"),), MIXED

    def check(self, ctx: Context) -> CheckResult:
        """The split follows the cost model and turns where the KV cache is full; outputs are checked in each run."""
        from millstream.core import registry

        cost = self.stage.profile.step_cost() if self.stage.profile else None
        splits = []
        for free in (90, 5):
            policy = registry.make("policy", Choice("nexus", {"decode_slack": 8.0}))
            rows = [_Row(1, 300) for _ in range(8)]
            view = LoadView(0.0, free, 100, [_Row(500, 0)], rows, cost=cost)  # type: ignore[list-item, arg-type]
            for _ in range(12):
                policy.budget(view)
            splits.append(policy.split)
        moved = splits[0] > splits[1]
        return CheckResult(
            (CheckRow("the split turns where the cache is full", moved, f"{splits[0]} and {splits[1]} tokens"),)
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        where, _, name = arm.name.partition("-")
        if where == "sim":
            calls = self._calls(ctx, ctx.size(SIM_REQUESTS, 200), SIM_RATE, 4.0)
            return self._numbers(*self._run_sim(calls, self._setting(name, SIM_SLACK), name == "feedback"))
        calls = self._calls(ctx, ctx.size(REQUESTS, QUICK_REQUESTS), self.rate, 1.0)
        played = self._live(name, calls)
        reference = self.texts.setdefault(ctx.repeat, played.tokens)
        ctx.expect("live outputs are the same under every arm", played.tokens == reference, f"{len(calls)} requests")
        return self._numbers(played.served, played.policies)

    def _live(self, name: str, calls: Sequence[Any]) -> Any:
        made = [Feedback(0.05)] if name == "feedback" else None
        return self.stage.live(calls, self._setting(name, self.slack), policies=made)

    def _run_sim(self, calls: Sequence[Any], setting: Any, feedback: bool) -> tuple[Any, Any]:
        from millstream.core import registry
        from millstream.sched.stack import PolicyStack
        from millstream.sim.replica import EngineSetting
        from millstream.sim.simulate import Simulation

        meters = setting.meters(self.profile.step_tokens)
        engines = [(f"engine {place}", self.profile) for place in range(ENGINES)]
        engine_setting = EngineSetting(setting.policies, meters, setting.prefix)
        simulation = Simulation(calls, engines, engine_setting, registry.make("router", "least-work"))
        schedulers = [replica.engine.scheduler for replica in simulation.replicas]
        if feedback:
            for scheduler in schedulers:
                scheduler.policy = PolicyStack([Feedback(0.04)])
        served = simulation.run().served
        return served, [scheduler.policy.policies[0] for scheduler in schedulers]

    @staticmethod
    def _numbers(served: Sequence[Any], policies: Sequence[Any]) -> dict[str, float]:
        from millstream.sim.metrics import percentile

        gaps = sorted(b - a for one in served for a, b in zip(one.times_s, one.times_s[1:], strict=False))
        seconds = max(one.times_s[-1] for one in served) - min(one.arrival_s for one in served)
        found = {
            "tbt_p95_s": percentile(gaps, 95),
            "ttft_mean_s": statistics.fmean(one.times_s[0] - one.arrival_s for one in served),
            "tokens_per_s": sum(one.call.num_prompt + len(one.times_s) for one in served) / seconds,
        }
        switches = [policy.switches for policy in policies if hasattr(policy, "switches")]
        return found | ({"switches": float(sum(switches))} if switches else {})


class _Row:
    """As much of a sequence as the policy's budget looks at."""

    gated = False

    def __init__(self, left: int, start: int) -> None:
        self.left, self.next_start = left, start


CARD = Card("nexus", "how much of a step is for prompts", paper=57)
PLUGIN = Nexus
