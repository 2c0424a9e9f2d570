"""Runs of KV as long as outputs are expected to be (S3, Jin et al., NeurIPS 2023).

Reservation as before paging: a request claims one run of KV when it enters. What is compared is how long: the most that
it could come to; what a small model reads from its prompt, with twice as much for who outgrows that; the truth; and a
bucket drawn by chance. Prompts are real and of families that the small model was not fitted to, answers are those that
SmolLM2 gave at temperature 1 (the labels of the experiment ltr), so that every arm gives the same texts. The cache is
kept small. Throughput is told while some wait: with few requests, how long the last answers run alone would weigh as
much as how many fit. Paged blocks, which need no guess, are shown beside. Simulated: the same over four engines with
the published step times of an A100. And a model that was fitted to short tasks meets chats, and is fitted anew.
"""

from __future__ import annotations

import random
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
# Most answers are short beside what they could come to, as those of the paper's instructions are.
TESTED: Mapping[str, int] = {"ag-news": 80, "lambada": 60, "humaneval": 60, "oasst": 60}
SHARES: Mapping[str, int] = {"ag-news": 6, "lambada": 4, "humaneval": 2, "oasst": 1}
SHORT = ("gsm8k-number", "mbpp-docs", "truthfulqa-brief", "strategyqa", "aqua", "banking77", "wikitext-summary")
CHATS, CHATS_TESTED = ("sharegpt", "arena-hard"), ("oasst", "vicuna-bench", "mt-bench")
# Tokens of KV: one request at its longest.
CACHE, SEATS = 2048, 64
LIVE, QUICK_LIVE = 40, 12
PROFILE, ENGINES, SIM_CACHE, SIM_SEATS = "vidur-a100-llama3-8b-tp1", 4, 6400, 256
SIMULATED, QUICK_SIMULATED = 260, 100
RETRAIN = 60
# Reserved is what an answer stays within as often as not: the small model is unsure of other families' prompts, and the
# most probable bucket of ten is then too short for most.
SURE = 0.5
# The context of the paper's models.
LONGEST = 2048
PLAIN = ("max", "asked", "paged")  # first come, first served
ARMS = {
    "max": "the longest that the engine serves",
    "asked": "the most that it asks for",
    "s3": "what is expected of its prompt",
    "oracle": "the true length",
    "random": "a bucket drawn by chance",
    "paged": "no runs: paged blocks",
}
FLAT = (
    "of the four rows or so that run at once on two cores each brings less than the one before, so that what a bad "
    "guess takes from the batch costs little; where tokens go with rows, as simulated, it costs more"
)
# What an arm turns on; that of lengths which are read goes by what was read beforehand where it is simulated.
USES = {
    name: (
        "policy:fcfs" if name in PLAIN else "policy:s3",
        "meter:kv-blocks" if name == "paged" else "meter:contiguous",
        *(("length:ranker",) if name == "s3" else ()),
    )
    for name in ARMS
}


class S3(Experiment):
    name, paper = "s3", 15
    title = "Runs of KV as long as outputs are expected to be"
    arms = (
        *(Arm(name, told, USES[name]) for name, told in ARMS.items()),
        *(Arm(f"sim-{name}", f"{ENGINES} engines: {told}", USES[name]) for name, told in ARMS.items()),
    )
    metrics = (
        Metric("tokens_per_s", "tokens/s", "higher", "of answers, until the last request has begun: while some wait"),
        Metric("running", "", "higher", "requests between first and last token until then, mean over time"),
        Metric("outgrown", "%", "lower", "requests that lost their place, some of them more than once"),
        Metric("accuracy", "%", "higher", "answers that ended in the bucket that was expected"),
        Metric("shifted", "%", "higher", "of chats, by a model that was fitted to short tasks"),
        Metric("refitted", "%", "higher", "the same after it was fitted anew on what was answered"),
        Metric("guess_share", "%", "lower", "of the run that reading prompts took"),
    )
    claim = Claim(
        "Up to 6.49 times the throughput of reserving the longest, within the same latency, and near an oracle of "
        "lengths",
        (
            Figure("throughput", Of("s3", "tokens_per_s"), Of("max", "tokens_per_s"), 6.49),
            Figure("throughput, simulated", Of("sim-s3", "tokens_per_s"), Of("sim-max", "tokens_per_s"), 6.49),
        ),
    )
    required = (
        *(
            row
            for kind, where in (("", ""), ("sim-", " (simulated)"))
            for row in (
                Required(
                    f"at least twice the throughput of reserving the longest{where}",
                    Of(f"{kind}s3", "tokens_per_s"),
                    Of(f"{kind}max", "tokens_per_s"),
                    at_least=2.0,
                ),
                Required(
                    f"at least 0.8 of the oracle's{where}",
                    Of(f"{kind}s3", "tokens_per_s"),
                    Of(f"{kind}oracle", "tokens_per_s"),
                    at_least=0.8,
                ),
                Required(
                    f"buckets by chance are worse{where}",
                    Of(f"{kind}random", "tokens_per_s"),
                    Of(f"{kind}s3", "tokens_per_s"),
                    at_most=0.9,
                    out_of_reach="" if kind else FLAT,
                ),
            )
        ),
        Required(
            "fitted anew it is more often right about traffic that has changed",
            Of("s3", "refitted"),
            Of("s3", "shifted"),
            at_least=1.1,
        ),
    )
    warmup = 0
    seconds = 700.0
    sources = (
        "millstream.sched.scheduler",
        "millstream.memory.ledger",
        "millstream.bench.stage",
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

        profile = profiles.load(PROFILE, PUBLISHED)
        self.profile = profile.sized(SIM_CACHE // profile.block_size, max_rows=SIM_SEATS)
        self.stage = Stage(MODEL)
        self.serving = labels.Serving.by(self.stage.model, MODEL, CAP)
        share = 0.1 if ctx.quick else 1.0
        made, trunk = self.stage.model, Trunk()

        def answered(counts: Mapping[str, int]) -> list[Any]:
            return ranking.collected(made, self.serving, counts, share, ctx.say)

        learned, self.tested = answered(ranking.TRAIN), answered(TESTED)
        chats = answered({name: ranking.TEST[name] for name in CHATS_TESTED})
        ctx.say(f"learning from {len(learned)} answers")
        # Heads alone: they are what is fitted anew as answers come in.
        model, _ = ranking.train(learned, (), made.tokenizer, CAP, served=MODEL, trunk=trunk, trunk_epochs=0)
        self.file = ctx.scratch / "s3.safetensors"
        model.save(self.file)
        self.expected = self._lengths(model, trunk, self.tested, SURE)
        self.width = model.heads.width
        self.accuracy = self._accuracy(model, trunk, self.tested)
        self.shifted, self.refitted = self._shift(ctx, learned, chats, trunk)
        self.texts: dict[int, Mapping[int, tuple[int, ...]]] = {}

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import prompts, ranking

        told = repr((ranking.TRAIN, TESTED, SHARES, self.serving, CACHE, SEATS, LIVE, SIM_CACHE, SIMULATED, SURE))
        return {
            "model": self.stage.model.source.checksum().encode(),
            "shapes": told.encode(),
            **prompts.files((*ranking.TRAIN, *TESTED, *CHATS_TESTED)),
        }

    # -- the model of lengths

    def _lengths(self, model: Any, trunk: Any, labels: Sequence[Any], sure: float = 0.0) -> list[int]:
        from millstream.bench import ranking

        rows = ranking.vectors(model, trunk, self.stage.model.tokenizer, labels)
        found: list[int] = model.heads.lengths(rows, sure)
        return found

    def _accuracy(self, model: Any, trunk: Any, labels: Sequence[Any]) -> float:
        guessed = self._lengths(model, trunk, labels)
        right = sum(
            (guess - 1) // model.heads.width == (label.tokens - 1) // model.heads.width
            for guess, label in zip(guessed, labels, strict=True)
        )
        return float(100 * right / len(labels))

    def _shift(self, ctx: Context, learned: Sequence[Any], chats: Sequence[Any], trunk: Any) -> tuple[float, float]:
        """The share of right buckets on chats, by a model of short tasks, before and after it is fitted anew.

        What it is fitted anew on are answers to chats of other families, as they end one after the other.
        """
        from millstream.bench import ranking
        from millstream.core import registry
        from millstream.core.events import Finished
        from millstream.core.request import Request, Tokens
        from millstream.core.sequence import Finish, Sequence, Stamps

        tokenizer = self.stage.model.tokenizer
        short = [label for label in learned if label.prompt.family in SHORT]
        narrow, _ = ranking.train(short, (), tokenizer, CAP, served=MODEL, trunk=trunk, trunk_epochs=0)
        file = ctx.scratch / "narrow.safetensors"
        narrow.save(file)
        before = self._accuracy(narrow, trunk, chats)
        options = {"file": str(file), "retrain": RETRAIN if not ctx.quick else 8}
        ranker = registry.make("length", Choice("ranker", options), text=tokenizer.decode)
        for number, label in enumerate(label for label in learned if label.prompt.family in CHATS):
            request = Request(number, (Tokens(label.ids),), self.serving.params(label.prompt.text))
            ranker.guess([request])
            prompt, tokens = len(label.ids), [*label.ids, *[0] * label.tokens]
            seq = Sequence(
                number, request, 0, tokens, prompt, prompt + CAP, 0, frozenset(), Choice("sample"), None, Stamps(0.0)
            )
            ranker.observe(Finished(0.0, seq.view, Finish.STOP if label.ended else Finish.LENGTH))
        narrow.heads = ranker.heads
        return before, self._accuracy(narrow, trunk, chats)

    # -- traffic

    def _calls(self, ctx: Context, name: str, count: int, simulated: bool) -> list[Any]:
        """Prompts, all there at once, and what an arm is told of them."""
        from millstream.sim.workload import TEXT, Call

        draw = random.Random(f"s3 {ctx.seed} {ctx.repeat}")
        places: dict[str, list[int]] = {}
        for place, label in enumerate(self.tested):
            places.setdefault(label.prompt.family, []).append(place)
        # The same prompt comes twice only where there are more calls than prompts of its family.
        decks: dict[str, list[int]] = {name: [] for name in places}
        calls = []
        for number in range(count):
            (family,) = draw.choices(list(SHARES), list(SHARES.values()))
            if not decks[family]:
                decks[family] = draw.sample(places[family], len(places[family]))
            place = decks[family].pop()
            label, start = self.tested[place], (number + 1) * TEXT
            chance = self.width * draw.randint(1, 10)
            told = {
                "oracle": label.tokens,
                "random": min(CAP, chance),
                "s3": self.expected[place] if simulated else None,
            }
            prompt = tuple(range(start, start + len(label.ids))) if simulated else label.ids
            calls.append(Call(number, 0.0, prompt, label.tokens, hints=Hints(expected_output_len=told.get(name))))
        return calls

    def _meter(self, name: str) -> Choice:
        if name == "paged":
            return Choice("kv-blocks")
        if name in ("max", "asked"):
            return Choice("contiguous", {"reserve": "max", "max_tokens": LONGEST if name == "max" else 0})
        return Choice("contiguous", {"reserve": "hint"})

    def _live(self, calls: Sequence[Any], name: str) -> Any:
        from millstream.bench import labels
        from millstream.bench.stage import Setting

        setting = Setting(
            (Choice("fcfs" if name in PLAIN else "s3"),),
            seats=SEATS,
            blocks=CACHE // self.stage.model.resolved.block_size,
            last=self._meter(name),
            prefix=Choice("none"),
            preemption="swap",
            lengths=Choice("ranker", {"file": str(self.file), "sure": SURE}) if name == "s3" else None,
        )
        return self.stage.live(calls, setting, answers=labels.answers(self.serving, self.tested, calls))

    # -- runs

    def check(self, ctx: Context) -> CheckResult:
        """Whole answers, also of those that outgrew their run; nothing is learned from what is tested."""
        from millstream.bench import ranking

        ctx.repeat = 0
        runs = {}
        for name in ARMS:
            calls = self._calls(ctx, name, ctx.size(12, 6), False)
            runs[name] = self._live(calls, name)
        lengths = {call.id: call.num_output for call in calls}
        rows = [
            CheckRow(
                f"{name}: the texts that were labelled, whole",
                run.tokens == runs["paged"].tokens and all(len(run.tokens[one]) == lengths[one] for one in lengths),
                f"{len(lengths)} answers, {run.preemptions} places lost",
            )
            for name, run in runs.items()
        ]
        both = set(TESTED) & set(ranking.TRAIN)
        rows.append(CheckRow("no family is learned from and tested on", not both, ", ".join(TESTED)))
        return CheckResult(tuple(rows))

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        name, found = arm.name.removeprefix("sim-"), {}
        if name != arm.name:
            served, seconds = self._simulated(ctx, name)
        else:
            calls = self._calls(ctx, name, ctx.size(LIVE, QUICK_LIVE), False)
            played = self._live(calls, name)
            served, seconds = played.served, played.seconds
            reference = self.texts.setdefault(ctx.repeat, played.tokens)
            ctx.expect(
                "answers are the same in every arm, and as long as their labels",
                played.tokens == reference and all(len(reference[call.id]) == call.num_output for call in calls),
            )
            if name == "s3":
                found = {
                    "accuracy": self.accuracy,
                    "shifted": self.shifted,
                    "refitted": self.refitted,
                    "guess_share": 100 * played.guess_s / seconds,
                }
        # What comes after, when nobody waits, is the length of the last few answers and no question of room.
        begun, lost = max(one.times_s[0] for one in served), sum(one.preemptions > 0 for one in served)
        span = begun - min(one.arrival_s for one in served)
        inside = sum(min(one.times_s[-1], begun) - one.times_s[0] for one in served)
        return found | {
            "tokens_per_s": sum(at <= begun for one in served for at in one.times_s) / span,
            "running": inside / span,
            "outgrown": 100 * lost / len(served),
        }

    def _simulated(self, ctx: Context, name: str) -> tuple[Sequence[Any], float]:
        from millstream.sched.meters import usual
        from millstream.sim.replica import EngineSetting
        from millstream.sim.simulate import Simulation

        calls = self._calls(ctx, name, ctx.size(SIMULATED, QUICK_SIMULATED), True)
        meters = (*usual(self.profile.step_tokens, SIM_SEATS)[:-1], self._meter(name))
        setting = EngineSetting(
            (Choice("fcfs" if name in PLAIN else "s3"),),
            meters,
            prefix=Choice("none"),
            preemption="swap",
            host_blocks=4 * self.profile.blocks,
        )
        kinds = [(f"engine {place}", self.profile) for place in range(ENGINES)]
        result = Simulation(
            [replace(call, at_s=0.001 * call.id) for call in calls], kinds, setting, max_tokens=CAP
        ).run()
        return result.served, result.duration_s


CARD = Card("s3", "runs of KV as long as outputs are expected to be", paper=15)
PLUGIN = S3
