"""QServe's W4A8KV4 against float32, bfloat16, blocks and W8A8 (Lin et al., 2024, sections 4 to 6).

One model in six ways to keep its matrices. Quality: perplexity of WikiText-2's test text, calibrated on its training
text; what QoQ loses against what rounding to the nearest loses, and what SmoothAttention saves of what 4-bit keys
lose. Speed: tokens a second at one batch, and the products of all layers alone, from one row (bytes decide) to 64
(arithmetic does). Products are taken over all layers in turn, so that weights come from memory as in a step.

The paper dequantizes nothing before the product; so "dequantize, then multiply" is stood for by the float product
alone, which is less than that takes.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core import registry
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
# 4-bit keys and values are a format of their own; where this build has none, 8 bits take their place.
LOW_KV = "int4" if "int4" in registry.names("kv") else "int8"
_NO_KV4 = "" if LOW_KV == "int4" else "this build has no 4-bit KV format; 8 bits stand in its place"
BATCH = 32
# By what real lengths are divided, so that a run fits in minutes on two cores.
SHRINK, QUICK_SHRINK = 8, 24
ROWS = (1, 16, 64)

SERVED = ("float32", "bfloat16", "blocks", "w8a8", "w4a8")
KEPT_KV = {"float32": "plain", "bfloat16": "plain", "blocks": "int8", "w8a8": "int8", "w4a8": LOW_KV}


class QServe(Experiment):
    name = "qserve"
    paper = 27
    title = "4-bit weights, 8-bit activations and low-bit KV in integers against wider formats"
    arms = (
        Arm("float32", "matrices and KV in float32", ("weights:dense", "kv:plain")),
        Arm("bfloat16", "matrices and KV in bfloat16", ("weights:dense", "kv:plain")),
        Arm("blocks", "codes and scales as the GGUF file has them, KV in 8 bits", ("weights:block4", "kv:int8")),
        Arm("w8a8", "8-bit matrices, one scale an output, KV in 8 bits", ("weights:w8a8", "kv:int8")),
        Arm("w4a8", f"QoQ: progressive groups of 64 or 128, calibrated, KV {LOW_KV}", ("weights:w4a8", f"kv:{LOW_KV}")),
        Arm("w4a8-rtn", f"the same format rounded to nearest, KV {LOW_KV}", ("weights:w4a8", f"kv:{LOW_KV}")),
        Arm("kv-alone", f"float32 matrices, KV {LOW_KV}", (f"kv:{LOW_KV}",)),
        Arm("kv-smooth", f"the same after SmoothAttention, KV {LOW_KV}", (f"kv:{LOW_KV}",)),
    )
    metrics = (
        Metric("output_tokens_per_s", "tokens/s", "higher", f"at most {BATCH} requests inside at once"),
        Metric("layer_bytes", "bytes", "lower", "resident bytes of the layers' matrices"),
        Metric("kv_bytes_per_token", "bytes", "lower", "of all layers, scales included"),
        Metric("perplexity", "", "lower", "of WikiText-2's test text, a token of the model's"),
        Metric("perplexity_delta", "%", "lower", "perplexity over that of float32 with plain KV, less one"),
        *(Metric(f"product_{m}_ms", "ms", "lower", f"the products of all layers for {m} rows, no more") for m in ROWS),
    )
    claim = Claim(
        "1.2-1.4 times (Llama-3-8B on A100 and L40S) to 2.4-3.5 times (Qwen1.5-72B) the throughput of TensorRT-LLM at "
        "its best precision; WikiText-2 perplexity of Llama-3-8B 6.14 in 16 bits, 6.70 with QoQ in groups of 128",
        (
            Figure(
                "throughput over 8-bit weights and activations",
                Of("w4a8", "output_tokens_per_s"),
                Of("w8a8", "output_tokens_per_s"),
                1.2,
                3.5,
            ),
            Figure("perplexity over 16 bits", Of("w4a8", "perplexity"), Of("float32", "perplexity"), 1.09),
        ),
    )
    required = (
        Required(
            "QoQ loses less than rounding to nearest",
            Of("w4a8", "perplexity_delta"),
            Of("w4a8-rtn", "perplexity_delta"),
            at_most=0.9,
        ),
        Required(
            "SmoothAttention lowers what 4-bit KV alone loses",
            Of("kv-smooth", "perplexity_delta"),
            Of("kv-alone", "perplexity_delta"),
            at_most=0.95,
            elsewhere=_NO_KV4,
        ),
        Required(
            "layers take at most 0.57 of the bytes of 8-bit ones",
            Of("w4a8", "layer_bytes"),
            Of("w8a8", "layer_bytes"),
            at_most=0.57,
        ),
        Required(
            "KV takes a third of 16 bits or less",
            Of("w4a8", "kv_bytes_per_token"),
            Of("bfloat16", "kv_bytes_per_token"),
            at_most=1 / 3,
            elsewhere=_NO_KV4,
        ),
        Required(
            "one row: at most half the time of float32",
            Of("w4a8", "product_1_ms"),
            Of("float32", "product_1_ms"),
            at_most=0.5,
        ),
        Required(
            "one row: no more time than 8-bit weights, which are twice the bytes",
            Of("w4a8", "product_1_ms"),
            Of("w8a8", "product_1_ms"),
            at_most=1.0,
        ),
        Required(
            "one row: 8-bit weights no more time than 16-bit ones",
            Of("w8a8", "product_1_ms"),
            Of("bfloat16", "product_1_ms"),
            at_most=1.0,
        ),
        Required(
            "16 rows: less time than the float product that would follow dequantizing",
            Of("w4a8", "product_16_ms"),
            Of("float32", "product_16_ms"),
            at_most=0.9,
        ),
        Required(
            "64 rows: less time than the float product that would follow dequantizing",
            Of("w4a8", "product_64_ms"),
            Of("float32", "product_64_ms"),
            at_most=0.9,
        ),
        Required(
            "throughput at least 1.5 times that of float32",
            Of("w4a8", "output_tokens_per_s"),
            Of("float32", "output_tokens_per_s"),
            at_least=1.5,
        ),
    )
    # The correctness check and the perplexities have used every kernel by then.
    warmup = 0
    seconds = 600.0
    sources = (
        "millstream.formats.weights._channel",
        "millstream.formats.weights._progressive",
        "millstream.ops.ref.channel",
        "millstream.ops.cpu.channel",
        "millstream.ops.cpu/channel.h",
        "millstream.ops.cpu/program.cpp",
        "millstream.models.quantize",
        "millstream.models.packed",
    )

    def open(self, ctx: Context) -> None:
        from millstream.bench import data
        from millstream.models.opened import open_model
        from millstream.models.quantize.recipe import Recipe
        from millstream.models.quantize.run import float_tensors, quantize
        from millstream.models.quantize.save import save

        self.ids = itertools.count(1)
        opened = open_model(MODEL)
        tokenizer = opened.tokenizer()
        self.pool = tokenizer.encode(data.text("wikitext2-test")[:400_000])
        ctx.say("calibrating")
        calibration = tokenizer.encode(data.text("wikitext2-train")[: ctx.size(600_000, 100_000)])
        # The fewer tokens, the more roundings chosen one after the other fit them alone.
        qoq = Recipe("w4a8", samples=ctx.size(32, 6), length=ctx.size(512, 256), gptq=not ctx.quick)
        recipes = {"w8a8": Recipe.plain("w8a8"), "w4a8": qoq, "w4a8-rtn": Recipe.plain("w4a8")}
        spec, self.floats = float_tensors(opened.source)
        self.spec, self.calibration, self.qoq = spec, calibration, qoq
        self.paths = {}
        for name, recipe in recipes.items():
            made = quantize(spec, self.floats, recipe, calibration)
            self.paths[name] = ctx.scratch / name
            save(opened, *made, recipe, self.paths[name])
        self.source = opened.source
        self.models = {arm: self._assembled(arm) for arm in SERVED}
        shrink = ctx.size(SHRINK, QUICK_SHRINK)
        rows = [
            (max(4, p // shrink), max(2, o // shrink))
            for p, o in data.lengths("sharegpt-lengths")
            if 8 <= p <= 1024 and 8 <= o <= 512
        ]
        self.lengths = random.Random(ctx.seed).sample(rows, ctx.size(2 * BATCH, 12))
        ctx.say("perplexities")
        self.perplexity = self._perplexities(ctx)

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        from millstream.bench import data

        return {
            "model": self.source.checksum().encode(),
            "lengths": repr(self.lengths).encode(),
            "text": data.find("wikitext2-test"),
            "calibration": data.find("wikitext2-train"),
        }

    def _assembled(self, arm: str) -> Any:
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine.assemble import assemble

        model = ModelConfig(
            dtype="bfloat16" if arm == "bfloat16" else "float32", weights="blocks" if arm == "blocks" else "dense"
        )
        cache = CacheConfig(kv=Choice(KEPT_KV[arm]), blocks=256, prefix=Choice("none"))
        return assemble(str(self.paths.get(arm, MODEL)), EngineConfig(model=model, cache=cache))

    def _perplexities(self, ctx: Context) -> dict[str, float]:
        from millstream.models.decoder import build
        from millstream.models.load import load_model
        from millstream.models.quantize.run import changed
        from millstream.models.source import open_source

        decoders = {arm: self.models[arm].built.runner.decoder for arm in SERVED}
        decoders["w4a8-rtn"] = load_model(open_source(self.paths["w4a8-rtn"])).decoder
        # The piece that is about keys, alone, by the same windows.
        off = dict.fromkeys(("smooth_outputs", "reorder", "clip", "gptq"), False)
        recipe, smooth = replace(self.qoq, **off), dict(self.floats)
        for index, weights, _ in changed(self.spec, self.floats, recipe, self.calibration):
            smooth |= {f"layers.{index}.{name}": tensor for name, tensor in weights.items()}
        decoders["kv-alone"], decoders["kv-smooth"] = build(self.spec, self.floats), build(self.spec, smooth)
        length = ctx.size(1024, 512)
        windows = [self.pool[i * length : (i + 1) * length] for i in range(ctx.size(8, 2))]
        return {arm: perplexity(one, KEPT_KV.get(arm, LOW_KV), windows) for arm, one in decoders.items()}

    def check(self, ctx: Context) -> CheckResult:
        """Integers bit for bit against the slow reference, on the model's own matrices; the protective range."""
        import torch

        from millstream.models.blocks.linear import weight_format
        from millstream.ops.ref.channel import linear_channel, unpack_stream

        rows = []
        generator = torch.Generator().manual_seed(ctx.seed)
        for arm in ("w8a8", "w4a8"):
            decoder = self.models[arm].built.runner.decoder
            equal = total = 0
            for layer in decoder.layers[:: ctx.size(5, 15)]:
                for linear in layer.linears():
                    x = torch.randn(5, linear.packed.shape[1], generator=generator)
                    stream, bits = linear.packed["stream"], weight_format(arm).bits  # type: ignore[attr-defined]
                    want = linear_channel.reference(x, stream, linear.packed.shape[0], bits, None)
                    got = weight_format(arm).linear(x, linear.packed)
                    alone = torch.cat([weight_format(arm).linear(x[i : i + 1], linear.packed) for i in range(5)])
                    bias = linear.packed.parts.get("bias")
                    want = want if bias is None else want + bias
                    equal += torch.equal(got, want) and torch.equal(got, alone)
                    total += 1
            rows.append(
                CheckRow(f"{arm}: bits of the integer reference", equal == total, f"{equal} of {total} matrices")
            )
            held = decoder.format_bytes()
            values = sum(math.prod(linear.packed.shape) for layer in decoder.layers for linear in layer.linears())
            bits_each = 8 * held[arm] / values
            rows.append(
                CheckRow(
                    f"{arm}: resident bytes are those of its codes",
                    bits_each < (8.2 if arm == "w8a8" else 4.6),
                    f"{held[arm]} bytes, {bits_each:.2f} bits a weight; {held}",
                )
            )
        most = 0
        for layer in self.models["w4a8"].built.runner.decoder.layers:
            for linear in layer.linears():
                found = unpack_stream(linear.packed["stream"], *linear.packed.shape, 4)
                each = linear.packed.shape[1] // found["step"].shape[1]
                codes = found["codes"].to(torch.int32).view(linear.packed.shape[0], -1, each)
                most = max(most, int(((codes - found["z"][..., None]) * found["step"][..., None]).abs().max()))
        rows.append(CheckRow("no weight of the second level leaves a byte", most <= 127, f"the largest is {most}"))
        rows.append(self._adversarial())
        rows.append(self._one_nibble())
        return CheckResult(tuple(rows))

    def _adversarial(self) -> CheckRow:
        """A row that overflows when the first level uses all of a byte, and does not within the protective range."""
        import torch

        from millstream.formats.weights._progressive import PROTECTIVE, grid_of

        row = torch.tensor([[127.0, -113.0] * 16])
        reached = {}
        for bound in (127, PROTECTIVE):
            grid = grid_of(row, 1, bound=bound)
            reached[bound] = int((grid.values(grid.codes(row[:, None])) / grid.scale[..., None]).abs().max().round())
        return CheckRow(
            "an adversarial row overflows with a range of 127 and not with 119",
            reached[127] > 127 >= reached[PROTECTIVE],
            f"the largest is {reached[127]} and {reached[PROTECTIVE]}",
        )

    def _one_nibble(self) -> CheckRow:
        import torch

        from millstream.formats.weights.protocol import Packed
        from millstream.models.blocks.linear import weight_format

        linear = self.models["w4a8"].built.runner.decoder.layers[3].mixer.qkv
        form, stream = weight_format("w4a8"), linear.packed["stream"].clone()
        x = torch.randn(4, linear.packed.shape[1], generator=torch.Generator().manual_seed(2))
        before = form.linear(x, linear.packed)
        # Behind the first group's steps and offsets: a code of the first output's first input.
        stream[0, 64] ^= 1
        after = form.linear(x, Packed("w4a8", linear.packed.shape, {**linear.packed.parts, "stream": stream}))
        touched = (before != after).any(0).nonzero().flatten().tolist()
        return CheckRow("a changed nibble changes one output", touched == [0], f"outputs {touched[:4]}")

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        found = {
            "perplexity": self.perplexity[arm.name],
            "perplexity_delta": 100 * (self.perplexity[arm.name] / self.perplexity["float32"] - 1),
        }
        if arm.name not in SERVED:
            return found
        model = self.models[arm.name]
        decoder = model.built.runner.decoder
        packed = [linear.packed for layer in decoder.layers for linear in layer.linears()]
        found["layer_bytes"] = sum(one.nbytes for one in packed)
        kv, size = registry.make("kv", KEPT_KV[arm.name]), model.resolved.block_size
        dtype = model.resolved.config.model.dtype
        found["kv_bytes_per_token"] = sum(kv.page_bytes(group, size, dtype) for group in model.spec.groups) / size
        found["output_tokens_per_s"] = self._throughput(ctx, arm.name)
        for count in ROWS:
            found[f"product_{count}_ms"] = 1000 * products(decoder, count, ctx.size(5, 3))
        return found

    def _throughput(self, ctx: Context, arm: str) -> float:
        from millstream.bench.drive import drive
        from millstream.engine.assemble import build_engine

        model = self.models[arm]
        engine = build_engine(model.built.runner, model.spec, model.tokenizer, model.resolved.config, model.resolved)
        draw = random.Random(ctx.seed + 100 + ctx.repeat)
        requests = []
        for prompt, output in self.lengths:
            start = draw.randrange(len(self.pool) - prompt)
            params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            requests.append(Request(next(self.ids), (Tokens(tuple(self.pool[start : start + prompt])),), params))
        run = drive(engine, requests, clients=BATCH)
        ctx.expect(
            f"{arm}: every request came to its length",
            all(len(t.tokens) == t.request.params.max_tokens and t.error is None for t in run.timelines),
        )
        return run.output_tokens / run.seconds


def perplexity(decoder: Any, kv: str, windows: list[list[int]]) -> float:
    """Of some windows of one length, keys and values through pages of that format."""
    import torch

    from millstream.models.quantize.observe import contexts

    total, count = 0.0, 0
    with torch.inference_mode():
        step = contexts(decoder, len(windows[0]), kv)
        for window in windows:
            tokens = torch.tensor(window)
            rows = decoder.head(decoder.forward(tokens, step)).log_softmax(-1)[:-1]
            total += float(rows.gather(1, tokens[1:, None]).double().sum())
            count += len(window) - 1
    return math.exp(-total / count)


def products(decoder: Any, rows: int, repeats: int) -> float:
    """Median seconds of the products of all layers' matrices, one after the other, for so many rows."""
    import torch

    linears = [linear for layer in decoder.layers for linear in layer.linears()]
    generator = torch.Generator().manual_seed(rows)
    widths = {linear.packed.shape[1] for linear in linears}
    inputs = {width: torch.randn(rows, width, generator=generator).to(decoder.dtype) for width in widths}
    taken = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            for linear in linears:
                linear(inputs[linear.packed.shape[1]])
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


PLUGIN = QServe
CARD = Card("qserve", "W4A8 with low-bit KV against wider formats", paper=27)
