"""Structured output and tool calls over whole public suites: what is taken, what it costs, and that outputs keep to it.

    python benchmarks/structured.py schemas [--model smollm2-135m] [--outputs N] [--max-tokens 256] [--json]
    python benchmarks/structured.py random  [--outputs N]      the same outputs from a tiny model of random weights
    python benchmarks/structured.py tools   [--model smollm2-135m] [--outputs N] [--max-tokens 256] [--json]

`schemas`: every schema of `json_schemas/*` is compiled as a client's would be (process and pipe included) and held
against its own instances; then a model is asked for an instance of each one that was taken, and jsonschema judges. Only
outputs that were not cut by their length can be judged. `tools`: the BFCL questions of `tools_bfcl/*` with tool_choice
"required"; a call is right in form when its name is one of the tools and its arguments fit that tool's schema.
Data: $MILLSTREAM_DATA. Needs the extra "test" for jsonschema.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from millstream import LLM, SamplingParams
from millstream.config.load import data_dir
from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.text.grammar.build import build, make_tokenizer
from millstream.text.grammar.compiler import GrammarCompiler
from millstream.text.tokenizer import Tokenizer
from millstream.text.tools import plan
from millstream.text.tools.asked import toolbox_of

SUITES = ("maskbench", "json_schema_test_suite_2020_12")
CALLS = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_parallel",
         "live_parallel_multiple")  # fmt: skip
AT_ONCE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("schemas", "random", "tools"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--outputs", type=int, default=0, help="at most so many outputs a suite (0: all)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.what == "tools":
        found: list[Any] = tools(args.model, args.outputs, args.max_tokens)
    else:
        found = schemas(args.model, args.outputs, args.max_tokens, args.what == "random")
    if args.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    return 0


def rows(folder: str, name: str) -> Iterator[dict[str, Any]]:
    path = Path(data_dir() or "") / folder / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


# -- JSON schemas


@dataclass
class Suite:
    """What became of one suite of schemas. Times in milliseconds."""

    name: str
    schemas: int = 0
    compile_ms: list[float] = field(default_factory=list)
    mask_us: list[float] = field(default_factory=list)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    valid_taken: int = 0
    valid_refused: int = 0
    invalid_taken: int = 0
    invalid_refused: int = 0
    outputs: collections.Counter[str] = field(default_factory=collections.Counter)
    output_tokens: int = 0
    seconds: float = 0.0

    @property
    def taken(self) -> int:
        return self.schemas - sum(self.refused.values())


def compiled(suite: Suite, compiler: GrammarCompiler, tokenizer: Tokenizer, masks: Any) -> list[Any]:
    """The schemas of a suite that are taken; the others are counted by the reason."""
    good = []
    for row in rows("json_schemas", suite.name):
        suite.schemas += 1
        try:
            asked = Structured.json(json.dumps(row["schema"]))
            start = time.perf_counter()
            try:
                ready = compiler.check(asked).structured
            finally:
                suite.compile_ms.append(1000 * (time.perf_counter() - start))
        except BadRequest as error:
            suite.refused[_reason(str(error.got))] += 1
            continue
        matcher = build(masks, ready)
        for test in row["tests"]:
            walk, fits = matcher.deep_copy(), True
            for token in tokenizer.encode(json.dumps(test["data"], ensure_ascii=False), add_bos=False):
                start = time.perf_counter()
                walk.compute_bitmask()
                suite.mask_us.append(1e6 * (time.perf_counter() - start))
                if not walk.consume_token(token):
                    fits = False
                    break
            fits = fits and walk.is_accepting()
            kind = ("valid" if test["valid"] else "invalid") + ("_taken" if fits else "_refused")
            setattr(suite, kind, getattr(suite, kind) + 1)
        good.append(row["schema"])
    return good


def _reason(text: str) -> str:
    keys = re.search(r"Unimplemented keys: (\[.*\])", text)
    if keys:
        return "not enforced: " + ", ".join(json.loads(keys[1]))
    return re.sub(r"'[^']*'|\"[^\"]*\"|/.*/|\d+", "...", text)[:60]


def schemas(model: str, most: int, max_tokens: int, random_model: bool) -> list[Any]:
    llm = LLM(model, weights="blocks", max_context=2048)
    tokenizer = llm.tokenizer
    masks = make_tokenizer(tokenizer.vocabulary, llm.assembled.spec.vocab_size, tokenizer.stop_ids)
    make = _random_outputs(llm) if random_model else _outputs(llm)
    told = []
    try:
        llm.grammars.check(Structured.json())  # the process is up
        for name in SUITES:
            suite = Suite(name)
            good = compiled(suite, llm.grammars, tokenizer, masks)
            wanted = good[:: max(1, len(good) // most)][:most] if most else good
            start = time.perf_counter()
            for at in range(0, len(wanted), AT_ONCE):
                part = wanted[at : at + AT_ONCE]
                for schema, (text, reason, count) in zip(part, make(part, max_tokens), strict=True):
                    suite.output_tokens += count
                    suite.outputs[_judged(schema, text, reason)] += 1
            suite.seconds = time.perf_counter() - start
            _print_suite(suite)
            told.append({**suite.__dict__, "compile_ms": _quantiles(suite.compile_ms),
                         "mask_us": _quantiles(suite.mask_us), "refused": dict(suite.refused),
                         "outputs": dict(suite.outputs)})  # fmt: skip
    finally:
        llm.close()
    return told


def _judged(schema: Any, text: str, reason: str) -> str:
    if reason != "stop":
        return reason
    try:
        value = json.loads(text)
    except ValueError:
        return "INVALID: not JSON"
    try:
        jsonschema.Draft202012Validator(schema).validate(value)
    except jsonschema.ValidationError as error:
        return f"INVALID: {error.validator}"
    except Exception:
        return "jsonschema cannot judge"
    return "valid"


def _outputs(llm: LLM) -> Any:
    """An instance of each schema from the model."""

    def make(part: Sequence[Any], max_tokens: int) -> list[tuple[str, str, int]]:
        chats, params = [], []
        for schema in part:
            text = json.dumps(schema)[:3000]
            chats.append([{"role": "user", "content": f"Give a short example of JSON that fits this schema:\n{text}"}])
            own = Structured.json(json.dumps(schema))
            params.append(SamplingParams(temperature=0.7, seed=1, max_tokens=max_tokens, structured=own))
        return [
            (out.outputs[0].text, out.outputs[0].finish_reason or "", len(out.outputs[0].token_ids))
            for out in llm.chat(chats, params)
        ]

    return make


def _random_outputs(llm: LLM) -> Any:
    """The same from a model of two layers and random weights: nothing but the grammar leads it to the end."""
    import torch

    from millstream.models import decoder
    from millstream.models.families.protocol import find_family

    sizes = {"vocab_size": llm.assembled.spec.vocab_size, "hidden_size": 32, "intermediate_size": 48,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2,
             "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
             "model_type": "llama"}  # fmt: skip
    spec, noise = find_family(sizes).spec(sizes), torch.Generator().manual_seed(0)
    tensors = {
        t.name: torch.randn(t.shape, generator=noise) * (1.0 if "norm" in t.name else 0.3) for t in spec.tensors()
    }
    tiny = decoder.build(spec, tensors)
    tokenizer, stop = llm.tokenizer, llm.tokenizer.stop_ids
    masks = make_tokenizer(tokenizer.vocabulary, spec.vocab_size, stop)
    return lambda part, max_tokens: [
        _walk(tiny, masks, tokenizer, schema, n, max_tokens) for n, schema in enumerate(part)
    ]


def _walk(tiny: Any, masks: Any, tokenizer: Tokenizer, schema: Any, seed: int, most: int) -> tuple[str, str, int]:
    """One output by hand: the logits of the bare last token, the rule of the engine, the engine's own sampling."""
    import torch

    from millstream.core.plan import SampleAsk
    from millstream.decode.methods.autoregressive.device import Autoregressive

    matcher, method = build(masks, Structured.json(json.dumps(schema))), Autoregressive()
    params, out = SamplingParams(temperature=1.0, seed=seed), [1]
    with torch.inference_mode():
        while len(out) <= most and not matcher.is_stopped():
            # Embedding to head: a bigram model, as random as it gets and fast.
            logits = tiny.head(tiny.embed(torch.tensor(out[-1:])))
            ask = SampleAsk(params, seed, 0, len(out), 1, allowed=matcher.compute_bitmask())
            token = method.settle(logits.float().clone(), [ask], [()])[0][0]
            out.append(token)
            if token in tokenizer.stop_ids:
                return tokenizer.decode(out[1:], continuation=True), "stop", len(out) - 1
            matcher.consume_token(token)
    reason = "stop" if matcher.is_stopped() else "length"
    return tokenizer.decode(out[1:], continuation=True), reason, len(out) - 1


# -- tool calls


def tools(model: str, most: int, max_tokens: int) -> list[Any]:
    llm = LLM(model, weights="blocks", max_context=4096)
    told = []
    try:
        for name in CALLS:
            questions = list(rows("tools_bfcl", name))
            counts: collections.Counter[str] = collections.Counter()
            questions = [question for question in questions[: most or None] if _offered(llm, question, counts)]
            start, tokens = time.perf_counter(), 0
            for at in range(0, len(questions), AT_ONCE):
                part = questions[at : at + AT_ONCE]
                chats = [question["question"][0] for question in part]
                offered = [[_tool(one) for one in question["function"]] for question in part]
                params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
                for question, own, out in zip(
                    part, offered, llm.chat(chats, params, tools=offered, tool_choice="required"), strict=True
                ):
                    one = out.outputs[0]
                    tokens += len(one.token_ids)
                    counts["outputs"] += 1
                    counts[one.finish_reason or "none"] += 1
                    if one.finish_reason == "length":
                        continue
                    counts["parsed" if one.tool_calls and not one.text else "NOT PARSED"] += 1
                    schemas_ = {tool["function"]["name"]: tool["function"]["parameters"] for tool in own}
                    fits = all(_fits(schemas_.get(call.name), call.arguments) for call in one.tool_calls)
                    counts["arguments fit" if fits else "ARGUMENTS DO NOT FIT"] += 1
                    right = {next(iter(answer)) for answer in question["possible_answer"]}
                    counts["the right functions"] += {call.name for call in one.tool_calls} == right
            seconds = time.perf_counter() - start
            print(f"{name:24} {', '.join(f'{key} {value}' for key, value in counts.items())}; "
                  f"{tokens} tokens in {seconds:.1f} s")  # fmt: skip
            told.append({"suite": name, **counts, "tokens": tokens, "seconds": seconds})
    finally:
        llm.close()
    return told


def _offered(llm: LLM, question: dict[str, Any], counts: collections.Counter[str]) -> bool:
    """Whether the tools of a question are taken; a schema that nothing fulfils is refused, as a client's would be."""
    box = toolbox_of([_tool(one) for one in question["function"]], "required")
    try:
        plan.guide(llm.grammars, plan.Ask(plan.dialect_of(llm.tokenizer), llm.tokenizer, box))
    except BadRequest as error:
        counts["refused"] += 1
        print(f"  refused: {question['id']}: {error}")
        return False
    return True


def _fits(schema: Any, arguments: str) -> bool:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


# BFCL writes types as Python names them.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "bool": "boolean", "str": "string",
          "int": "integer", "Boolean": "boolean", "String": "string", "HashMap": "object", "ArrayList": "array",
          "char": "string", "double": "number", "long": "integer"}  # fmt: skip


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**function, "parameters": _schema(function["parameters"])}}


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {key: _schema(item) for key, item in value.items()}
    kind = out.get("type")
    if kind == "any":
        del out["type"]
    elif isinstance(kind, str):
        out["type"] = _TYPES.get(kind, kind)
    for odd in ("optional", "format"):
        if isinstance(out.get(odd), bool | str):
            del out[odd]
    if "required" in out and not isinstance(out["required"], list):
        del out["required"]
    return out


# -- telling


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"mean": statistics.fmean(ordered), "p50": at(0.5), "p99": at(0.99), "max": ordered[-1], "n": len(ordered)}


def _print_suite(suite: Suite) -> None:
    print(f"\n{suite.name}: {suite.schemas} schemas, {suite.taken} taken")
    for name, values, unit in (("compile", suite.compile_ms, "ms"), ("mask", suite.mask_us, "us")):
        q = _quantiles(values)
        told = "  ".join(f"{key} {q[key]:.2f}" for key in ("mean", "p50", "p99", "max"))
        print(f"  {name:8} {told} {unit} (n {q['n']})")
    print(f"  instances: valid {suite.valid_taken} let through, {suite.valid_refused} not; "
          f"invalid {suite.invalid_refused} stopped, {suite.invalid_taken} not")  # fmt: skip
    rate = suite.output_tokens / suite.seconds if suite.seconds else 0.0
    print(f"  outputs: {', '.join(f'{key} {count}' for key, count in suite.outputs.most_common())}; "
          f"{suite.output_tokens} tokens in {suite.seconds:.1f} s ({rate:.0f}/s)")  # fmt: skip
    print("  refused: " + "; ".join(f"{count} x {key}" for key, count in suite.refused.most_common()))


if __name__ == "__main__":
    sys.exit(main())
