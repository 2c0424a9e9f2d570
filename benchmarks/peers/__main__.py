"""Runs the comparison: `python -m peers --model smollm2-135m`, with `benchmarks/` on PYTHONPATH.

See `peers/__init__.py` for the parts, `peers/measures.py` for what each number is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from millstream.cli.output import note, print_table
from millstream.models.opened import open_model
from millstream.reproduce import machine
from millstream.sim import data
from peers import report
from peers.install import NotInstalled
from peers.launch import ENGINES, Bench, Launch, prepare
from peers.measures import Asked, Results, run_rounds, tasks
from peers.protocol import Worker, WorkerFailed

# An engine that starts more slowly than this starts twice at most.
SLOW_START_S = 30.0
WINDOW = 1024
# What is measured of a model when nothing is said: small models are asked for larger batches.
SMALL_BYTES = 500 << 20
BATCHES, FEW_BATCHES = (1, 8, 32, 64), (1, 8, 16)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF model that Millstream knows, or its path")
    parser.add_argument("--engines", default="millstream,llama.cpp,openvino,vllm", help=", ".join(ENGINES))
    parser.add_argument("--batches", metavar="N,N", help="requests at once (default 1,8,32,64; 1,8,16 of large models)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N")
    parser.add_argument("--output-len", type=int, default=128, metavar="N")
    parser.add_argument(
        "--prefill", default="512x1,128x1,512x8", metavar="NxB,...", help="prompts of N tokens, B at once"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds beside the one that warms up (default 5)")
    parser.add_argument("--starts", type=int, default=3, help="of each engine, the first not counted (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--perplexity", type=int, nargs="?", const=8, metavar="WINDOWS", help="of Millstream's own paths (default 8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value here")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    engines = list(dict.fromkeys(args.engines.split(",")))
    if unknown := [name for name in engines if name not in ENGINES]:
        parser.error(f"unknown engine {unknown[0]!r}; there are: {', '.join(ENGINES)}")
    try:
        prefills = [(int(n), int(b)) for n, _, b in (part.partition("x") for part in args.prefill.split(",") if part)]
        batches = [int(batch) for batch in args.batches.split(",")] if args.batches else None
    except ValueError:
        parser.error("--batches is like 1,8,32 and --prefill like 512x1,128x4")
    if min(args.repeats, args.starts, args.input_len, args.output_len, args.threads) < 1:
        parser.error("counts and lengths are at least 1")

    opened = open_model(args.model)
    if batches is None:
        batches = list(BATCHES if opened.source.stored_bytes() < SMALL_BYTES else FEW_BATCHES)
    todo = tasks(batches, args.input_len, args.output_len, prefills)
    pool = opened.tokenizer().encode(data.text("wikitext2-test"), add_bos=False)
    context = max(task.input_len + task.output_len for task in todo)
    bench = Bench(
        args.model,
        args.threads,
        # Whole blocks of every engine, with room to spare; and a window of the perplexity.
        max(context + 16, WINDOW) // 64 * 64 + 64,
        max(task.batch for task in todo),
        tuple(pool[: args.input_len]),
        say=note,
    )
    load = machine.load()
    results = Results()
    with ExitStack() as stack:
        launches: dict[str, Launch] = {}
        workers: dict[str, Asked] = {}
        for name in engines:
            try:
                launches[name] = prepare(name, bench)
                workers[name] = stack.enter_context(started(launches[name], args.starts, results))
            except (NotInstalled, WorkerFailed) as error:
                results.absent[name] = str(error)
                note(f"{name}: {error}")
        try:
            run_rounds(workers, todo, pool, args.repeats, results, args.seed, note)
            if args.perplexity:
                perplexity(stack, workers, bench, pool, args.perplexity, results)
        except KeyboardInterrupt:
            note("interrupted: the table has what was measured before")

    made = report.rows(results, engines)
    titles, lines = report.table(made, engines)
    notes = report.footnotes(results, engines)
    about = machine.describe(load)
    print_table(titles, lines, right=range(2, len(titles)))
    print("\n" + "\n".join(notes) + "\n")
    print(report.markdown(titles, lines))
    if args.json is not None:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        value = report.as_json(results, made, model=args.model, asked=asked, machine=asdict(about), notes=notes)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(machine.without_private(value), indent=1) + "\n")
    return 0 if made else 1


def started(launch: Launch, starts: int, results: Results) -> Worker:
    """The last of some starts, each timed. Raises WorkerFailed."""
    for turn in range(starts):
        worker = launch.start()
        try:
            said = worker.ready()
        except WorkerFailed:
            worker.close()
            raise
        one = {"total_s": said["total_s"], **said["phases_s"]}
        results.starts.setdefault(launch.name, []).append(one)
        results.told[launch.name] = said["ready"]
        note(f"{launch.name}: start {turn + 1}: {one['total_s']:.2f} s, of it importing {one['imports_s']:.2f} s")
        if turn + 1 == starts or (turn and one["total_s"] > SLOW_START_S):
            return worker
        worker.close()
    raise AssertionError("at least one start")


def perplexity(
    stack: ExitStack, workers: dict[str, Asked], bench: Bench, pool: list[int], count: int, results: Results
) -> None:
    """Of WikiText-2 through Millstream in blocks and in float32, in windows that do not overlap."""
    cut = [pool[lo : lo + WINDOW] for lo in range(0, count * WINDOW, WINDOW)]
    for name in ("millstream", "millstream-float32"):
        try:
            worker = workers.get(name)
            if worker is None:
                own = prepare(name, bench).start()
                worker = stack.enter_context(own)
                own.ready()
            found = [worker.ask(do="score", prompts=[window]) for window in cut]
        except (NotInstalled, WorkerFailed) as error:
            note(f"perplexity of {name}: {error}")
            continue
        results.perplexity_tokens = sum(one["count"] for one in found)
        results.perplexity[name] = math.exp(-sum(one["logprob"] for one in found) / results.perplexity_tokens)


if __name__ == "__main__":
    # Ended from outside it still ends its workers, and tells what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
