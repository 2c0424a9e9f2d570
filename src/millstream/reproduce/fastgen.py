"""Dynamic SplitFuse against prefill-first and Orca's composition (DeepSpeed-FastGen).

One engine, one model, one closed loop of clients with long prompts and short answers; only the composition of steps
differs. The step size of SplitFuse is the knee of this machine's curve of tokens a second against tokens a step, which
the experiment measures first.

The paper's deadlines (512 prompt tokens a second; 2, 4 and 6 generated tokens a second) belong to its hardware. Here
they follow from what this machine does alone with the longest prompt in steps of the knee, measured in the same run: a
prompt may take four times as long as alone, and generation must keep 50, 75 or 90 % of the pace at which those steps
came, as an exponential moving average over the times between tokens. Prompts of 300 to 1,500 tokens (400 to 700 in the
quick run), closed loop, weights in blocks.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core.registry import Card, Choice
from millstream.core.request import Request, SamplingParams, Tokens
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

MODEL = "smollm2-135m"
PROMPTS, QUICK_PROMPTS = (300, 1500), (400, 700)
OUTPUTS, QUICK_OUTPUTS = (32, 64), (10, 16)
CLIENTS, QUICK_CLIENTS = 8, 4
PACES = {"effective_50_per_s": 0.5, "effective_per_s": 0.75, "effective_90_per_s": 0.9}
EMA_WEIGHT = 0.1
PROMPT_RATE_SHARE = 0.25


class FastGen(Experiment):
    name = "fastgen"
    paper = 19
    title = "Steps of equal size against whole prompts"
    arms = (
        Arm(
            "prefill-first",
            "whole prompts before decodes, never together (vLLM in 2023)",
            ("meter:prefill-first", "policy:prefill-first"),
        ),
        Arm("orca", "whole prompts beside decodes", ("meter:orca",)),
        Arm("splitfuse", "decodes first, prompts cut to fill a step of fixed size", ("meter:splitfuse",)),
    )
    metrics = (
        Metric("itl_p95_s", "s", "lower", "95th percentile of the times between tokens"),
        Metric("itl_p99_s", "s", "lower"),
        Metric("step_cv", "", "lower", "standard deviation of step seconds over their mean, while clients wait"),
        Metric(
            "effective_per_s", "requests/s", "higher", "requests a second that met both deadlines, the pace at 75 %"
        ),
        Metric("effective_50_per_s", "requests/s", "higher"),
        Metric("effective_90_per_s", "requests/s", "higher"),
        Metric("output_tokens_per_s", "tokens/s", "higher"),
        Metric("ttft_p50_s", "s", "lower"),
        Metric("forwards_per_step", "", "lower"),
        Metric("full_steps", "%", "higher", "steps of exactly the budget, of those with more work than fits"),
    )
    claim = Claim(
        "2.3 times the effective throughput of vLLM 0.2 (1.42 against 0.63 requests/s at 4 tokens/s), up to twice its "
        "throughput at equal latency, P95 token latency 3.7 times lower",
        (
            Figure("P95 inter-token latency", Of("prefill-first", "itl_p95_s"), Of("splitfuse", "itl_p95_s"), 3.7),
            Figure(
                "effective throughput", Of("splitfuse", "effective_per_s"), Of("prefill-first", "effective_per_s"), 2.3
            ),
        ),
    )
    required = (
        Required(
            "P95 inter-token latency at least 2 times lower than prefill-first",
            Of("prefill-first", "itl_p95_s"),
            Of("splitfuse", "itl_p95_s"),
            at_least=2.0,
        ),
        Required("and than Orca's composition", Of("orca", "itl_p95_s"), Of("splitfuse", "itl_p95_s"), at_least=2.0),
        Required(
            "at equal throughput",
            Of("splitfuse", "output_tokens_per_s"),
            Of("prefill-first", "output_tokens_per_s"),
            at_least=0.95,
        ),
        Required(
            "effective throughput at least 1.3 times prefill-first",
            Of("splitfuse", "effective_per_s"),
            Of("prefill-first", "effective_per_s"),
            at_least=1.3,
        ),
        Required(
            "step time varies at least 3 times less than under Orca",
            Of("orca", "step_cv"),
            Of("splitfuse", "step_cv"),
            at_least=3.0,
        ),
        Required("one forward pass a step", Of("splitfuse", "forwards_per_step"), at_most=1.0, how="every"),
        Required("95 % of saturated steps compute exactly the budget", Of("splitfuse", "full_steps"), at_least=95.0),
        Required(
            "1 to 4 replicas within 5 % of linear",
            Of("splitfuse", "output_tokens_per_s"),
            elsewhere="the simulator, with the router",
        ),
    )
    # The knee and the correctness check have used every kernel by then.
    warmup = 0
    seconds = 1200.0
    sources = ("millstream.sched.scheduler", "millstream.engine.engine")

    def open(self, ctx: Context) -> None:
        from millstream.bench import data
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine.assemble import assemble

        self.base = EngineConfig(
            model=ModelConfig(weights="blocks"), cache=CacheConfig(prefix=Choice("none"), bytes="2GiB")
        )
        self.model = assemble(MODEL, self.base)
        self.ids = itertools.count(1)
        self.pool = self.model.tokenizer.encode(data.text("wikitext2-test")[:400_000])
        self.budget = self._knee(ctx)
        self.prompt_rate = self._alone((QUICK_PROMPTS if ctx.quick else PROMPTS)[1])
        ctx.say(f"the knee is at {self.budget} tokens a step; a prompt alone takes {self.prompt_rate:.0f} tokens/s")
        draw = random.Random(ctx.seed)
        prompts, outputs = (QUICK_PROMPTS, QUICK_OUTPUTS) if ctx.quick else (PROMPTS, OUTPUTS)
        self.shapes = [(draw.randint(*prompts), draw.randint(*outputs)) for _ in range(ctx.size(20, 11))]

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {
            "model": self.model.source.checksum().encode(),
            "shapes": repr(self.shapes).encode(),
            "text": data.find("wikitext2-test"),
        }

    def _knee(self, ctx: Context) -> int:
        from millstream.engine.knee import Bench, measure_knee

        model = self.model
        bench = Bench(model.built.runner, model.spec, model.resolved.max_context, model.engine.decode.name)
        return measure_knee(bench, sizes=(32, 64, 96, 128, 192, 256), repeats=ctx.size(5, 3)).step_tokens

    def _alone(self, length: int) -> float:
        """Tokens a second of one prompt in an empty engine, in steps of the knee: the median of three."""
        from millstream.bench.drive import drive

        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        rates = []
        for start in range(0, 3 * length, length):
            ids = tuple(self.pool[start : start + length])
            run = drive(self._engine("splitfuse"), [Request(next(self.ids), (Tokens(ids),), params)])
            rates.append(length / run.seconds)
        return statistics.median(rates)

    def _engine(self, arm: str) -> Any:
        from millstream.engine.assemble import build_engine

        composition = {
            "prefill-first": Choice("prefill-first"),
            "orca": Choice("orca"),
            "splitfuse": Choice("splitfuse", {"budget": self.budget}),
        }[arm]
        policies = (Choice("prefill-first"), Choice("fcfs")) if arm == "prefill-first" else (Choice("fcfs"),)
        config = replace(self.base, sched=replace(self.base.sched, policies=policies))
        meters = (composition, Choice("seats"), Choice("kv-blocks"))
        resolved = replace(self.model.resolved, meters=meters)
        return build_engine(self.model.built.runner, self.model.spec, self.model.tokenizer, config, resolved)

    def _requests(self, seed: int) -> list[Request]:
        draw = random.Random(seed)
        out = []
        for prompt, output in self.shapes:
            start = draw.randrange(len(self.pool) - prompt)
            ids = tuple(self.pool[start : start + prompt])
            params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            out.append(Request(next(self.ids), (Tokens(ids),), params))
        return out

    def check(self, ctx: Context) -> CheckResult:
        """A prompt in chunks of any size has the logprobs of the whole prompt within 1e-4, mid-block cuts included."""
        from millstream.bench.drive import drive
        from millstream.core.request import Kind
        from millstream.engine.assemble import build_engine

        size = self.model.resolved.block_size
        ids = tuple(self.pool[1000 : 1000 + 2 * size + 17])
        scores: dict[int, list[float]] = {}
        budgets = [len(ids), *range(1, size + 2, 1 if not ctx.quick else 9), size - 1, size, size + 1, 2 * size]
        for budget in dict.fromkeys(budgets):
            resolved = replace(
                self.model.resolved,
                meters=(Choice("splitfuse", {"budget": budget}), Choice("seats"), Choice("kv-blocks")),
            )
            engine = build_engine(self.model.built.runner, self.model.spec, self.model.tokenizer, self.base, resolved)
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            held: list[float] = []

            def keep(chunk: Any, held: list[float] = held) -> None:
                held += [entry.chosen.logprob for entry in chunk.prompt_logprobs or () if entry is not None]

            drive(engine, [Request(next(self.ids), (Tokens(ids),), params, kind=Kind.SCORE)], keep=keep)
            scores[budget] = held
        whole = scores.pop(len(ids))
        worst = max(max(abs(a - b) for a, b in zip(whole, held, strict=True)) for held in scores.values())
        return CheckResult(
            (
                CheckRow(
                    "chunked prefill equals whole prefill",
                    worst <= 1e-4 and len(whole) == len(ids) - 1,
                    f"largest difference of a logprob {worst:.1e} over {len(scores)} chunk sizes, {len(ids)} tokens",
                ),
            )
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        from millstream.bench.drive import drive

        engine = self._engine(arm.name)
        runner = self.model.built.runner
        forwards = runner.counters.forwards
        waiting: list[int] = []

        def after_step() -> None:
            # What was left over: with it the next step is saturated.
            waiting.append(sum(max(0, seq.left) for seq in engine.scheduler.live.values()))

        run = drive(
            engine,
            self._requests(ctx.seed + 100 + ctx.repeat),
            clients=ctx.size(CLIENTS, QUICK_CLIENTS),
            after_step=after_step,
        )
        forwards = runner.counters.forwards - forwards
        ctx.expect(
            f"{arm.name}: every request came to its length",
            all(len(t.tokens) == t.request.params.max_tokens for t in run.timelines),
        )
        # The drain at the end, when clients have no more requests, is not the closed loop.
        last_sent = max(t.sent for t in run.timelines)
        elapsed, busy = 0.0, []
        for seconds in run.step_s:
            elapsed += seconds
            if elapsed <= last_sent:
                busy.append(seconds)
        saturated = [n for n, before in zip(run.tokens[1:], waiting, strict=False) if before >= self.budget]
        gaps = sorted(run.gaps_s)
        out = {
            "itl_p95_s": gaps[int(0.95 * len(gaps))],
            "itl_p99_s": gaps[int(0.99 * len(gaps))],
            "step_cv": statistics.pstdev(busy) / statistics.fmean(busy),
            "output_tokens_per_s": run.output_tokens / run.seconds,
            "ttft_p50_s": statistics.median(t.ttft_s for t in run.timelines),
            "forwards_per_step": forwards / len(run.step_s),
        }
        if arm.name == "splitfuse":
            out["full_steps"] = 100 * sum(n == self.budget for n in saturated) / max(1, len(saturated))
        for metric, share in PACES.items():
            pace = share * self.prompt_rate / self.budget
            out[metric] = sum(self._met(t, pace) for t in run.timelines) / run.seconds
        return out

    def _met(self, timeline: Any, pace: float) -> bool:
        """The first token came in time for the prompt's length, and generation never fell behind `pace` tokens/s."""
        prompt_s = timeline.request.num_prompt / (PROMPT_RATE_SHARE * self.prompt_rate)
        if timeline.ttft_s > prompt_s:
            return False
        average = None
        for gap in timeline.gaps_s:
            average = gap if average is None else EMA_WEIGHT * gap + (1 - EMA_WEIGHT) * average
            if average > 1 / pace:
                return False
        return True


PLUGIN = FastGen
CARD = Card("fastgen", "Dynamic SplitFuse against prefill-first and Orca's composition", paper=19)
