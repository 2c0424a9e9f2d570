"""`millstream bench`: throughput, latency, start-up, the knee of step sizes, and the ops of a model one by one.

What each number means is written at the top of sim/metrics.py, bench/offline.py, engine/knee.py and bench/ops.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.cli.options import MODEL_HELP, engine_arguments, engine_config, open_llm
from millstream.cli.output import emit, json_only, note, print_table, seconds_in_words

if TYPE_CHECKING:
    from millstream.engine.knee import Knee
    from millstream.engine.llm import LLM

KINDS = {
    "throughput": "num-prompts requests, at most batch inside at once",
    "latency": "batch requests that arrive together, repeated",
    "startup": "fresh processes, from their start to the first token: cold and warm",
    "knee": "seconds against tokens a step; sets the automatic sched.step_tokens",
    "ops": "each native op on the model's shapes, beside its reference and what the machine can do at most",
}

# Repeats that lie further apart than this (slowest over quickest) do not place a knee well.
NOISY = 1.5


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = {**KINDS, "serve": "load on a server over HTTP: `millstream bench serve --help`"}
    parser.epilog = "kinds:\n" + "\n".join(f"  {name:<12}{text}" for name, text in kinds.items())
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default 128)")
    parser.add_argument("--output-len", type=int, default=32, metavar="N", help="output tokens (default 32)")
    parser.add_argument("--num-prompts", type=int, default=32, metavar="N", help="requests a repeat (default 32)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="requests at once (default: 32 for throughput, 1 for latency)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="(default 5; 3 for throughput and startup)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="prompts are pieces of this text, not random tokens")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the knee's curve (needs the extra 'bench')")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="of ops: only this one; repeatable")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.core.errors import ConfigError

    if args.plot is not None and args.kind != "knee":
        raise ConfigError("--plot draws the curve of `bench knee`")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'millstream[bench]'")
    if args.op and args.kind != "ops":
        raise ConfigError("--op picks among those of `bench ops`")
    with json_only(args.json):
        if args.kind == "startup":
            return _startup(args)
        if args.kind == "ops":
            return _ops(args)
        started = time.perf_counter()
        with open_llm(args) as llm:
            startup_s = time.perf_counter() - started
            return _knee(args, llm) if args.kind == "knee" else _load(args, llm, startup_s)


def _load(args: argparse.Namespace, llm: LLM, startup_s: float) -> int:
    from millstream.bench import offline

    batch = args.batch if args.batch is not None else 32 if args.kind == "throughput" else 1
    text: tuple[int, ...] = ()
    if args.text is not None:
        text = tuple(llm.tokenizer.encode(_read(args.text), add_bos=False))
    work = offline.Workload(args.input_len, args.output_len, args.num_prompts, batch, args.seed, text)
    if args.kind == "throughput":
        reports = offline.throughput(llm, work, args.repeats or 3, say=note)
    else:
        reports = offline.latency(llm, work, args.repeats or 5, say=note)
    found = offline.medians(reports)
    counted = reports[0]
    value = {
        "bench": args.kind,
        "model": llm.model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "num_prompts": args.num_prompts if args.kind == "throughput" else batch,
        "batch": batch,
        "prompts": "text" if text else "random tokens",
        "seed": args.seed,
        "startup_s": startup_s,
        **found,
        "spread": offline.spread(reports),
        "steps": counted.steps,
        "max_running": max(report.max_running for report in reports),
        "cached_tokens": sum(report.cached_tokens for report in reports),
        "repeats": offline.as_rows(reports),
        "formats": _formats(llm),
        **_machine(),
    }
    if args.json:
        emit(value)
        return 0
    spread = value["spread"]
    rows = [
        (name.removesuffix("_per_s").replace("_", " ") + "/s", f"{found[name]:.1f}", _range(spread[name]))
        for name in (
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "output_tokens_per_s",
            "total_tokens_per_s",
            "requests_per_s",
        )
    ]
    print_table(("throughput", "median", "lowest to highest"), rows, right=(1,))
    print()
    parts = ("p50", "p90", "p99", "mean", "max")
    print_table(
        ("time", *parts),
        [(name.removesuffix("_s"), *(seconds_in_words(found[name][part]) for part in parts)) for name in offline.TIMES],
        right=range(1, 6),
    )
    print(
        f"\n{len(reports)} repeats of {counted.requests} requests, {args.input_len} + {args.output_len} tokens, "
        f"at most {value['max_running']} running, {counted.steps} steps, "
        f"{value['cached_tokens']} tokens from the cache; loaded in {startup_s:.2f} s"
    )
    return 0


def _startup(args: argparse.Namespace) -> int:
    import statistics
    from dataclasses import asdict

    from millstream.bench.offline import start_up
    from millstream.cli.output import download_progress
    from millstream.models import store
    from millstream.sim.metrics import Distribution

    with download_progress(args.model) as progress:
        path = store.resolve(args.model, progress=progress, notice=note)
    passed: list[str] = []
    flags = {
        "--dtype": args.dtype,
        "--weights": args.weights,
        "--max-context": args.max_context,
        "--config": args.config,
    }
    for flag, given in flags.items():
        passed += [flag, str(given)] if given is not None else []
    for pair in args.set:
        passed += ["--set", pair]
    cold, warm = start_up(path.absolute(), passed, cold=1, warm=args.repeats or 3, say=note)
    by_phase = {
        phase: (cold[-1].phases_s.get(phase, 0.0), statistics.median(one.phases_s.get(phase, 0.0) for one in warm))
        for phase in warm[0].phases_s
    }
    median = statistics.median(one.total_s for one in warm)
    if args.json:
        emit(
            {
                "bench": "startup",
                "model": args.model,
                "startup_s": median,
                "cold_s": cold[-1].total_s,
                "warm_s": asdict(Distribution.of(one.total_s for one in warm)),
                "ttft_s": median,
                "phases_s": {phase: {"cold": a, "warm": b} for phase, (a, b) in by_phase.items()},
                "spread": {"low": min(one.total_s for one in warm), "high": max(one.total_s for one in warm)},
                "repeats": {"cold": [asdict(one) for one in cold], "warm": [asdict(one) for one in warm]},
                **_machine(),
            }
        )
        return 0
    rows = [(phase, f"{a * 1000:.0f} ms", f"{b * 1000:.0f} ms") for phase, (a, b) in by_phase.items()]
    rows.append(("process start to first token", f"{cold[-1].total_s * 1000:.0f} ms", f"{median * 1000:.0f} ms"))
    print_table(("phase", "cold", f"warm (median of {len(warm)})"), rows, right=(1, 2))
    print(f"\ncold: {cold[-1].state}; the system's page cache was left as it was")
    return 0


def _knee(args: argparse.Namespace, llm: LLM) -> int:
    from millstream.core.errors import Unsupported
    from millstream.engine.knee import SHARE, Bench, keep_knee, measure_knee

    made = llm.assembled
    if made.spec.vectors:
        raise Unsupported(f"{llm.model} is an encoder, whose steps take whole texts: it has no knee to measure")
    bench = Bench(made.built.runner, made.spec, made.resolved.max_context, made.engine.decode.name)
    knee = measure_knee(bench, repeats=args.repeats or 5, seed=args.seed, say=note)
    about = {"model": llm.model, "formats": _formats(llm), **_machine()}
    keep_knee(made.source, made.resolved.config.model.weights, knee, **about)
    value = {**knee.as_json(), **about}
    if any(point.high > NOISY * point.low for point in knee.curve):
        note("the repeats differ much: something else was running; measure again when the machine is quiet")
    if args.plot is not None:
        _plot(knee, args.plot, llm.model)
    if args.json:
        emit({"bench": "knee", **value})
        return 0
    best = max(point.tokens_per_s for point in knee.curve)
    rows = [
        (
            point.tokens,
            f"{point.seconds * 1000:.1f}",
            f"{point.low * 1000:.1f} to {point.high * 1000:.1f}",
            f"{point.tokens_per_s:.0f}",
            f"{point.tokens_per_s / best:.0%}",
            "#" * round(30 * point.tokens_per_s / best) + (" knee" if point.tokens == knee.step_tokens else ""),
        )
        for point in knee.curve
    ]
    print_table(
        ("tokens a step", "ms", "lowest to highest", "tokens/s", "of the best", ""), rows, right=(0, 1, 2, 3, 4)
    )
    print(
        f"\nThe knee is {knee.step_tokens} tokens: the smallest step with {SHARE:.0%} of the best tokens a second. "
        'sched.step_tokens "auto" takes it from here on.'
    )
    return 0


def _ops(args: argparse.Namespace) -> int:
    import torch

    from millstream.bench.ops import measure_ops
    from millstream.cli.output import download_progress
    from millstream.config.load import home
    from millstream.models.load import load_model
    from millstream.models.opened import open_model
    from millstream.ops.cpu import build
    from millstream.runner.compose import usable_cores

    threads = engine_config(args).runner.threads
    with download_progress(args.model) as progress:
        opened = open_model(args.model, progress, note)
    build.configure(directory=home() / "kernels", notice=note)
    torch.set_num_threads(usable_cores() if threads == "auto" else threads)
    loaded = load_model(opened.source, weights="blocks")
    found = measure_ops(loaded.decoder, repeats=args.repeats or 5, only=args.op, seed=args.seed, say=note)
    if args.json:
        emit({"bench": "ops", "model": args.model, "seed": args.seed, **found.as_json(), **_machine()})
        return 0
    most = found.ceilings
    print(
        f"at most, on {most.threads} threads: memory {most.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"{most.resident_bytes_per_s / 1e9:.1f} of the model's {most.resident_bytes / 1e6:.0f} MB again and again; "
        + ", ".join(f"{kind} {rate / 1e9:.0f} GOP/s" for kind, rate in most.ops_per_s.items())
        + "\n"
    )
    rows = [
        (
            row.op,
            row.shape,
            row.implementation,
            f"{row.seconds * 1e6:.1f}",
            f"{row.low * 1e6:.1f} to {row.high * 1e6:.1f}",
            f"{row.gb_per_s:.1f}",
            f"{row.gop_per_s:.1f}" if row.gop_per_s else "-",
            f"{row.share:.0%} of {row.bound}",
        )
        for row in found.rows
    ]
    titles = ("op", "shape", "by", "us", "lowest to highest", "GB/s", "GOP/s", "of the bound")
    print_table(titles, rows, right=(3, 4, 5, 6))
    for name, why in found.refused.items():
        print(f"{name}: {why}")
    return 0


def _plot(knee: Knee, path: Path, model: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sizes = [point.tokens for point in knee.curve]
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    left.plot(sizes, [point.tokens_per_s for point in knee.curve], "o-", color="tab:blue")
    left.axvline(knee.step_tokens, color="tab:red", linestyle="--", label=f"knee: {knee.step_tokens} tokens")
    left.set(xscale="log", xlabel="tokens a step", ylabel="tokens a second", title=f"{model}: tokens against time")
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.minorticks_off()
    right = left.twinx()
    right.plot(sizes, [point.seconds * 1000 for point in knee.curve], "s:", color="tab:gray")
    right.set(ylabel="milliseconds a step (dotted)", ylim=(0, None))
    left.set_ylim(0, None)
    left.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    note(f"plot: {path}")


def _formats(llm: LLM) -> dict[str, str]:
    config, built = llm.assembled.resolved.config, llm.assembled.built
    return {
        "stored": llm.assembled.source.quantization,
        "weights": ", ".join(sorted(built.formats)),
        "dtype": config.model.dtype,
        "kv": str(config.cache.kv),
        "attention": ", ".join(f"{group}: {name}" for group, name in built.attention.items()),
    }


def _machine() -> dict[str, Any]:
    from millstream.reproduce import machine
    from millstream.reproduce.ledger import SOURCE_ROOT

    found = machine.describe(machine.load())
    head, dirty = machine.commit(SOURCE_ROOT)
    return {
        "commit": head + ("-dirty" if dirty else "") if head else None,
        "cpu": found.cpu,
        "cores": found.cores,
        "machine": {
            "flags": list(found.flags),
            "memory_bytes": found.memory_bytes,
            "os": found.os,
            "python": found.python,
            "torch": found.torch,
            "threads": found.torch_threads,
            "load_average": found.load_before,
        },
    }


def _range(found: dict[str, float]) -> str:
    return f"{found['low']:.1f} to {found['high']:.1f}"


def _read(path: Path) -> str:
    from millstream.core.errors import BadFile

    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"cannot be read: {error}") from error
