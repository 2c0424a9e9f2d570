"""Hydragen against paged attention that shares blocks: one prefix, and a tree of them (Juravsky et al., 2024).

All arms run the same kernels over the same block tables, in which rows hold what they share in the same blocks: "paged"
reads it once for each row, "one-level" reads once what all rows begin with, "tree" reads each stretch once for those
that share it, level by level. Nothing but the order of the work differs, so outputs are held to be equal to the bit.

Whole decode steps of SmolLM2 are computed over and over from the same keys and values (`bench/replay.py`), with weights
in blocks, so that attention is as large a part of a step as it gets here; over float32 pages and over pages of bytes.
The ceiling is a step whose rows have their own 128 tokens only, which is what a prefix that costs nothing would leave.

The paper's prefixes cost next to nothing because a tensor core multiplies hundreds of times faster than memory delivers
keys. A CPU core multiplies about as fast as its caches deliver keys for a handful of queries: what sharing saves is the
reading, and the products stay.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core.cache import ALL_LEVELS
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
BLOCK_SIZE = 64
ROWS, OWN, QUICK_OWN = 32, 128, 64
PREFIXES, QUICK_PREFIXES = (256, 512, 1024, 2048, 4096), (256, 4096)
# Of the tree: what all begin with, what each of some begins with behind it, and how many of these there are.
ROOT, BRANCH, BRANCHES = 512, 1024, 4
KV = {"float32": "plain", "bytes": "int8"}
LEVELS = {"paged": 0, "one-level": 1, "tree": ALL_LEVELS}
# Steps in which there is little or nothing to gain.
HARD = {
    "alone": "one row of 4,224 tokens",
    "pair": "two rows behind 128 tokens",
    "short": "32 rows behind 64 tokens",
    "strangers": "32 rows that share nothing",
}
PRODUCTS = "the products of all rows with the prefix remain, and a core here is bound by these, not by reading"
# Blocks for the check through the engine; the others are laid out by hand.
SERVED_BLOCKS = 160


class Hydragen(Experiment):
    name = "hydragen"
    paper = 25
    title = "Shared prefixes read once, level by level, against once a row"
    arms = (
        Arm("paged", "each row reads the shared blocks itself", ("attention:cpu-paged", "attention:cpu-int8")),
        Arm("one-level", "what all rows begin with is read once", ("attention:cpu-paged", "attention:cpu-int8")),
        Arm("tree", "each stretch is read once for those that share it", ("attention:cpu-paged", "attention:cpu-int8")),
    )
    metrics = (
        *(
            Metric(f"tokens_per_s_{kind}_{s}", "tokens/s", "higher", f"32 rows behind {s} tokens, {kind} pages")
            for kind in KV
            for s in PREFIXES
        ),
        *(
            Metric(f"kept_{kind}", "%", "higher", f"of the tokens/s behind 256 tokens, behind 4,096; {kind} pages")
            for kind in KV
        ),
        *(
            Metric(
                f"ceiling_{kind}",
                "%",
                "higher",
                f"of the tokens/s with no prefix at all, behind 4,096 tokens; {kind} pages",
            )
            for kind in KV
        ),
        *(
            Metric(
                f"tree_tokens_per_s_{kind}",
                "tokens/s",
                "higher",
                f"32 rows behind 512 tokens, 8 each behind 1,024 more; {kind} pages",
            )
            for kind in KV
        ),
        *(
            Metric(f"{name}_s_{kind}", "s", "lower", f"step of {what}, {kind} pages")
            for kind in KV
            for name, what in HARD.items()
        ),
    )
    claim = Claim(
        "up to 32 times the throughput of vLLM (CodeLlama-13B, batches of a thousand, prefix 16k); from a prefix of 1k "
        "to 16k it loses less than 15 % where others lose over 90 %; a second level takes a further 55 % of the time",
        (
            Figure(
                "throughput over paged attention at the longest prefix, float32 pages",
                Of("tree", "tokens_per_s_float32_4096"),
                Of("paged", "tokens_per_s_float32_4096"),
                32.0,
            ),
            Figure("kept from the shortest to the longest prefix, %", Of("tree", "kept_float32"), None, 85.0),
            Figure(
                "two levels over one on a tree",
                Of("tree", "tree_tokens_per_s_float32"),
                Of("one-level", "tree_tokens_per_s_float32"),
                2.2,
            ),
        ),
    )
    required = (
        Required(
            "loses less than 20 % from a prefix of 256 to 4,096",
            Of("tree", "kept_float32"),
            at_least=80.0,
            out_of_reach=PRODUCTS,
        ),
        Required(
            "where paged attention loses over 60 %",
            Of("paged", "kept_float32"),
            at_most=40.0,
        ),
        Required(
            "at least 1.5 times the throughput of paged attention at 4,096, float32 pages",
            Of("tree", "tokens_per_s_float32_4096"),
            Of("paged", "tokens_per_s_float32_4096"),
            at_least=1.5,
            how="paired",
        ),
        Required(
            "two levels beat one on a tree, float32 pages",
            Of("tree", "tree_tokens_per_s_float32"),
            Of("one-level", "tree_tokens_per_s_float32"),
            at_least=1.05,
            how="paired",
        ),
        *(
            Required(
                f"never slower by more than 5 %: {what}, {kind} pages",
                Of("tree", f"{name}_s_{kind}"),
                Of("paged", f"{name}_s_{kind}"),
                at_most=1.05,
                how="paired",
            )
            for kind in KV
            for name, what in HARD.items()
        ),
        Required(
            "nor where there is much to share: 32 rows behind 256 tokens of bytes",
            Of("paged", "tokens_per_s_bytes_256"),
            Of("tree", "tokens_per_s_bytes_256"),
            at_most=1.05,
            how="paired",
        ),
    )
    warmup = 0
    seconds = 480.0
    sources = (
        "millstream.ops.attention._native",
        "millstream.ops.cpu/attention.h",
        "millstream.ops.cpu/attention8.h",
        "millstream.ops.cpu/paged_attention.cpp",
        "millstream.ops.cpu/program.cpp",
        "millstream.bench.replay",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench import data
        from millstream.bench.replay import Replay
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine.assemble import assemble

        self.ids = itertools.count(1)
        self.prefixes = QUICK_PREFIXES if ctx.quick else PREFIXES
        self.own = ctx.size(OWN, QUICK_OWN)
        flat = max(self.prefixes) + len(self.prefixes) * ROWS * OWN
        tree = ROOT + BRANCHES * BRANCH + ROWS * OWN
        hard = 4096 + 128 + 64 + 6 * ROWS * OWN
        blocks = SERVED_BLOCKS + (flat + tree + hard) // BLOCK_SIZE
        self.models: dict[str, Any] = {}
        self.replays: dict[str, Replay] = {}
        self.steps: dict[tuple[str, str], Any] = {}
        for kind, kv in KV.items():
            cache = CacheConfig(kv=Choice(kv), block_size=BLOCK_SIZE, blocks=blocks)
            model = self.models[kind] = assemble(MODEL, EngineConfig(model=ModelConfig(weights="blocks"), cache=cache))
            if not self.replays:
                self.pool = model.tokenizer.encode(data.text("wikitext2-test")[:600_000])
            replay = self.replays[kind] = Replay(model.built.runner, SERVED_BLOCKS)
            trunk = None
            for s in self.prefixes:
                trunk = replay.trunk(self.pool[trunk.length if trunk else 0 : s], trunk)
                self.steps[(kind, str(s))] = replay.step([(trunk, self._own(row)) for row in range(ROWS)])
            self._lay_out_tree(kind, replay)
            self._lay_out_hard(kind, replay, trunk)
            ctx.say(f"{kind}: {len(self.steps)} batches are laid out")

    def _own(self, row: int) -> list[int]:
        return self.pool[10_000 + row * OWN : 10_000 + row * OWN + self.own]

    def _lay_out_tree(self, kind: str, replay: Any) -> None:
        root = replay.trunk(self.pool[5000 : 5000 + ROOT])
        rows = []
        for branch in range(BRANCHES):
            at = 20_000 + branch * BRANCH
            trunk = replay.trunk(self.pool[at : at + BRANCH], root)
            # Suffixes of different lengths, as they are when requests have come one by one.
            rows += [(trunk, self._own(row)[: self.own - 3 * row]) for row in range(ROWS // BRANCHES)]
        self.steps[(kind, "tree")] = replay.step(rows)

    def _lay_out_hard(self, kind: str, replay: Any, longest: Any) -> None:
        from millstream.bench.replay import Trunk

        self.steps[(kind, "alone")] = self.steps[(kind, str(max(self.prefixes)))].first(1)
        pair, short = replay.trunk(self.pool[100 : 100 + 128]), replay.trunk(self.pool[300 : 300 + 64])
        self.steps[(kind, "pair")] = replay.step([(pair, self._own(row)) for row in range(2)])
        self.steps[(kind, "short")] = replay.step([(short, self._own(row)) for row in range(ROWS)])
        self.steps[(kind, "strangers")] = replay.step([(Trunk(), self._own(row)) for row in range(ROWS)])

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {
            "model": self.models["float32"].source.checksum().encode(),
            "text": data.find("wikitext2-test"),
            "batches": repr((self.prefixes, ROWS, self.own, ROOT, BRANCH, BRANCHES)).encode(),
        }

    def check(self, ctx: Context) -> CheckResult:
        """Every arm gives the same bits in every batch, attention is attention, and so it stays as rows come and go."""
        import torch

        from millstream.core import registry

        rows = []
        for kind, replay in self.replays.items():
            wrong, off, tokens = [], 0.0, 0
            for (of, name), step in self.steps.items():
                if of != kind:
                    continue
                seen = [replay.attention(step, levels)[1] for levels in LEVELS.values()]
                said = [replay.tokens(step, levels) for levels in LEVELS.values()]
                off = max(off, *(float((one - seen[0]).abs().max()) for one in seen[1:]))
                tokens += len(said[0])
                if not all(torch.equal(one, seen[0]) for one in seen) or not all(one == said[0] for one in said):
                    wrong.append(name)
            rows.append(
                CheckRow(
                    f"{kind} pages: attention and tokens of all arms",
                    not wrong,
                    f"largest difference {off:.1e}, {tokens} tokens; batches that differ: {', '.join(wrong) or 'none'}",
                )
            )
        replay, runner = self.replays["float32"], self.models["float32"].built.runner
        step = self.steps[("float32", "tree")].first(ctx.size(16, 4))
        got = replay.attention(step, ALL_LEVELS)[1]
        natively, runner.backends = runner.backends, {"full": registry.make("attention", "torch-ref")}
        want = replay.attention(step, 0)[1]
        runner.backends = natively
        off = float((got - want).abs().max())
        rows.append(CheckRow("the tree against attention in plain torch", off <= 1e-4, f"largest difference {off:.1e}"))
        rows += [self._check_served(ctx, kind) for kind in KV]
        return CheckResult(tuple(rows))

    def _check_served(self, ctx: Context, kind: str) -> CheckRow:
        """Requests of a tree with lengths of their own, through the engine: rows join and leave at every step."""
        from millstream.bench.drive import drive
        from millstream.engine.assemble import build_engine

        model, draw = self.models[kind], random.Random(ctx.seed)
        shapes = [(draw.choice((300, 700, 1000)), draw.randrange(3, 90), draw.randrange(4, 24)) for _ in range(12)]
        told = []
        for levels in LEVELS.values():
            model.built.runner.prefix_levels = levels
            resolved = replace(model.resolved, blocks={"full": SERVED_BLOCKS}, max_context=2048)
            engine = build_engine(model.built.runner, model.spec, model.tokenizer, model.resolved.config, resolved)
            requests = []
            for place, (shared, own, output) in enumerate(shapes):
                ids = (*self.pool[:shared], *self.pool[30_000 + 100 * place : 30_000 + 100 * place + own])
                params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
                requests.append(Request(next(self.ids), (Tokens(ids),), params))
            run = drive(engine, requests, clients=5)
            told.append([timeline.tokens for timeline in run.timelines])
        return CheckRow(
            f"{kind} pages: texts of {len(shapes)} requests that come and go",
            all(one == told[0] for one in told),
            f"{sum(map(len, told[0]))} tokens, the same in {sum(one == told[0] for one in told)} of {len(told)} arms",
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        out = {}
        for (kind, name), step in self.steps.items():
            count = ctx.size(4, 1) if len(step.extends) > 8 else ctx.size(20, 5)
            seconds = self.replays[kind].step_s(step, LEVELS[arm.name], count)
            rate = len(step.extends) / seconds
            if name in HARD:
                out[f"{name}_s_{kind}"] = seconds
            elif name == "tree":
                out[f"tree_tokens_per_s_{kind}"] = rate
            else:
                out[f"tokens_per_s_{kind}_{name}"] = rate
        for kind in KV:
            last = out[f"tokens_per_s_{kind}_{max(self.prefixes)}"]
            out[f"kept_{kind}"] = 100 * last / out[f"tokens_per_s_{kind}_{min(self.prefixes)}"]
            # Rows that share nothing have their own tokens only: no prefix at all.
            out[f"ceiling_{kind}"] = 100 * last * out[f"strangers_s_{kind}"] / ROWS
        return out


PLUGIN = Hydragen
CARD = Card("hydragen", "Shared prefixes read once, level by level, against once a row", paper=25)
