"""`millstream explain`: every automatic decision with its reason, what computes, and the memory ledger."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from millstream.cli.options import MODEL_HELP, engine_arguments, engine_config, open_llm
from millstream.cli.output import download_progress, emit, json_only, memory_in_words, note, print_table

if TYPE_CHECKING:
    from millstream.engine.llm import LLM
    from millstream.engine.resolve import Resolved
    from millstream.models.encoder_spec import AnySpec


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--no-load", action="store_true", help="read headers only: no weights, no kernels")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with json_only(args.json):
        value = _from_headers(args) if args.no_load else _loaded(args)
        if args.json:
            emit(value)
        else:
            _print(value)
    return 0


def _loaded(args: argparse.Namespace) -> dict[str, Any]:
    with open_llm(args) as llm:
        made = llm.assembled
        built = made.built
        return {
            **_common(args.model, made.source, made.spec, made.resolved),
            "sampling_defaults": _sampling_defaults(llm),
            "stop_tokens": {
                str(token): llm.tokenizer.decode([token], skip_special=False)
                for token in sorted(llm.tokenizer.stop_ids)
            },
            "weights": dict(built.formats),
            "run_as": {
                "chosen": "one native call" if built.program is None else "one op after the other",
                "refused": {} if built.program is None else {"one native call": built.program},
            },
            "attention": {
                group: {"chosen": name, "refused": dict(built.refusals[group])}
                for group, name in built.attention.items()
            },
            "ops": _ops(made.resolved.config.model.dtype, made.resolved.config.runner.ops, made.spec.width),
            "memory": _memory(made.spec, made.resolved, built.weight_bytes),
            "phases_s": made.phases,
        }


def _from_headers(args: argparse.Namespace) -> dict[str, Any]:
    from millstream.engine.assemble import resolve_for
    from millstream.engine.check import check
    from millstream.models.opened import open_model

    config = engine_config(args)
    check(config)
    with download_progress(args.model) as progress:
        opened = open_model(args.model, progress, note)
    resolved = resolve_for(opened, config)
    return {
        **_common(args.model, opened.source, opened.spec, resolved),
        "memory": _memory(opened.spec, resolved, opened.spec.weight_bytes(config.model.dtype)),
    }


def _common(model: str, source: Any, spec: AnySpec, resolved: Resolved) -> dict[str, Any]:
    return {
        "model": model,
        "family": spec.family,
        "parameters": spec.num_parameters,
        "layers": spec.num_layers,
        "width": spec.width,
        "vocabulary": spec.vocab_size,
        "stored_as": source.quantization,
        "dtype": resolved.config.model.dtype,
        "decisions": [{"name": one.name, "value": one.value, "reason": one.reason} for one in resolved.decisions],
        "generation_config": dict(source.generation_config),
    }


def _sampling_defaults(llm: LLM) -> dict[str, Any]:
    """What the model's generation_config changes of our own defaults."""
    from millstream.core.request import SamplingParams

    plain, own = SamplingParams(), llm.get_default_sampling_params()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(own, name) for name in names if getattr(own, name) != getattr(plain, name)}


def _ops(dtype: str, use: str, width: int) -> dict[str, dict[str, Any]]:
    import torch

    from millstream.ops import table

    with table.use("ref" if use == "ref" else "auto"):
        found = {
            name: op.explain(table.Ask("cpu", getattr(torch, dtype), width)) for name, op in sorted(table.ops().items())
        }
    return {name: {"chosen": one.chosen, "refused": dict(one.refused)} for name, one in found.items()}


def _memory(spec: AnySpec, resolved: Resolved, weight_bytes: int) -> dict[str, Any]:
    from millstream.core import registry

    compose = importlib.import_module("millstream.runner.compose")
    config = resolved.config
    kv = registry.make("kv", config.cache.kv)
    groups, fits = {}, []
    for group in () if spec.vectors else spec.groups:
        cost = int(kv.page_bytes(group, resolved.block_size, config.model.dtype))
        count, host = resolved.blocks[group.name], resolved.host_blocks.get(group.name, 0)
        kept = resolved.max_context if group.window is None else min(resolved.max_context, group.window)
        # Behind a window the block that it begins in and the one being written are both held.
        a_sequence = math.ceil(kept / resolved.block_size) + (group.window is not None)
        fits.append(count // min(a_sequence, math.ceil(resolved.max_context / resolved.block_size)))
        groups[group.name] = {
            "blocks": count,
            "block_bytes": cost,
            "token_bytes": cost / resolved.block_size,
            "bytes": count * cost,
            "host_blocks": host,
            "host_bytes": host * cost,
        }
    kv_bytes = sum(one["bytes"] for one in groups.values())
    host_bytes = sum(one["host_bytes"] for one in groups.values())
    workspace, how = _workspace(spec, resolved)
    return {
        "weights_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "kv_groups": groups,
        "host_tier_bytes": host_bytes,
        "workspace_bytes": workspace,
        "workspace_estimate": how,
        "total_bytes": weight_bytes + kv_bytes + host_bytes + workspace,
        "available_bytes": compose.free_memory(),
        "block_size": resolved.block_size,
        "max_context": resolved.max_context,
        "full_context_sequences": min(fits, default=0),
    }


def _workspace(spec: AnySpec, resolved: Resolved) -> tuple[int, str]:
    """Activations of the largest step: the widest layer's tensors for each token, and the logits of each row."""
    from millstream.models.encoder_spec import EncoderSpec
    from millstream.models.spec import MoeSpec, dtype_bytes

    tokens = rows = 1
    for meter in resolved.meters:
        tokens = max(tokens, int(meter.options.get("budget", meter.options.get("max_tokens", 0))))
        rows = max(rows, int(meter.options.get("max_rows", 0)))
    rows = min(rows, tokens)
    if isinstance(spec, EncoderSpec):
        widest = max(3 * spec.width + max(3 * spec.width, 2 * layer.up.out_width) for layer in spec.layers)
        scores = max(layer.heads for layer in spec.layers) * resolved.max_context**2
        return (tokens * widest + scores) * dtype_bytes(resolved.config.model.dtype), (
            f"{tokens} tokens of {widest} values, and one text's scores"
        )
    widest = 0
    for layer in spec.layers:
        mixer, channel = layer.mixer, layer.channel
        attention = mixer.qkv.out_width + mixer.heads * mixer.head_dim
        if isinstance(channel, MoeSpec):
            inner = 3 * channel.expert.inner * channel.top_k + (3 * channel.shared.inner if channel.shared else 0)
        else:
            inner = 3 * channel.inner
        # Residual, its norm, and what is added to it.
        widest = max(widest, 3 * spec.width + max(attention, inner))
    size = dtype_bytes(resolved.config.model.dtype)
    return (
        tokens * widest * size + 2 * rows * spec.vocab_size * 4,
        f"{tokens} tokens of {widest} values, {rows} rows of {spec.vocab_size} logits twice",
    )


def _print(value: Mapping[str, Any]) -> None:
    print(
        f"{value['model']}: {value['family']}, {value['parameters']:,} parameters, {value['layers']} layers of width "
        f"{value['width']}, vocabulary {value['vocabulary']:,}; stored as {value['stored_as']}, "
        f"computed in {value['dtype']}"
    )
    print("\ndecisions")
    print_table(("setting", "value", "because"), [tuple(one.values()) for one in value["decisions"]])
    if "attention" in value:
        print("\ncomputed with")
        rows = [("layers of a step", value["run_as"]["chosen"], _refusals(value["run_as"]))]
        rows += [
            (f"attention, group {group}", one["chosen"], _refusals(one)) for group, one in value["attention"].items()
        ]
        rows += [(f"op {name}", one["chosen"], _refusals(one)) for name, one in value["ops"].items()]
        print_table(("what", "by", "passed over"), rows)
        given = ", ".join(f"{name} {found}" for name, found in value["sampling_defaults"].items())
        print(f"\nsampling defaults from generation_config: {given or 'none'}")
        print("stop tokens: " + ", ".join(f"{token} {text!r}" for token, text in value["stop_tokens"].items()))
    memory = value["memory"]
    print("\nmemory")
    kept = ", ".join(f"{memory_in_words(size)} {name}" for name, size in value.get("weights", {}).items())
    mapped = "mapped from disk where they were converted before"
    rows = [("weights", memory_in_words(memory["weights_bytes"]), f"{kept}; {mapped}" if kept else mapped)]
    for name, group in memory["kv_groups"].items():
        rows.append(
            (
                f"KV blocks, group {name}",
                memory_in_words(group["bytes"]),
                f"{group['blocks']:,} blocks of {memory['block_size']} tokens, {group['block_bytes']:,} bytes each, "
                f"{group['token_bytes']:,.0f} a token",
            )
        )
        if group["host_blocks"]:
            rows.append(
                (f"host tier, group {name}", memory_in_words(group["host_bytes"]), f"{group['host_blocks']:,} blocks")
            )
    rows.append(("workspace, estimated", memory_in_words(memory["workspace_bytes"]), memory["workspace_estimate"]))
    rows.append(
        (
            "total",
            memory_in_words(memory["total_bytes"]),
            f"{memory_in_words(memory['available_bytes'])} are available now",
        )
    )
    print_table(("for", "size", ""), rows, right=(1,))
    if not memory["kv_groups"]:
        print("\nan encoder: a text is computed in one step, and nothing of it is kept")
        return
    print(
        f"\n{memory['full_context_sequences']} sequences of {memory['max_context']:,} tokens fit at once; "
        "KV pages take memory when they are first written"
    )


def _refusals(one: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in one["refused"].items())
