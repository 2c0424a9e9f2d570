"""The simulator against the engine that it simulates: the same requests, live and in virtual time.

Steps are calibrated anew in each repeat, since machines drift. Then a stretch of the Azure conversation trace, which no
calibration has seen, is served live by SmolLM2 and simulated: under fcfs, under a policy that reorders, with so few KV
blocks that requests are preempted, and behind one long beginning that all share. The same requests, arrivals and
lengths, and the same scheduler, policies and meters in both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    Metric,
    Of,
    Required,
)

MODEL = "smollm2-135m"
TRACE = "azure-conv"
REQUESTS, QUICK_REQUESTS = 60, 12
MOST_PROMPT, MOST_OUTPUT = 640, 64
FEW_BLOCKS = 20


@dataclass(frozen=True, slots=True)
class Case:
    """`blocks` are those of the KV cache, or all that the engine has. With `shared` tokens at the beginning of all
    prompts, of which the trace's are then the rest, at most `most_prompt` long; they come at `rate` a second.
    """

    policy: str = "fcfs"
    blocks: int | None = None
    shared: int = 0
    most_prompt: int = MOST_PROMPT
    rate: float = 2.5

    @property
    def prefix(self) -> Choice:
        return Choice("radix" if self.shared else "none")


CASES = {
    "fcfs": Case(),
    "reordered": Case("shortest-remaining"),
    "preempted": Case(blocks=FEW_BLOCKS),
    "shared": Case(shared=768, most_prompt=96, rate=8.0),
}
P50, P99 = 0.10, 0.20


def _rows() -> tuple[Required, ...]:
    found: list[Required] = []
    for case in CASES:
        for metric, text, share in (
            ("ttft_p50_s", "median TTFT", P50),
            ("tpot_p50_s", "median TPOT", P50),
            ("tokens_per_s", "throughput", P50),
            ("ttft_p99_s", "p99 of TTFT", P99),
        ):
            found.append(
                Required(
                    f"{case}: {text} within {100 * share:.0f} % of the live engine's",
                    Of(f"sim-{case}", metric),
                    Of(f"live-{case}", metric),
                    at_least=1 - share,
                    at_most=1 + share,
                    how="paired",
                )
            )
    return tuple(found)


class SimulatorAgreement(Experiment):
    name = "simulator-agreement"
    title = "The simulator and the engine that it simulates, on the same requests"
    arms = tuple(
        Arm(
            f"{where}-{case}",
            f"{'served live' if where == 'live' else 'simulated'}: {case}",
            (f"policy:{of.policy}",),
        )
        for case, of in CASES.items()
        for where in ("live", "sim")
    )
    metrics = (
        Metric("ttft_p50_s", "s", "lower"),
        Metric("ttft_p99_s", "s", "lower"),
        Metric("tpot_p50_s", "s", "lower"),
        Metric(
            "tokens_per_s", "tokens/s", "higher", "output tokens a second, from the first arrival to the last token"
        ),
        Metric("preemptions", "", "lower"),
        Metric("step_error", "%", "lower", "of the model of step times, on compositions that it was not fitted to"),
        Metric("step_noise", "%", "lower", "by which repeats of a step differ"),
    )
    claim = Claim(
        "A simulator that executes the production scheduler agrees with the live engine: medians within 10 %, p99 "
        "within 20 %, whatever the policy, also when requests are preempted and where they share their beginnings"
    )
    required = (
        *_rows(),
        Required("requests are preempted where blocks are few", Of("live-preempted", "preemptions"), at_least=1.0),
        Required("and in the simulation too", Of("sim-preempted", "preemptions"), at_least=1.0),
    )
    warmup = 0
    seconds = 800.0
    sources = (
        "millstream.sim.simulate",
        "millstream.sim.replica",
        "millstream.sim.sim_runner",
        "millstream.engine.calibrate",
        "millstream.core.shape",
        "millstream.sched.predictors.piecewise",
        "millstream.sched.scheduler",
    )

    def open(self, ctx: Context) -> None:
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine import calibrate
        from millstream.engine.assemble import assemble
        from millstream.sim import traces

        self.base = EngineConfig(model=ModelConfig(weights="blocks"), cache=CacheConfig(bytes="1GiB"), seed=0)
        self.model = assemble(MODEL, self.base, tune=True)
        rows = [
            row for row in traces.load(TRACE) if row.num_prompt <= MOST_PROMPT and 2 <= row.num_output <= MOST_OUTPUT
        ]
        self.rows = rows
        self.compositions = calibrate.grid_of(self.model)
        self.found: Any = None
        self.calibrated = -1

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.sim import data

        return {"model": self.model.source.checksum().encode(), "trace": data.find(TRACE)}

    def _calibrate(self, ctx: Context) -> None:
        """Once a repeat; in a quick run once."""
        from millstream.engine import calibrate

        if self.found is not None and (ctx.quick or self.calibrated == ctx.repeat):
            return
        self.calibrated = ctx.repeat
        self.found = calibrate.calibrate(self.model, self.compositions, 3, ctx.repeat)

    def _requests(self, ctx: Context, case: Case) -> list[Request]:
        draw = random.Random(ctx.seed + 50 + ctx.repeat)
        count = ctx.size(REQUESTS, QUICK_REQUESTS)
        start = draw.randrange(len(self.rows) - count)
        rows = self.rows[start : start + count]
        span = rows[-1].at_s - rows[0].at_s
        out: list[Request] = []

        def text(length: int) -> tuple[int, ...]:
            return tuple(draw.randrange(self.model.spec.vocab_size) for _ in range(length))

        begin = text(case.shared)
        for place, row in enumerate(rows):
            ids = begin + text(min(row.num_prompt, case.most_prompt))
            params = SamplingParams(max_tokens=row.num_output, temperature=0.0, ignore_eos=True)
            at = (row.at_s - rows[0].at_s) / span * (count - 1) / case.rate
            out.append(Request(1 + place, (Tokens(ids),), params, arrival=at))
        return out

    def _blocks(self, case: Case) -> dict[str, int]:
        return {name: case.blocks or blocks for name, blocks in self.model.resolved.blocks.items()}

    def check(self, ctx: Context) -> CheckResult:
        """Simulated requests end after the same numbers of tokens, and the model of step times is good enough."""
        self._calibrate(ctx)
        requests = self._requests(ctx, CASES["fcfs"])
        result = self._simulate(requests, CASES["fcfs"])
        right = sum(
            len(one.times_s) == request.params.max_tokens for one, request in zip(result.served, requests, strict=True)
        )
        error, target = self.found.errors[self.found.best], self.found.target
        return CheckResult(
            (
                CheckRow(
                    "simulated outputs are as long as the trace says", right == len(requests), f"{right} requests"
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
        where, _, name = arm.name.partition("-")
        case = CASES[name]
        requests = self._requests(ctx, case)
        if where == "live":
            return self._live(requests, case)
        self._calibrate(ctx)
        result = self._simulate(requests, case)
        found = _metrics(
            [one.times_s for one in result.served],
            [one.arrival_s for one in result.served],
            sum(one.preemptions for one in result.served),
        )
        return found | {"step_error": 100 * self.found.errors[self.found.best], "step_noise": 100 * self.found.noise}

    def _live(self, requests: list[Request], case: Case) -> dict[str, float]:
        from millstream.bench.drive import drive
        from millstream.engine.assemble import build_engine

        model = self.model
        config = replace(
            self.base,
            sched=replace(self.base.sched, policies=(Choice(case.policy),)),
            cache=replace(self.base.cache, prefix=case.prefix),
        )
        resolved = replace(model.resolved, blocks=self._blocks(case))
        engine = build_engine(model.built.runner, model.spec, model.tokenizer, config, resolved)
        run = drive(engine, requests)
        timelines = sorted(run.timelines, key=lambda one: one.request.id)
        return _metrics(
            [one.times for one in timelines],
            [one.request.arrival for one in timelines],
            sum(one.preemptions for one in timelines),
        )

    def _simulate(self, requests: list[Request], case: Case) -> Any:
        from millstream.engine import calibrate
        from millstream.sim.replica import EngineSetting
        from millstream.sim.simulate import Simulation
        from millstream.sim.workload import Call

        resolved = self.model.resolved
        profile = calibrate.profile_of(self.model, self.found).sized(blocks=min(self._blocks(case).values()))
        setting = EngineSetting((Choice(case.policy),), resolved.meters, case.prefix, plans=resolved.plans)
        calls = [
            Call(request.id, request.arrival, tuple(request.prompt_ids), request.params.max_tokens or 1)
            for request in requests
        ]
        # What clients ask for at most is what they get, live and here.
        return Simulation(calls, [("here", profile)], setting, max_tokens=1).run()


def _metrics(times: list[list[float]], arrivals: list[float], preemptions: int) -> dict[str, float]:
    from millstream.sim.metrics import percentile

    ttft = sorted(own[0] - arrival for own, arrival in zip(times, arrivals, strict=True))
    tpot = sorted((own[-1] - own[0]) / (len(own) - 1) for own in times if len(own) > 1)
    seconds = max(own[-1] for own in times) - min(arrivals)
    return {
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p99_s": percentile(ttft, 99),
        "tpot_p50_s": percentile(tpot, 50),
        "tokens_per_s": sum(map(len, times)) / seconds,
        "preemptions": float(preemptions),
    }


CARD = Card("simulator-agreement", "the simulator against the live engine, on the same requests")
PLUGIN = SimulatorAgreement
