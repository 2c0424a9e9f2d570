"""Beams over forks of the KV and fused ops against modules with a concatenated cache (Wu et al., 2023).

The paper holds a prompt's keys and values once for all beams, and those of the responses in a second segment that
attention reads through a table of ancestors. Here the block table is that table: a beam is a row of blocks, the
prompt's are shared by reference, those of the response by ancestry, and what is copied is the block in which two beams
part. The paper's second segment grows by 16 tokens; blocks here are as long.

"concat" is what both are measured against: the modules of `bench/modules.py`, an op at a time in torch, over a cache
that is concatenated and picked anew by beam in each step. "forks" is the engine with the reference ops in torch, which
leaves the cache as the difference; "engine" has its own ops, in float32 too. The engine's layers as one native call are
for weights in codes: "concat-codes" and "program" are that pair, over the same codes and the same kernel of a product.

Times are those of steps in which all beams have a token, host work included; prompts are not in them. In float32 all
arms find the same beams; over codes, where rounding may change a beam's course, the modules give the program's beams
the logprobs that it gives them. That is held for every run, as is that nothing of the cache is left behind.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
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

MODEL, WINDOWED = "smollm2-135m", "gemma3-270m"
BLOCK_SIZE = 16
PROMPTS, WIDTHS = (512, 2048), (4, 8)
POINTS = tuple((prompt, width) for prompt in PROMPTS for width in WIDTHS)
# Where all arms are compared; memory is capped at the small one.
SMALL, LARGE = (512, 8), (2048, 8)
# Output tokens a beam: one to choose by the prompt, and a block of them. Concatenating takes so long that there are no
# more; the program has as many as it would have in use, once.
NEW, QUICK_NEW, LONG_NEW = 17, 9, 129
# Summed logprobs of a beam in two orders of summation.
SCORE_ERROR = 1e-4
# And the same by the token where inputs are rounded to 8 bits: a last digit can move one by a whole step.
CODES_ERROR = 0.05
ENGINES = {"forks": "float32", "engine": "float32", "program": "codes"}
MODULES = {"concat": "float32", "concat-codes": "codes"}
BLOCKS = 1024


def blocks(prompt: int, width: int, new: int) -> int:
    """The paper's formula, prompt + width * response, in whole blocks: those of the prompt that all beams hold, and
    each beam's own. The last token's keys are never computed."""
    shared = prompt // BLOCK_SIZE
    return shared + width * (-(-(prompt + new - 1) // BLOCK_SIZE) - shared)


def capped(new: int) -> tuple[int, int]:
    """Blocks that hold the beams of one prompt in a cache that is expanded to them, and how many prompts they hold by
    the formula."""
    prompt, width = SMALL
    cap = width * (prompt + new - 1) // BLOCK_SIZE
    return cap, cap // blocks(prompt, width, new)


def at(point: tuple[int, int]) -> str:
    return f"{point[0]}_w{point[1]}"


@dataclass(slots=True)
class Ran:
    """One search of an engine: beams as (summed logprob, tokens), best first; seconds of the steps in which all beams
    had a token; the most blocks held when a step was launched; bytes copied; how many rows gave way to others."""

    beams: list[list[tuple[float, list[int]]]]
    step_s: list[float]
    most: int
    copied_bytes: int
    preemptions: int


class IntelGpu(Experiment):
    name = "intel-gpu"
    paper = 4
    title = "Beams over forks and fused ops against modules with a concatenated cache"
    arms = (
        Arm("concat", "torch modules, float32; cache concatenated and picked by beam", ("weights:dense",)),
        Arm("forks", "the engine with the reference ops: only the cache differs", ("kv:plain", "attention:cpu-paged")),
        Arm("engine", "the engine with its own ops, float32", ("kv:plain", "attention:cpu-paged", "decode:beam")),
        Arm("concat-codes", "as concat, matrices in 4-bit codes", ("weights:block4",)),
        Arm("program", "the engine, 4-bit codes: all layers are one native call", ("weights:block4", "decode:beam")),
    )
    metrics = (
        *(Metric(f"token_ms_{at(p)}", "ms", "lower", f"a step of {p[1]} beams behind {p[0]} tokens") for p in POINTS),
        *(Metric(f"kv_mb_{at(p)}", "MB", "lower", f"KV held, {p[1]} beams behind {p[0]} tokens") for p in POINTS),
        *(
            Metric(f"kv_of_formula_{at(p)}", "%", "lower", "KV held, of prompt + beams * response in whole blocks")
            for p in POINTS
        ),
        *(
            Metric(f"copied_mb_{at(p)}", "MB", "lower", f"KV copied in a step, {p[1]} beams behind {p[0]} tokens")
            for p in POINTS
        ),
        Metric("launches", "", "lower", "ops of torch that compute or copy, and native calls, in a step of 8 beams"),
        Metric("growth_width", "", "lower", "token time of 8 beams over that of 4, behind 2,048 tokens"),
        Metric("growth_prompt", "", "lower", "token time behind 2,048 tokens over that behind 512, 8 beams"),
        Metric("capped_tokens_per_s", "tokens/s", "higher", "8 beams a prompt of 512; KV as one takes expanded"),
        Metric("capped_prompts", "", "higher", "prompts that run at once in it"),
        Metric("kv_of_formula_long", "%", "lower", "of prompt + beams * response, 8 beams of 129 tokens behind 512"),
        Metric("copied_mb_long", "MB", "lower", "KV copied in a step of these"),
    )
    claim = Claim(
        "up to 7 times lower token latency and up to 27 times the throughput of Hugging Face's on the same device "
        "(GPT-J-6B, Llama 2, OPT, BLOOM; Data Center GPU Max)",
        (
            Figure(
                "token latency",
                Of("concat", f"token_ms_{at(LARGE)}"),
                Of("engine", f"token_ms_{at(LARGE)}"),
                1.0,
                7.0,
            ),
            Figure("throughput", Of("engine", "capped_tokens_per_s"), Of("concat", "capped_tokens_per_s"), 1.0, 27.0),
        ),
    )
    required = (
        *(
            Required(
                f"a token takes less time: {p[1]} beams behind {p[0]} tokens",
                Of("concat", f"token_ms_{at(p)}"),
                Of("engine", f"token_ms_{at(p)}"),
                at_least=1.0,
                how="every",
            )
            for p in POINTS
        ),
        Required(
            "and the ratio grows with the beams",
            Of("concat", "growth_width"),
            Of("engine", "growth_width"),
            at_least=1.05,
            how="paired",
        ),
        Required(
            "and with the prompt",
            Of("concat", "growth_prompt"),
            Of("engine", "growth_prompt"),
            at_least=1.05,
            how="paired",
        ),
        Required(
            "the cache alone makes it faster: 8 beams behind 2,048 tokens",
            Of("concat", f"token_ms_{at(LARGE)}"),
            Of("forks", f"token_ms_{at(LARGE)}"),
            at_least=1.5,
            how="paired",
        ),
        Required(
            "fused ops alone make it faster: 8 beams behind 512 tokens",
            Of("forks", f"token_ms_{at(SMALL)}"),
            Of("engine", f"token_ms_{at(SMALL)}"),
            at_least=1.1,
            how="paired",
        ),
        Required(
            "over codes, all layers as one call: 8 beams behind 512 tokens",
            Of("concat-codes", f"token_ms_{at(SMALL)}"),
            Of("program", f"token_ms_{at(SMALL)}"),
            at_least=2.0,
            how="paired",
        ),
        Required(
            "over codes, 8 beams behind 2,048 tokens: what the paper has at most",
            Of("concat-codes", f"token_ms_{at(LARGE)}"),
            Of("program", f"token_ms_{at(LARGE)}"),
            at_least=7.0,
            how="paired",
        ),
        *(
            Required(
                f"KV as prompt + beams * response, at most 5 % more: {p[1]} beams behind {p[0]} tokens",
                Of("engine", f"kv_of_formula_{at(p)}"),
                at_most=105.0,
                how="every",
            )
            for p in POINTS
        ),
        Required(
            "KV as prompt + beams * response where responses are long: 129 tokens",
            Of("program", "kv_of_formula_long"),
            at_most=105.0,
            how="every",
        ),
        *(
            Required(
                f"next to nothing is copied: {p[1]} beams behind {p[0]} tokens",
                Of("engine", f"copied_mb_{at(p)}"),
                Of("concat", f"copied_mb_{at(p)}"),
                at_most=0.05,
                how="every",
            )
            for p in POINTS
        ),
        *(
            Required(
                f"tokens a second in the same KV higher by four fifths of the prompts that it holds, {kind}",
                Of(arm, "capped_tokens_per_s"),
                Of(baseline, "capped_tokens_per_s"),
                at_least=0.8 * capped(NEW)[1],
                how="paired",
                out_of_reach=reason,
            )
            for arm, baseline, kind, reason in (
                ("engine", "concat", "float32", "products of more than sixteen rows are bound by arithmetic here"),
                ("program", "concat-codes", "codes", ""),
            )
        ),
        Required(
            "fewer launches in float32, where layers are called part by part",
            Of("concat", "launches"),
            Of("engine", "launches"),
            at_least=1.2,
        ),
        Required(
            "a twentieth of them over codes",
            Of("concat-codes", "launches"),
            Of("program", "launches"),
            at_least=20.0,
        ),
    )
    # The correctness check has used every kernel by then.
    warmup = 0
    seconds = 360.0
    sources = (
        "millstream.bench.modules",
        "millstream.bench.launches",
        "millstream.memory.ledger",
        "millstream.memory.blocks",
        "millstream.decode.methods.autoregressive.device",
        "millstream.models.program",
        "millstream.ops.cpu.elementwise",
        "millstream.ops.cpu/elementwise.cpp",
        "millstream.ops.attention._native",
        "millstream.ops.cpu/attention.h",
        "millstream.ops.cpu/paged_attention.cpp",
        "millstream.ops.cpu/program.cpp",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench import data
        from millstream.bench.modules import Modules

        self.ids = itertools.count(1)
        every = (SMALL,) if ctx.quick else POINTS
        few = tuple(point for point in (SMALL, LARGE) if point in every)
        self.points = {arm.name: every if arm.name in ("concat", "engine") else few for arm in self.arms}
        self.new = ctx.size(NEW, QUICK_NEW)
        self.models = {arm: self._assembled(arm) for arm in ENGINES}
        decoders = {kind: self.models[arm].built.runner.decoder for arm, kind in ENGINES.items()}
        self.modules = {arm: Modules(decoders[kind]) for arm, kind in MODULES.items()}
        self.pool = self.models["engine"].tokenizer.encode(data.text("wikitext2-test")[:200_000])
        # What the first arm of a pair found, by kind and point.
        self.told: dict[tuple[str, tuple[int, int]], list[tuple[float, list[int]]]] = {}
        self.prompts: dict[tuple[str, int], Any] = {}
        for arm, prompt in itertools.product(MODULES, dict.fromkeys(prompt for prompt, _ in every)):
            ctx.say(f"{arm}: a prompt of {prompt} tokens")
            self.prompts[(arm, prompt)] = self.modules[arm].prompt(self._text(prompt))
        self.launched = {arm.name: self._launches(arm.name) for arm in self.arms}

    def _assembled(self, arm: str, model: str = MODEL, size: int = BLOCKS) -> Any:
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig, RunnerConfig
        from millstream.engine.assemble import assemble

        cache = CacheConfig(kv=Choice("plain"), block_size=BLOCK_SIZE, blocks=size, prefix=Choice("none"))
        return assemble(
            model,
            EngineConfig(
                model=ModelConfig(weights="blocks" if ENGINES[arm] == "codes" else "dense"),
                cache=cache,
                runner=RunnerConfig(attention="cpu-paged", ops="ref" if arm == "forks" else "auto"),
            ),
        )

    def _text(self, length: int, place: int = 0) -> list[int]:
        start = place * max(PROMPTS)
        return list(self.pool[start : start + length])

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {
            "model": self.models["engine"].source.checksum().encode(),
            "text": data.find("wikitext2-test"),
            "points": repr((self.points, self.new, LONG_NEW, BLOCK_SIZE)).encode(),
        }

    def check(self, ctx: Context) -> CheckResult:
        """Beams that part early and often, and a model with windows and norms of q and k, find the same everywhere."""
        from millstream.bench.modules import Modules, beam_search

        rows = []
        prompt, width, new = self._text(100, 5), 8, ctx.size(33, 16)
        modules = self.modules["concat"]
        want = beam_search(modules, *modules.prompt(prompt), width, new).beams
        for arm in ("forks", "engine"):
            got = self._search(arm, self.models[arm], [prompt], width, new)
            rows.append(_same(f"{arm}: 8 beams behind 100 tokens", got.beams[0], want))
        windowed = self._assembled("engine", WINDOWED, 256)
        ids = windowed.tokenizer.encode(windowed.tokenizer.decode(self._text(1200, 6)))[:600]
        modules, new = Modules(windowed.built.runner.decoder), ctx.size(17, 6)
        want = beam_search(modules, *modules.prompt(ids), 4, new).beams
        got = self._search("engine", windowed, [ids], 4, new)
        rows.append(_same(f"engine: {WINDOWED}, 4 beams behind {len(ids)} tokens, windows of 512", got.beams[0], want))
        return CheckResult(tuple(rows))

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        out = {"launches": float(self.launched[arm.name])}
        for point in self.points[arm.name]:
            found = self._concat(ctx, arm.name, point) if arm.name in MODULES else self._engine(ctx, arm.name, point)
            out.update({f"{name}_{at(point)}": value for name, value in found.items()})
        if self.points[arm.name] == POINTS:
            out["growth_width"] = out[f"token_ms_{at(LARGE)}"] / out[f"token_ms_{at((LARGE[0], WIDTHS[0]))}"]
            out["growth_prompt"] = out[f"token_ms_{at(LARGE)}"] / out[f"token_ms_{at(SMALL)}"]
        if arm.name in MODULES:
            # The beams of one prompt fit, and when they are done those of another take their place.
            out["capped_prompts"] = 1.0
            out["capped_tokens_per_s"] = 1000 * SMALL[1] / out[f"token_ms_{at(SMALL)}"]
        elif arm.name != "forks" and not ctx.quick:
            out.update(self._capped(ctx, arm.name))
        if arm.name == "program" and not ctx.quick:
            ran = self._search(arm.name, self.models[arm.name], [self._text(SMALL[0])], SMALL[1], LONG_NEW)
            out["kv_of_formula_long"] = 100 * ran.most / blocks(*SMALL, LONG_NEW)
            out["copied_mb_long"] = ran.copied_bytes / len(ran.step_s) / 1e6
        return out

    def _concat(self, ctx: Context, arm: str, point: tuple[int, int]) -> dict[str, float]:
        from millstream.bench.modules import beam_search

        prompt, width = point
        logits, cache = self.prompts[(arm, prompt)]
        found = beam_search(self.modules[arm], logits, cache, width, self.new)
        self._told(ctx, arm, point, found.beams)
        formula = blocks(prompt, width, self.new) * self._page_bytes(self.models["engine"])
        return {
            "token_ms": 1000 * statistics.median(found.step_s),
            "kv_mb": found.kv_bytes / 1e6,
            "kv_of_formula": 100 * found.kv_bytes / formula,
            "copied_mb": found.copied_bytes / len(found.step_s) / 1e6,
        }

    def _engine(self, ctx: Context, arm: str, point: tuple[int, int]) -> dict[str, float]:
        prompt, width = point
        model = self.models[arm]
        ran = self._search(arm, model, [self._text(prompt)], width, self.new)
        self._told(ctx, arm, point, ran.beams[0])
        ctx.expect(f"{arm}: every step has all beams, and none gave way", len(ran.step_s) == self.new - 1)
        each = self._page_bytes(model)
        ctx.expect(
            f"{arm}: at most one block a beam is copied in a step",
            ran.copied_bytes <= width * each * self.new,
            f"{ran.copied_bytes} bytes, {width} beams",
        )
        return {
            "token_ms": 1000 * statistics.median(ran.step_s),
            "kv_mb": ran.most * each / 1e6,
            "kv_of_formula": 100 * ran.most / blocks(prompt, width, self.new),
            "copied_mb": ran.copied_bytes / len(ran.step_s) / 1e6,
        }

    def _capped(self, ctx: Context, arm: str) -> dict[str, float]:
        prompt, width = SMALL
        cap, prompts = capped(self.new)
        texts = [self._text(prompt, place) for place in range(prompts)]
        ran = self._search(arm, self.models[arm], texts, width, self.new, cap)
        ctx.expect(f"{arm}: {prompts} prompts at once in {cap} blocks", bool(ran.step_s) and not ran.preemptions)
        return {
            "capped_prompts": float(prompts),
            "capped_tokens_per_s": prompts * width / statistics.median(ran.step_s),
        }

    def _told(self, ctx: Context, arm: str, point: tuple[int, int], beams: list[tuple[float, list[int]]]) -> None:
        """Where inputs are rounded to 8 bits, a last digit may change a beam's course, and with it all that follows:
        there the modules are asked what they say of the very beams that the program found."""
        kind = (MODULES | ENGINES)[arm]
        first = self.told.setdefault((kind, point), beams)
        row = _same(f"{arm}: beams at {at(point)}", beams, first)
        if arm == "program":
            logits, cache = self.prompts[("concat-codes", point[0])]
            said = self.modules["concat-codes"].score(logits, cache, [tokens for _, tokens in beams])
            length = len(beams[0][1])
            off = max(abs(score - other) / length for (score, _), other in zip(beams, said, strict=True))
            row = CheckRow(
                f"{arm}: logprobs of its beams at {at(point)}",
                off <= CODES_ERROR,
                f"by the modules over the same codes off by at most {off:.1e} a token; of {row.detail}",
            )
        elif kind == "codes":
            return
        ctx.expect(row.name, row.passed, row.detail)

    def _search(
        self, arm: str, model: Any, prompts: list[list[int]], width: int, new: int, size: int | None = None
    ) -> Ran:
        """Beams of all prompts at once, in `size` blocks (None: all that there are)."""
        from millstream.bench.drive import drive
        from millstream.engine.assemble import build_engine
        from millstream.ops import table

        composition = Choice("splitfuse", {"budget": max(PROMPTS)})
        meters = (composition, Choice("seats", {"max_rows": 256}), Choice("kv-blocks"))
        held = model.resolved.blocks if size is None else dict.fromkeys(model.resolved.blocks, size)
        resolved = replace(model.resolved, meters=meters, blocks=held)
        runner = _Watched(model.built.runner)
        engine = build_engine(runner, model.spec, model.tokenizer, model.resolved.config, resolved)
        runner.ledger = engine.scheduler.ledger
        pages = model.built.runner.pages.values()
        before = sum(one.copied.move_bytes + one.copied.gather_bytes for one in pages)
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        decode = Choice("beam", {"width": width})
        requests = [Request(next(self.ids), (Tokens(tuple(ids)),), params, decode=decode) for ids in prompts]
        scores: dict[tuple[int, int], float] = {}

        def keep(chunk: Any) -> None:
            scores[(chunk.request_id, chunk.index)] = chunk.cumulative_logprob

        # Which product a matrix takes is asked anew for each.
        with table.use("ref") if arm == "forks" else nullcontext():
            run = drive(engine, requests, clients=len(requests), keep=keep)
        copied = sum(one.copied.move_bytes + one.copied.gather_bytes for one in pages) - before
        if engine.scheduler.ledger.free() != engine.scheduler.ledger.total():
            raise AssertionError(f"{arm}: blocks are held by nobody")
        everyone = len(requests) * width
        full = [
            seconds
            for seconds, rows, tokens in zip(run.step_s, run.rows, run.tokens, strict=True)
            if rows == tokens == everyone
        ]
        beams = [
            [(scores[(request.id, one.index)], one.tokens) for one in run.timelines if one.request.id == request.id]
            for request in requests
        ]
        return Ran(beams, full, runner.most, copied, sum(one.preemptions for one in run.timelines))

    def _launches(self, arm: str) -> float:
        """Of a step of 8 beams: what twelve tokens take over what four take, by their number."""
        from millstream.bench.launches import launches
        from millstream.bench.modules import beam_search

        prompt, width = self._text(64), SMALL[1]

        def search(new: int) -> object:
            if arm in MODULES:
                modules = self.modules[arm]
                return beam_search(modules, *modules.prompt(prompt), width, new)
            return self._search(arm, self.models[arm], [prompt], width, new)

        few, many = (launches(partial(search, new)).total for new in (4, 12))
        return (many - few) / 8

    @staticmethod
    def _page_bytes(model: Any) -> int:
        """Of one block, as it is allocated."""
        return sum((one.k.nbytes + one.v.nbytes) // one.num_blocks for one in model.built.runner.pages.values())


class _Watched:
    """A runner, and the most blocks that were held when it was given a plan: never are there more within a step."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.most = runner, 0
        self.ledger: Any = None
        self.capacity, self.collect, self.close = runner.capacity, runner.collect, runner.close

    def launch(self, plan: Any) -> Any:
        self.most = max(self.most, self.ledger.stats()["used_blocks"])
        return self.runner.launch(plan)


def _same(name: str, got: list[tuple[float, list[int]]], want: list[tuple[float, list[int]]]) -> CheckRow:
    equal = sum(one[1] == other[1] for one, other in zip(got, want, strict=True))
    off = max(abs(one[0] - other[0]) for one, other in zip(got, want, strict=True))
    return CheckRow(
        name,
        equal == len(want) and off <= SCORE_ERROR,
        f"{equal} of {len(want)} beams of {len(want[0][1])} tokens equal, summed logprobs off by at most {off:.1e}",
    )


PLUGIN = IntelGpu
CARD = Card("intel-gpu", "Beams over forks and fused ops against modules with a concatenated cache", paper=4)
