"""Weights in 6-bit floats against 32, 16, 8, 5 and 4 bits (FP6-LLM).

The matrices of all layers of one model, multiplied one after the other as a decode step does, by 1, 4 and 16 rows: at
few rows the time should follow the bytes. Beyond some number of rows a format that computes less for each product wins;
the experiment finds where. Quality is the perplexity of WikiText-2 with every matrix rounded to nearest in the format,
embedding and head included. The file of this model stores its layers in 4 bits with a scale and a minimum for every 32
inputs, so the 4-bit arm gives back what is stored there and says nothing of rounding to 4 bits. For that there is an
arm of 4-bit codes with one scale for each output, as the small floats have it, whose quality alone is measured.

bfloat16 is torch's own product. Its activations are rounded as well, and those of 8 and 4 bits to 8 bits; with small
floats they stay float32. The shapes of Qwen2.5-Coder-1.5B hold random numbers: they are there for the speed only.
"""

from __future__ import annotations

import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millstream.core.registry import Card
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
# How each arm's weights are kept; bfloat16 is dense.
WEIGHTS = {
    "fp32": "dense",
    "int8": "block8",
    "int4": "block4",
    "fp6": "fp6-e3m2",
    "fp6-e2m3": "fp6-e2m3",
    "fp5": "fp5-e2m2",
}
FLOATS = ("fp6", "fp6-e2m3", "fp5")
ROWS = (1, 4, 16)
# Outputs and inputs of Qwen2.5-Coder-1.5B's MLP, and how many of each are there, more than a cache holds.
QWEN = ((8960, 1536), (1536, 8960))
QWEN_COPIES = 3
SWEEP = (8, 16, 24, 32, 48, 64, 96, 128, 256)
QUICK_SWEEP = (8, 16, 32, 64, 128, 256)
WINDOW = 512
# Nothing is shared: what was computed with other weights must not be found again.
CACHE = {"kv": "plain", "bytes": "1GiB", "prefix": "none"}


class Fp6Llm(Experiment):
    name = "fp6-llm"
    paper = 32
    title = "Weights in 6-bit floats: time by bytes at few rows, quality near the whole"
    arms = (
        Arm("fp32", "dense float32", ("weights:dense",)),
        Arm("bf16", "dense bfloat16, torch's product", ("weights:dense",)),
        Arm("int8", "8-bit codes, a scale for 32 inputs, 9 bits a weight", ("weights:block8",)),
        Arm("int4", "4-bit codes, a scale and a minimum for 32 inputs, 5 bits a weight", ("weights:block4",)),
        Arm("int4-row", "4-bit codes rounded to nearest, a scale for each output; quality alone"),
        Arm("fp6", "e3m2, a scale for each output", ("weights:fp6-e3m2",)),
        Arm("fp6-e2m3", "e2m3, a scale for each output", ("weights:fp6-e2m3",)),
        Arm("fp5", "e2m2, a scale for each output", ("weights:fp5-e2m2",)),
    )
    metrics = (
        Metric("m1_s", "s", "lower", "all matrices of the layers times one row"),
        Metric("m4_s", "s", "lower"),
        Metric("m16_s", "s", "lower"),
        Metric("m1_bytes_per_s", "bytes/s", "higher", "bytes of weights read in a second, at one row"),
        Metric("qwen_m1_s", "s", "lower", "matrices of Qwen2.5-Coder-1.5B's shape, random, times one row"),
        Metric("weight_bytes", "bytes", "lower", "of the matrices of the layers"),
        Metric("perplexity", "", "lower"),
        Metric("bf16_wins_rows", "", "higher", "rows from which bfloat16 is faster; 512: none up to 256"),
        Metric("fp32_wins_rows", "", "higher", "rows from which float32 is faster; 512: none up to 256"),
    )
    claim = Claim(
        "Linear layers up to 2.6 times faster than 16-bit floats and 1.9 times faster than 8-bit weights; LLaMA-70B on "
        "one GPU at 1.69 to 2.65 times the throughput of 16-bit floats on two",
        (
            Figure("products of few rows against 16-bit floats", Of("bf16", "m1_s"), Of("fp6", "m1_s"), 2.6),
            Figure("and against 8-bit weights", Of("int8", "m1_s"), Of("fp6", "m1_s"), 1.9),
        ),
    )
    required = (
        Required("one row: at most 0.35 of float32's time", Of("fp6", "m1_s"), Of("fp32", "m1_s"), at_most=0.35),
        Required("one row: no slower than 8 bits", Of("fp6", "m1_s"), Of("int8", "m1_s"), at_most=1.0),
        Required(
            "one row: no faster than 4 bits, to within a tenth", Of("fp6", "m1_s"), Of("int4", "m1_s"), at_least=0.9
        ),
        Required(
            "Qwen's shapes, one row: at most 0.35 of float32's time",
            Of("fp6", "qwen_m1_s"),
            Of("fp32", "qwen_m1_s"),
            at_most=0.35,
        ),
        Required("faster than bfloat16 up to 8 rows", Of("fp6", "bf16_wins_rows"), at_least=9),
        Required("perplexity at least float32's", Of("fp6", "perplexity"), Of("fp32", "perplexity"), at_least=1.0),
        Required(
            "and within 1 % of it",
            Of("fp6", "perplexity"),
            Of("fp32", "perplexity"),
            at_most=1.01,
            out_of_reach="a model of 135M parameters loses more by the same rounding than the 7B and more of the paper",
        ),
        Required("at most that of 5 bits", Of("fp6", "perplexity"), Of("fp5", "perplexity"), at_most=1.0),
        Required(
            "at most that of 4-bit codes rounded to nearest, a scale for each output as well",
            Of("fp6", "perplexity"),
            Of("int4-row", "perplexity"),
            at_most=1.0,
        ),
    )
    # Every time that is taken has a pass before it that is not.
    warmup = 0
    seconds = 480.0
    sources = (
        "millstream.ops.ref.fpx",
        "millstream.ops.cpu/fpx.cpp",
        "millstream.ops.cpu.fpx",
        "millstream.formats.weights._fpx",
        "millstream.models.packed_as",
    )

    def open(self, ctx: Context) -> None:
        import torch

        from millstream.bench import data
        from millstream.core import registry
        from millstream.engine.llm import LLM

        self.text = data.text("wikitext2-test")
        self.forms: dict[str, Any] = {}
        self.matrices: dict[str, list[Any]] = {}
        self.shaped: dict[str, list[Any]] = {}
        self.perplexity: dict[str, float] = {}
        generator = torch.Generator().manual_seed(ctx.seed)
        random_ones = [torch.randn(shape, generator=generator) * 0.02 for shape in QWEN]
        windows = ctx.size(16, 1)
        for arm, weights in WEIGHTS.items():
            ctx.say(f"{arm}: loading, perplexity of {windows} windows")
            with LLM(MODEL, weights=weights, max_context=WINDOW, cache=CACHE) as llm:
                ids = llm.tokenizer.encode(self.text[: 8 * windows * WINDOW])
                texts = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(windows)]
                self.perplexity[arm] = _perplexity(llm, texts)
                decoder = llm.assembled.built.runner.decoder
                self.source = llm.assembled.source.checksum()
                linears = [linear for layer in decoder.layers for linear in layer.linears()]
                self.matrices[arm] = [linear.packed for linear in linears]
                if arm == "fp32":
                    self.perplexity["int4-row"] = self._by_row(llm, texts, [decoder._embed.packed, *self.matrices[arm]])
            form = self.forms[arm] = registry.make("weights", weights)
            self.shaped[arm] = [_copy(form.pack(w)) for w in random_ones for _ in range(QWEN_COPIES)]
        dense = self.forms["bf16"] = self.forms["fp32"]
        for of in (self.matrices, self.shaped):
            of["bf16"] = [dense.pack(packed["weight"].bfloat16()) for packed in of["fp32"]]
        self.rows = {
            inputs: torch.randn(max(SWEEP), inputs, generator=generator)
            for inputs in {packed.shape[1] for of in (self.matrices, self.shaped) for packed in of["fp32"]}
        }

    def _by_row(self, llm: Any, texts: list[Any], matrices: list[Any]) -> float:
        """The perplexity with every matrix rounded to 4 bits, one scale an output; afterwards they are as before."""
        kept = [packed["weight"].clone() for packed in matrices]
        for packed, weight in zip(matrices, kept, strict=True):
            step = weight.abs().amax(1, keepdim=True) / 7
            packed["weight"].copy_((weight / step.clamp(min=1e-30)).round_().mul_(step))
        found = _perplexity(llm, texts)
        for packed, weight in zip(matrices, kept, strict=True):
            packed["weight"].copy_(weight)
        return found

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {"model": self.source.encode(), "text": data.find("wikitext2-test")}

    def check(self, ctx: Context) -> CheckResult:
        return CheckResult(
            (
                *(self._codes(arm) for arm in FLOATS),
                *(self._products(arm) for arm in FLOATS),
                *(self._sizes(arm) for arm in FLOATS),
                self._packing(ctx),
                self._memory(),
            )
        )

    def _codes(self, arm: str) -> CheckRow:
        """Every code through the product that is measured: rows of the identity times a matrix of all codes."""
        import torch

        from millstream.formats.weights.protocol import Packed
        from millstream.ops.ref.fpx import pack_codes

        form = self.forms[arm]
        bits = 1 + form.exponent + form.mantissa
        codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(2)[: 1 << bits].view(-1, 8)
        low, high = pack_codes(codes, bits)
        scale = torch.ones(codes.shape[0], dtype=torch.float16)
        packed = Packed(form.name, (codes.shape[0], 8), {"low": low, "high": high, "scale": scale})
        found = form.linear(torch.eye(8), packed).T
        wrong = sum(float(found[i // 8, i % 8]) != _decoded(i, form.exponent, form.mantissa) for i in range(1 << bits))
        return CheckRow(f"{arm}: every code decodes exactly", wrong == 0, f"{1 << bits} codes, {wrong} wrong")

    def _products(self, arm: str) -> CheckRow:
        """One, four and sixteen rows times real matrices, beside float32 over the same matrix written out."""
        form, worst = self.forms[arm], 0.0
        for packed in self.matrices[arm][:8]:
            weight = form.unpack(packed)
            for rows in ROWS:
                x = self.rows[packed.shape[1]][:rows]
                want = x @ weight.T
                found = form.linear(x, packed)
                if "bias" in packed.parts:
                    found = found - packed["bias"]
                worst = max(worst, float((found - want).norm() / want.norm()))
        return CheckRow(
            f"{arm}: products equal float32 over what the codes stand for",
            worst <= 1e-5,
            f"relative difference at most {worst:.1e}",
        )

    def _sizes(self, arm: str) -> CheckRow:
        form = self.forms[arm]
        bits = 1 + form.exponent + form.mantissa
        right = all(
            packed.nbytes - (packed["bias"].nbytes if "bias" in packed.parts else 0)
            == math.ceil(bits * packed.shape[0] * packed.shape[1] / 8) + 2 * packed.shape[0]
            for packed in self.matrices[arm]
        )
        return CheckRow(
            f"{arm}: {bits} bits a weight and 2 bytes a row, no more", right, f"{len(self.matrices[arm])} matrices"
        )

    def _packing(self, ctx: Context) -> CheckRow:
        import torch

        from millstream.ops.ref.fpx import pack_codes, unpack_codes

        draw, wrong, count = random.Random(ctx.seed), 0, 40
        for _ in range(count):
            outputs, inputs, bits = draw.randint(1, 100), draw.randint(1, 200), draw.choice((5, 6))
            codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
            wrong += not torch.equal(unpack_codes(*pack_codes(codes, bits), outputs, inputs), codes)
        return CheckRow(
            "packing and unpacking odd shapes is the identity", wrong == 0, f"{count} shapes, {wrong} wrong"
        )

    def _memory(self) -> CheckRow:
        """What memory a product takes beside its matrix: the matrix written out would show."""
        packed, form = self.shaped["fp6"][0], self.forms["fp6"]
        x = self.rows[packed.shape[1]][:16]
        form.linear(x, packed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        form.linear(x, packed)
        unit = 1 if sys.platform == "darwin" else 1024
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
        whole = 4 * packed.shape[0] * packed.shape[1]
        return CheckRow(
            "no product writes its matrix out",
            grown < whole / 20,
            f"peak memory grew by {grown:,} bytes, the matrix in float32 is {whole:,}",
        )

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        name = arm.name
        if name == "int4-row":
            return {"perplexity": self.perplexity[name]}
        out = {f"m{rows}_s": self._seconds(name, self.matrices[name], rows, 3) for rows in ROWS}
        weight_bytes = sum(packed.nbytes for packed in self.matrices[name])
        out["m1_bytes_per_s"] = weight_bytes / out["m1_s"]
        out["weight_bytes"] = float(weight_bytes)
        out["qwen_m1_s"] = self._seconds(name, self.shaped[name], 1, 2)
        if name in self.perplexity:
            out["perplexity"] = self.perplexity[name]
        if name in FLOATS:
            out |= self._crossovers(ctx, name)
        return out

    def _seconds(self, arm: str, matrices: list[Any], rows: int, passes: int) -> float:
        """Seconds of one pass over all matrices, the median of some after one that is not counted."""
        form = self.forms[arm]
        xs = {inputs: x[:rows].bfloat16() if arm == "bf16" else x[:rows] for inputs, x in self.rows.items()}
        taken = []
        for _ in range(passes + 1):
            start = time.perf_counter()
            for packed in matrices:
                form.linear(xs[packed.shape[1]], packed)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def _crossovers(self, ctx: Context, arm: str) -> dict[str, float]:
        """The first number of rows at which dense floats are faster over a few layers' matrices, side by side."""
        found: dict[str, float] = {}
        few = ctx.size(16, 4)
        for rows in QUICK_SWEEP if ctx.quick else SWEEP:
            took = {name: self._seconds(name, self.matrices[name][:few], rows, 3) for name in ("fp32", "bf16", arm)}
            for other in ("fp32", "bf16"):
                if took[other] < took[arm]:
                    found.setdefault(f"{other}_wins_rows", float(rows))
        for other in ("fp32", "bf16"):
            found.setdefault(f"{other}_wins_rows", 2.0 * SWEEP[-1])
        wins = ", ".join(f"{other} from {found[f'{other}_wins_rows']:.0f}" for other in ("bf16", "fp32"))
        ctx.say(f"{arm}: rows from which dense is faster: {wins}")
        return found


def _perplexity(llm: Any, texts: list[Any]) -> float:
    scores = llm.score(texts)
    return math.exp(-sum(s.logprob for s in scores) / sum(s.num_scored for s in scores))


def _copy(packed: Any) -> Any:
    """The same matrix in memory of its own."""
    return type(packed)(packed.format, packed.shape, {name: part.clone() for name, part in packed.parts.items()})


def _decoded(code: int, exponent: int, mantissa: int) -> float:
    """What one code stands for, by the definition."""
    e, m = (code >> mantissa) % (1 << exponent), code % (1 << mantissa)
    bias = 2 ** (exponent - 1) - 1
    size = (1 + m / 2**mantissa) * 2.0 ** (e - bias) if e else m / 2**mantissa * 2.0 ** (1 - bias)
    return -size if code >> (exponent + mantissa) else size


PLUGIN = Fp6Llm
CARD = Card("fp6-llm", "Weights in 6-bit floats against 32, 16, 8, 5 and 4 bits", paper=32)
