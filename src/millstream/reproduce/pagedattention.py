"""PagedAttention against contiguous reservation, at one fixed KV budget (Kwon et al., 2023, sections 4 and 6).

One model, one pool of KV blocks, one set of requests with real conversation lengths; only how KV is claimed differs:
the longest possible run (FasterTransformer, Orca-max), a run of the next power of two of the true output (Orca-pow2),
a run of the true length (Orca-oracle), or blocks on demand. All arms run the same kernels over the same pool, so the
contiguous ones pay nothing for going through block tables and gain nothing from being contiguous.

Lengths are halved so that a run fits in minutes on two cores, and so is the limit that is reserved (1,024 tokens).
Conversations longer than half the limit are left out: with eighteen requests the longest alone would decide the
seconds. The quick run divides by four and leaves short conversations out. The budget holds one sequence of the limit
and a third: with few rows a step is bound by reading the weights, as on the paper's GPUs, and more rows cost little.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core.registry import Card, Choice
from millstream.core.request import Hints, Request, SamplingParams, Tokens
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
BLOCK_SIZE = 16
# 64 MB of float32 KV at 46,080 bytes a token (40 MB in the quick run).
BUDGET_BLOCKS = 64_000_000 // (46_080 * BLOCK_SIZE)
QUICK_BLOCKS = 40_000_000 // (46_080 * BLOCK_SIZE)
# The model's limit, which reserving the maximum reserves, in the data's own tokens, and by what those are divided here.
LONGEST = 2048
SHRINK = 2
QUICK_SHRINK = 4
# Two logits this close may change places when a matrix product sums in another order.
NEAR_TIE = 1e-4


class PagedAttention(Experiment):
    name = "pagedattention"
    paper = 11
    title = "KV on demand in blocks against contiguous reservation at a fixed budget"
    arms = (
        Arm("contiguous-max", "a run for the longest possible sequence", ("meter:contiguous",)),
        Arm("contiguous-pow2", "a run for the true output rounded up to a power of two", ("meter:contiguous",)),
        Arm("contiguous-oracle", "a run for exactly the true output", ("meter:contiguous",)),
        Arm("paged", "blocks of 16 tokens on demand", ("meter:kv-blocks",)),
    )
    metrics = (
        Metric("useful_kv_share", "%", "higher", "slots that hold a computed token, of all slots claimed, over steps"),
        Metric("running", "", "higher", "sequences in a step, mean over steps"),
        Metric("output_tokens_per_s", "tokens/s", "higher"),
        Metric("normalized_latency_s", "s", "lower", "mean over requests of end-to-end seconds by output token"),
        Metric("copied_bytes_per_token", "bytes", "lower", "KV bytes copied by a step, by token computed in it"),
        Metric("table_growth", "", "lower", "decode step at a 8,192-token limit over one at a 512-token limit"),
    )
    claim = Claim(
        "2-4 times the throughput of FasterTransformer and Orca at equal latency; 1.7-2.7 times Orca with a length "
        "oracle, 2.7-8 times Orca reserving the maximum; KV waste of about 4 % instead of 60-80 %",
        (
            Figure(
                "throughput over reserving the maximum",
                Of("paged", "output_tokens_per_s"),
                Of("contiguous-max", "output_tokens_per_s"),
                2.7,
                8.0,
            ),
            Figure("useful KV share, paged", Of("paged", "useful_kv_share"), None, 96.0),
            Figure("useful KV share, reserving the maximum", Of("contiguous-max", "useful_kv_share"), None, 20.4, 38.2),
        ),
    )
    required = (
        Required("useful KV share at least 95 %", Of("paged", "useful_kv_share"), at_least=95.0),
        Required(
            "throughput at least 1.7 times reserving the maximum",
            Of("paged", "output_tokens_per_s"),
            Of("contiguous-max", "output_tokens_per_s"),
            at_least=1.7,
        ),
        Required(
            "at no higher normalized latency",
            Of("paged", "normalized_latency_s"),
            Of("contiguous-max", "normalized_latency_s"),
            at_most=1.0,
        ),
        Required(
            "running batch at least 1.7 times reserving the maximum",
            Of("paged", "running"),
            Of("contiguous-max", "running"),
            at_least=1.7,
        ),
        # A step writes the new tokens' K and V once; anything gathered would count for every token held.
        Required(
            "bytes copied a step are those of its new tokens",
            Of("paged", "copied_bytes_per_token"),
            at_most=46_080 * 1.02,
            how="every",
        ),
        Required("step time does not grow with the length limit", Of("paged", "table_growth"), at_most=1.25),
    )
    # The correctness check has used every kernel by then.
    warmup = 0
    seconds = 600.0
    sources = (
        "millstream.memory.ledger",
        "millstream.memory.blocks",
        "millstream.sched.scheduler",
        "millstream.ops.attention.cpu_paged",
        "millstream.ops.attention._native",
        "millstream.ops.cpu/attention.h",
        "millstream.ops.cpu/paged_attention.cpp",
        "millstream.ops.cpu.kv_write",
        "millstream.formats.kv.plain",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench import data
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine.assemble import assemble

        cache = CacheConfig(
            block_size=BLOCK_SIZE, blocks=1024, prefix=Choice("none"), host_bytes="64MB", kv=Choice("plain")
        )
        self.base = EngineConfig(model=ModelConfig(weights="blocks"), cache=cache)
        self.model = assemble(MODEL, self.base)
        self.ids = itertools.count(1)
        text = data.text("wikitext2-test")
        self.pool = self.model.tokenizer.encode(text[:200_000])
        shrink = ctx.size(SHRINK, QUICK_SHRINK)
        shortest, longest = (900, 1500) if ctx.quick else (0, LONGEST // 2)
        self.max_len = LONGEST // shrink
        self.budget = ctx.size(BUDGET_BLOCKS, QUICK_BLOCKS)
        rows = [
            (max(4, p // shrink), max(2, o // shrink))
            for p, o in data.lengths("sharegpt-lengths")
            if shortest <= p + o <= longest and 8 <= p <= longest // 2 and o >= 4
        ]
        self.lengths = random.Random(ctx.seed).sample(rows, ctx.size(18, 5))

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {
            "model": self.model.source.checksum().encode(),
            "lengths": repr(self.lengths).encode(),
            "text": data.find("wikitext2-test"),
        }

    def _engine(self, meters: tuple[Choice, ...], blocks: int, preemption: str = "recompute", host: int = 0) -> Any:
        from millstream.engine.assemble import build_engine

        config = replace(self.base, sched=replace(self.base.sched, preemption=preemption))
        resolved = replace(
            self.model.resolved,
            meters=meters,
            blocks={"full": blocks},
            host_blocks={"full": host},
            max_context=self.max_len,
        )
        return build_engine(self.model.built.runner, self.model.spec, self.model.tokenizer, config, resolved)

    def _meters(self, arm: str) -> tuple[Choice, ...]:
        claims = {
            "contiguous-max": Choice("contiguous", {"reserve": "max", "max_tokens": self.max_len}),
            "contiguous-pow2": Choice("contiguous", {"reserve": "pow2"}),
            "contiguous-oracle": Choice("contiguous", {"reserve": "oracle"}),
            "paged": Choice("kv-blocks"),
        }
        composition = self.model.resolved.meters[0]
        return (composition, Choice("seats", {"max_rows": 256}), claims[arm])

    def _requests(self, seed: int) -> list[Request]:
        draw = random.Random(seed)
        out = []
        for prompt, output in self.lengths:
            start = draw.randrange(len(self.pool) - prompt)
            out.append(
                Request(
                    next(self.ids),
                    (Tokens(tuple(self.pool[start : start + prompt])),),
                    SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
                    hints=Hints(oracle=output),
                )
            )
        return out

    def check(self, ctx: Context) -> CheckResult:
        """Every decoder gives the same tokens alone and in a crowd that is preempted, by both recoveries; no leak."""
        from millstream.bench.drive import Drive, drive

        draw = random.Random(ctx.seed + 1)
        prompts = []
        for _ in range(ctx.size(8, 3)):
            start = draw.randrange(len(self.pool) - 100)
            prompts.append(tuple(self.pool[start : start + draw.randrange(20, 100)]))
        decoders: dict[str, tuple[SamplingParams, Choice | None]] = {
            "greedy": (SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2), None),
            "sampling n=4": (SamplingParams(n=4, max_tokens=16, seed=7, ignore_eos=True), None),
            "beam 4": (SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), Choice("beam", {"width": 4})),
        }

        def run(engine: Any, params: SamplingParams, decode: Choice | None, clients: int) -> tuple[Drive, list[Any]]:
            requests = [
                Request(next(self.ids), (Tokens(prompt),), params, decode=decode, label=str(place))
                for place, prompt in enumerate(prompts)
            ]
            chunks: list[Any] = []
            return drive(engine, requests, clients=clients, keep=chunks.append), chunks

        rows = []
        for name, (params, decode) in decoders.items():
            alone, records = run(self._engine(self._meters("paged"), 512), params, decode, 1)
            gaps = _gaps(records)
            for preemption, host in (("recompute", 0), ("swap", 512)):
                # About half of what they need at once: somebody has to give way.
                engine = self._engine(self._meters("paged"), ctx.size(30, 9), preemption, host)
                crowd, _ = run(engine, params, decode, len(prompts))
                same, near, preempted = 0, 0, sum(t.preemptions for t in crowd.timelines)
                for a, b in zip(_ordered(alone), _ordered(crowd), strict=True):
                    if a.tokens == b.tokens:
                        same += 1
                    elif gaps:
                        first = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
                        near += gaps[(a.request.id, a.index)][first] < NEAR_TIE
                total = len(alone.timelines)
                free, held = engine.scheduler.ledger.free(), engine.scheduler.ledger.total()
                rows.append(
                    CheckRow(
                        f"{name}, preempted by {preemption}",
                        same + near == total and preempted > 0 and free == held,
                        f"{same} of {total} outputs equal ({near} more part at a near tie), {preempted} preemptions, "
                        f"{free} of {held} blocks free at the end",
                    )
                )
        return CheckResult(tuple(rows))

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        from millstream.bench.drive import drive

        engine = self._engine(self._meters(arm.name), self.budget)
        pages = self.model.built.runner.pages["full"]
        scheduler, ledger = engine.scheduler, engine.scheduler.ledger
        used = claimed = running = 0
        copied = pages.copied.total_bytes

        def after_step() -> None:
            nonlocal used, claimed, running
            live = [seq for seq in scheduler.live.values() if seq.holdings]
            used += sum(seq.computed for seq in live)
            claimed += sum(len(holding.blocks) for seq in live for holding in seq.holdings.values()) * BLOCK_SIZE
            running += len(live)

        requests = self._requests(ctx.seed + 100 + ctx.repeat)
        run = drive(engine, requests, after_step=after_step)
        copied = pages.copied.total_bytes - copied
        ctx.expect(f"{arm.name}: no block is lost", ledger.free() == ledger.total())
        ctx.expect(
            f"{arm.name}: every request came to its length",
            all(len(t.tokens) == t.request.params.max_tokens and t.error is None for t in run.timelines),
        )
        latency = [(t.finished or 0.0) / len(t.tokens) for t in run.timelines]
        out = {
            "useful_kv_share": 100 * used / claimed,
            "running": running / len(run.step_s),
            "output_tokens_per_s": run.output_tokens / run.seconds,
            "normalized_latency_s": sum(latency) / len(latency),
            "copied_bytes_per_token": copied / sum(run.tokens),
        }
        if arm.name == "paged":
            out["table_growth"] = self._growth(ctx)
        return out

    def _growth(self, ctx: Context) -> float:
        """Median decode step with a limit of 8,192 tokens over that with 512, steps interleaved."""
        from millstream.bench.drive import drive

        seconds: dict[int, list[float]] = {512: [], 8192: []}
        for _ in range(ctx.size(3, 1)):
            for limit, held in seconds.items():
                engine = self._engine(self._meters("paged"), 1024)
                engine.limits = replace(engine.limits, max_context=limit)
                requests = [
                    Request(
                        next(self.ids),
                        (Tokens(tuple(self.pool[i * 40 : i * 40 + 32])),),
                        SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
                    )
                    for i in range(8)
                ]
                run = drive(engine, requests)
                held += [s for s, rows, tokens in zip(run.step_s, run.rows, run.tokens, strict=True) if rows == tokens]
        return sorted(seconds[8192])[len(seconds[8192]) // 2] / sorted(seconds[512])[len(seconds[512]) // 2]


def _ordered(run: Any) -> list[Any]:
    return sorted(run.timelines, key=lambda t: (int(t.request.label), t.index))


def _gaps(chunks: list[Any]) -> dict[tuple[int, int], list[float]]:
    """By output: how far the two likeliest tokens were apart at each step, where logprobs were asked."""
    out: dict[tuple[int, int], list[float]] = {}
    for chunk in chunks:
        for entry in chunk.logprobs:
            if len(entry.top) > 1:
                gap = entry.top[0].logprob - entry.top[1].logprob
                out.setdefault((chunk.request_id, chunk.index), []).append(gap)
    return out


PLUGIN = PagedAttention
CARD = Card("pagedattention", "KV on demand against contiguous reservation at a fixed budget", paper=11)
