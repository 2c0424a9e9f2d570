"""Shortest output first by a learned order (Efficient LLM Scheduling by Learning to Rank, Fu et al., NeurIPS 2024).

What is learned comes from answers that SmolLM2 really gave, at temperature 1, to prompts of fourteen families; it is
tried on prompts of seven others. The first full run generates these answers (some 400 thousand tokens) and keeps them.
Live: prompts come at twice the rate that the engine can serve and are answered as they were then, so that every order
gives the same texts, and one arm knows how long they will be. Simulated: the same prompts, lengths and scores over
eight engines with the published step times of an A100.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core.registry import Card, Choice
from millstream.core.request import Hints
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

MODEL, CAP = "smollm2-135m", 512
SEATS, LOAD = 6, 2.0
LIVE, QUICK_LIVE = 32, 16
PROFILE, ENGINES = "vidur-a100-llama3-8b-tp1", 8
SIMULATED, QUICK_SIMULATED, SIM_SEATS = 400, 100, 4
QUICK_SHARE = 0.15
POLICIES = {
    "fcfs": Choice("fcfs"),
    "ltr": Choice("ltr"),
    "ltr-starving": Choice("ltr", {"threshold": 0}),
    "shuffled": Choice("ltr", {"threshold": 0}),
    "srpt": Choice("srpt", {"patience_s": 0.0}),
}
TOLD = {
    "fcfs": "first come first served",
    "ltr": "by learned rank",
    "ltr-starving": "the same without starvation control",
    "shuffled": "without it, by a rank learned from the lengths of other prompts",
    "srpt": "by what is left (oracle)",
}


class Ltr(Experiment):
    name, paper = "ltr", 61
    title = "Shortest output first, by a learned order"
    arms = (
        *(
            Arm(name, TOLD[name], (f"policy:{choice.name}", *(("length:ranker",) if choice.name == "ltr" else ())))
            for name, choice in POLICIES.items()
        ),
        *(
            Arm(f"sim-{name}", f"{ENGINES} engines: {TOLD[name]}", (f"policy:{POLICIES[name].name}",))
            for name in POLICIES
        ),
    )
    metrics = (
        Metric("token_mean_s", "s", "lower", "time of a request over the tokens of its answer, mean"),
        Metric("token_p90_s", "s", "lower", "the same, 90th percentile"),
        Metric("recovered", "", "higher", "share of what the oracle gains on first come first served, of the mean"),
        Metric("max_wait_s", "s", "lower", "longest time to a first token or between two, mean over requests"),
        Metric("worst_wait_s", "s", "lower", "the longest of all"),
        Metric("tokens_per_s", "tokens/s", "higher", "tokens of answers over the time of the run"),
        Metric("guess_share", "%", "lower", "of the run that reading prompts took"),
        Metric("tau", "", "higher", "Kendall's tau with true lengths on families that were not learned from"),
        Metric("tau_over_length", "", "higher", "by how much that is above ordering by the length of the prompt"),
        Metric("tau_regression", "", "higher", "of a regression on the same vectors"),
        Metric("tau_buckets", "", "higher", "of ten classes on the same vectors"),
        Metric("tau_random", "", "higher", "of chance"),
    )
    claim = Claim(
        "Chats have 2.8 times lower latency (90th percentile per token, bursts), a mean up to 6.9 times lower than "
        "first come first served at 64 requests/s; reading prompts costs 0.8 to 1.7 %; starvation control cuts the "
        "longest waits 3.3 times; Kendall's tau is 0.52 to 0.64 on prompts of the same kind as those learned from",
        (
            Figure("mean per token", Of("fcfs", "token_mean_s"), Of("ltr", "token_mean_s"), 2.8, 6.9),
            Figure(
                "mean per token, simulated", Of("sim-fcfs", "token_mean_s"), Of("sim-ltr", "token_mean_s"), 2.8, 6.9
            ),
            Figure("longest waits", Of("ltr-starving", "worst_wait_s"), Of("ltr", "worst_wait_s"), 3.3),
        ),
    )
    required = (
        Required(
            "mean per token lower than first come first served",
            Of("ltr", "token_mean_s"),
            Of("fcfs", "token_mean_s"),
            at_most=1.0,
        ),
        Required("90th percentile too", Of("ltr", "token_p90_s"), Of("fcfs", "token_p90_s"), at_most=1.0),
        Required("and above the oracle's", Of("ltr", "token_mean_s"), Of("srpt", "token_mean_s"), at_least=1.0),
        Required("at least half of the oracle's gain", Of("ltr", "recovered"), at_least=0.5),
        Required("the same on eight simulated engines", Of("sim-ltr", "recovered"), at_least=0.5),
        Required("learned from lengths of other prompts the gain is gone", Of("shuffled", "recovered"), at_most=0.3),
        Required("the same on eight simulated engines", Of("sim-shuffled", "recovered"), at_most=0.3),
        Required("reading prompts takes less than 3 % of the run", Of("ltr", "guess_share"), at_most=3.0),
        Required(
            "starvation control cuts the longest wait",
            Of("ltr", "worst_wait_s"),
            Of("ltr-starving", "worst_wait_s"),
            at_most=1.0,
        ),
        Required("and simulated", Of("sim-ltr", "worst_wait_s"), Of("sim-ltr-starving", "worst_wait_s"), at_most=1.0),
        Required(
            "at under 30 % of the mean",
            Of("sim-ltr", "token_mean_s"),
            Of("sim-ltr-starving", "token_mean_s"),
            at_most=1.3,
        ),
        Required(
            "the order is better than by the length of the prompt",
            Of("ltr", "tau_over_length"),
            at_least=0.1,
        ),
        Required("Kendall's tau on families that were not learned from", Of("ltr", "tau"), at_least=0.25),
        Required("and none where lengths of other prompts were learned", Of("shuffled", "tau"), at_most=0.15),
    )
    warmup = 0
    seconds = 1340.0
    quick_seconds = 240.0
    sources = (
        "millstream.sched.scheduler",
        "millstream.bench.stage",
        "millstream.bench.labels",
        "millstream.bench.ranking",
        "millstream.train.lengths",
        "millstream.models.lengths",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench import labels, ranking
        from millstream.bench.stage import Stage
        from millstream.models.lengths import Trunk
        from millstream.sched import profiles
        from millstream.sim.published import PUBLISHED

        self.profile = profiles.load(PROFILE, PUBLISHED).sized(max_rows=SIM_SEATS)
        self.stage = Stage(MODEL)
        self.serving = labels.Serving.by(self.stage.model, MODEL, CAP)
        share = QUICK_SHARE if ctx.quick else 1.0
        learned, self.tested = (
            ranking.collected(self.stage.model, self.serving, counts, share, ctx.say)
            for counts in (ranking.TRAIN, ranking.TEST)
        )
        tokenizer = self.stage.model.tokenizer
        ctx.say(f"learning from {len(learned)} answers")
        trunk = Trunk()
        self.trained: dict[str, Path] = {}
        self.scores: dict[str, list[float]] = {}
        self.taus: dict[str, float] = {}
        for name in ("shuffled", "ltr"):
            model, orders = ranking.train(
                learned, self.tested, tokenizer, CAP, served=MODEL, trunk=trunk, shuffled=name == "shuffled"
            )
            self.trained[name] = ctx.scratch / f"{name}.safetensors"
            model.save(self.trained[name])
            self.scores[name], self.taus = orders["ranker"].tolist(), model.told["tau"]
        ctx.repeat = -1
        calls = self._calls(ctx, 0.0, 24)
        played = self.stage.live(calls, self._setting("fcfs"), answers=labels.answers(self.serving, self.tested, calls))
        self.rate = LOAD * len(calls) / played.seconds
        ctx.say(
            f"Kendall's tau {self.taus['ranker']:.2f} on {len(self.tested)} other prompts; {self.rate:.1f} a second"
        )
        self.runs: dict[tuple[int, bool], dict[str, dict[str, float]]] = {}

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import prompts, ranking

        told = repr((ranking.TRAIN, ranking.TEST, self.serving, SEATS, LOAD, LIVE, SIMULATED, SIM_SEATS))
        return {
            "model": self.stage.model.source.checksum().encode(),
            "shapes": told.encode(),
            **prompts.files((*ranking.TRAIN, *ranking.TEST)),
        }

    # -- traffic

    def _calls(self, ctx: Context, rate: float, count: int) -> list[Any]:
        """Prompts of the families that were not learned from, at `rate` (0: all at once)."""
        from millstream.sim.workload import Call

        draw, at = random.Random(f"ltr {ctx.seed} {ctx.repeat}"), 0.0
        calls = []
        for number, label in enumerate(draw.sample(self.tested, min(count, len(self.tested)))):
            calls.append(Call(number, at, label.ids, label.tokens))
            at += draw.expovariate(rate) if rate else 0.0
        return calls

    def _setting(self, name: str) -> Any:
        from millstream.bench.stage import Setting

        lengths = Choice("ranker", {"file": str(self.trained["shuffled" if name == "shuffled" else "ltr"])})
        known = lengths if POLICIES[name].name == "ltr" else None
        return Setting((POLICIES[name], Choice("fcfs")), seats=SEATS, preemption="swap", lengths=known)

    # -- runs

    def check(self, ctx: Context) -> CheckResult:
        """The answers of a prompt are the same whoever goes first, and as long as they were when they were measured."""
        from millstream.bench import labels, ranking

        ctx.repeat = 0
        calls = self._calls(ctx, 0.0, ctx.size(24, 12))
        answers = labels.answers(self.serving, self.tested, calls)
        runs = {
            name: self.stage.live(_knowing(calls), self._setting(name), answers=answers).tokens for name in POLICIES
        }
        rows = [
            CheckRow(
                f"{name}: texts as under first come first served",
                run == runs["fcfs"],
                f"{len(calls)} answers",
            )
            for name, run in runs.items()
        ]
        same = sum(len(runs["fcfs"][call.id]) == call.num_output for call in calls)
        rows.append(
            CheckRow("answers are as long as when they were measured", same == len(calls), f"{same} of {len(calls)}")
        )
        families = {label.prompt.family for label in self.tested}
        rows.append(
            CheckRow(
                "no family is learned from and tested on",
                not families & set(ranking.TRAIN),
                ", ".join(sorted(families)),
            )
        )
        return CheckResult(tuple(rows))

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        simulated = arm.name.startswith("sim-")
        key = (ctx.repeat, simulated)
        if key not in self.runs:
            self.runs[key] = self._simulated(ctx) if simulated else self._live(ctx)
        return self.runs[key][arm.name.removeprefix("sim-")]

    def _live(self, ctx: Context) -> dict[str, dict[str, float]]:
        """All orders, one after the other: what is gained counts against the oracle on the same prompts."""
        from millstream.bench import labels

        calls = self._calls(ctx, self.rate, ctx.size(LIVE, QUICK_LIVE))
        answers, found, texts = labels.answers(self.serving, self.tested, calls), {}, {}
        names = list(POLICIES)
        first = ctx.repeat % len(names)
        for name in (*names[first:], *names[:first]):
            given = _knowing(calls) if name == "srpt" else calls
            played = self.stage.live(given, self._setting(name), answers=answers)
            texts[name] = played.tokens
            found[name] = _numbers(played.served, played.seconds)
            if POLICIES[name].name == "ltr":
                found[name]["guess_share"] = 100 * played.guess_s / played.seconds
        ctx.expect("live answers are the same under every order", all(run == texts["fcfs"] for run in texts.values()))
        found["ltr"] |= {
            "tau": self.taus["ranker"],
            "tau_over_length": self.taus["ranker"] - abs(self.taus["prompt length"]),
            "tau_regression": self.taus["regression"],
            "tau_buckets": self.taus["buckets"],
            "tau_random": self.taus["random"],
        }
        found["shuffled"]["tau"] = self.taus["shuffled labels"]
        return _with_gains(found)

    def _simulated(self, ctx: Context) -> dict[str, dict[str, float]]:
        from millstream.sim.replica import EngineSetting
        from millstream.sim.simulate import Simulation
        from millstream.sim.workload import TEXT, Call

        draw = random.Random(f"ltr simulated {ctx.seed} {ctx.repeat}")
        count = ctx.size(SIMULATED, QUICK_SIMULATED)
        places = [draw.randrange(len(self.tested)) for _ in range(count)]

        def calls(name: str, rate: float) -> list[Any]:
            times, at, made = random.Random(f"{ctx.seed} {ctx.repeat}"), 0.0, []
            for number, place in enumerate(places):
                label = self.tested[place]
                known = "shuffled" if name == "shuffled" else "ltr"
                hints = Hints(score=self.scores[known][place]) if POLICIES[name].name == "ltr" else Hints()
                start = (number + 1) * TEXT
                made.append(Call(number, at, tuple(range(start, start + len(label.ids))), label.tokens, hints=hints))
                at += times.expovariate(rate) if rate else 0.0
            return made

        kinds = [(f"engine {place}", self.profile) for place in range(ENGINES)]

        def run(name: str, rate: float) -> Any:
            setting = EngineSetting(
                (POLICIES[name], Choice("fcfs")),
                prefix=Choice("none"),
                preemption="swap",
                host_blocks=self.profile.blocks,
            )
            return Simulation(calls(name, rate), kinds, setting, oracle=name == "srpt", max_tokens=CAP).run()

        rate = LOAD * count / run("fcfs", 0.0).duration_s
        results = {name: run(name, rate) for name in POLICIES}
        return _with_gains({name: _numbers(one.served, one.duration_s) for name, one in results.items()})


def _knowing(calls: Sequence[Any]) -> list[Any]:
    """Calls that say how long they will be, for the oracle's arm."""
    return [replace(call, hints=Hints(oracle=call.num_output)) for call in calls]


def _numbers(served: Sequence[Any], seconds: float) -> dict[str, float]:
    from millstream.sim.metrics import percentile

    token = sorted((one.times_s[-1] - one.arrival_s) / len(one.times_s) for one in served if one.times_s)
    waits = [
        max(b - a for a, b in zip((one.arrival_s, *one.times_s), one.times_s, strict=False))
        for one in served
        if one.times_s
    ]
    return {
        "token_mean_s": statistics.fmean(token),
        "token_p90_s": percentile(token, 90),
        "max_wait_s": statistics.fmean(waits),
        "worst_wait_s": max(waits),
        "tokens_per_s": sum(len(one.times_s) for one in served) / seconds,
    }


def _with_gains(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    most = found["fcfs"]["token_mean_s"] - found["srpt"]["token_mean_s"]
    for numbers in found.values():
        numbers["recovered"] = (found["fcfs"]["token_mean_s"] - numbers["token_mean_s"]) / most if most > 0 else 0.0
    return found


CARD = Card("ltr", "shortest output first, by a learned order", paper=61)
PLUGIN = Ltr
