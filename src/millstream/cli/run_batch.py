"""`millstream run-batch`: answer a file of requests without a server, in the format of OpenAI's batch API.

The flags are those of `vllm run-batch`. A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.cli.options import MODEL_HELP, engine_arguments, engine_config
from millstream.cli.output import download_progress, emit, json_only, note

if TYPE_CHECKING:
    from millstream.serve.batch_run import BatchRun, Summary

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/score")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--model", dest="named_model", metavar="MODEL", help="the same, as vLLM has it")
    parser.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, one JSON object a line"
    )
    parser.add_argument(
        "-o", "--output-file", type=Path, required=True, metavar="FILE", help="results, in the order of the requests"
    )
    parser.add_argument(
        "--at-once", type=int, default=64, metavar="N", help="requests that are under way together (default 64)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON when done, and nothing else")
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.core.errors import BadRequest, ConfigError
    from millstream.serve.batch_run import BatchRun

    model = args.model or args.named_model
    if model is None:
        raise ConfigError("no model was named: millstream run-batch MODEL -i FILE -o FILE")
    if args.at_once < 1:
        raise BadRequest("--at-once", args.at_once, "an integer from 1")
    with json_only(args.json):
        one = BatchRun(args.input_file, args.output_file, ENDPOINTS)
        one.prepare()
        started = time.perf_counter()
        left = one.summary.total - one.summary.before
        if left:
            asyncio.run(_run(args, model, one))
        else:
            note("all requests have a result already")
    return _tell(args, one.summary, time.perf_counter() - started)


async def _run(args: argparse.Namespace, model: str, one: BatchRun) -> None:
    from starlette.applications import Starlette

    from millstream.engine.llm import AsyncLLM
    from millstream.serve.batch_lines import Answer
    from millstream.serve.caller import Caller
    from millstream.serve.inside import NoGate, ask
    from millstream.serve.metrics import Metrics
    from millstream.serve.observatory import Observatory
    from millstream.serve.openai.routes import routes
    from millstream.serve.service import Service
    from millstream.serve.vector_routes import routes as vector_routes

    with download_progress(model) as progress:
        llm = AsyncLLM(model, engine_config(args), progress=progress, notice=note)
    facts = await llm.client.facts()
    service = Service(llm.client, Observatory(Metrics(model, facts.limits.max_context, process=False)), NoGate())
    service.take(facts, llm.tokenizer)
    app = Starlette(routes=[*routes(service)[1], *vector_routes([service])])

    async def execute(endpoint: str, body: bytes, request_id: str) -> Answer:
        return await ask(app.router, endpoint, body, Caller(request_id))

    try:
        with _bar(one.summary) as shown:
            await one.run(execute, args.at_once, shown)
    finally:
        service.close()
        await llm.close()


def _bar(summary: Summary) -> Any:
    """A progress bar over requests, as a context that gives what is to be called after each."""
    import contextlib
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Iterator[Callable[[Summary], None]]:
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=summary.total, completed=summary.before)

            def step(now: Summary) -> None:
                progress.update(task, completed=now.before + now.completed + now.failed)

            yield step

    return shown()


def _tell(args: argparse.Namespace, summary: Summary, took_s: float) -> int:
    if args.json:
        found = {
            "requests": summary.total,
            "done_before": summary.before,
            "completed": summary.completed,
            "failed": summary.failed,
            "seconds": round(took_s, 3),
            "output_file": str(args.output_file),
        }
        emit(found)
    else:
        before = f", {summary.before} were there before" if summary.before else ""
        print(
            f"{summary.completed} of {summary.total} requests answered, {summary.failed} failed{before}; "
            f"{took_s:.1f} s; results in {args.output_file}"
        )
    return 1 if summary.failed else 0
