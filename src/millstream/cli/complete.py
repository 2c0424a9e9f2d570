"""`millstream complete`: continue a text (or answer it, with --chat) and print the words as they come."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from millstream.cli.options import MODEL_HELP, engine_arguments, open_llm, sampling_arguments, sampling_params
from millstream.cli.output import emit, json_only, note, print_table

if TYPE_CHECKING:
    from millstream.engine.llm import LLM
    from millstream.engine.outputs import CompletionOutput, RequestOutput


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("text", help="what to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="ask it as a chat message, by the model's template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it (implies --chat)")
    parser.add_argument("--echo", action="store_true", help="print the text itself first")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="this many continuations")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="the logprob of each token, with N alternatives (0: none)"
    )
    parser.add_argument("--timing", action="store_true", help="where the time until the first token went")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when done, instead of the text")
    sampling_arguments(parser)
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.cli.timing import StartUp

    with json_only(args.json):
        start_up = StartUp(args.argv_started_s)
        text = sys.stdin.read() if args.text == "-" else args.text
        import millstream.engine.llm  # noqa: F401  (so that its import has a phase of its own)

        start_up.lap("import engine")
        start_up.look()
        with open_llm(args) as llm:
            start_up.add(llm.assembled.phases)
            return _complete(args, llm, text, start_up)


def _complete(args: argparse.Namespace, llm: LLM, text: str, start_up: Any) -> int:
    from millstream.cli.streaming import stream

    if args.chat or args.system is not None:
        messages = [{"role": "user", "content": text}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        ids = llm.chat_ids(messages)
    else:
        ids = llm.prompt_ids(text)[1]
    given: dict[str, Any] = {"n": args.n}
    if args.logprobs is not None:
        given["logprobs"] = args.logprobs
    params = sampling_params(args, llm, len(ids), **given)
    start_up.lap("tokenize the prompt")
    live = args.n == 1 and not args.json

    def show(index: int, piece: str) -> None:
        if live:
            sys.stdout.write(piece)
            sys.stdout.flush()

    if live and args.echo:
        show(0, text)
    done = stream(llm, text, ids, params, show)
    if done.first_token_s is not None:
        start_up.lap("first token", done.first_token_s)
    out = done.output
    if args.json:
        value = as_json(llm, out, time.perf_counter() - done.asked_s)
        emit({**value, "timing": start_up.as_json()} if args.timing else value)
        return 0
    if live:
        print()
    for one in out.outputs if not live else ():
        print(f"[{one.index}] {text if args.echo else ''}{one.text}")
    if args.logprobs is not None:
        for one in out.outputs:
            _print_logprobs(one, out)
    if args.timing:
        sys.stdout.flush()
        start_up.print()
    return 0


def as_json(llm: LLM, out: RequestOutput, seconds: float) -> dict[str, Any]:
    """A request's output with its counts and times (seconds)."""
    tokens = sum(len(one.token_ids) for one in out.outputs)
    return {
        "model": llm.model,
        "prompt": out.prompt,
        "prompt_token_ids": out.prompt_token_ids,
        "outputs": [
            {
                "index": one.index,
                "text": one.text,
                "token_ids": one.token_ids,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "cumulative_logprob": one.cumulative_logprob,
                "logprobs": _logprobs(one),
            }
            for one in out.outputs
        ],
        "usage": {
            "prompt_tokens": len(out.prompt_token_ids),
            "completion_tokens": tokens,
            "cached_tokens": out.metrics.cached_tokens,
        },
        "metrics": {
            "queue_s": out.metrics.queue_s,
            "ttft_s": out.metrics.ttft_s,
            "total_s": out.metrics.total_s,
            "output_tokens_per_s": tokens / seconds,
        },
    }


def _logprobs(one: CompletionOutput) -> list[list[dict[str, Any]]] | None:
    if one.logprobs is None:
        return None
    return [
        [
            {"token_id": token, "token": found.decoded_token, "logprob": found.logprob, "rank": found.rank}
            for token, found in sorted(position.items(), key=lambda pair: pair[1].rank)
        ]
        for position in one.logprobs
    ]


def _print_logprobs(one: CompletionOutput, out: RequestOutput) -> None:
    rows = []
    for token, position in zip(one.token_ids, one.logprobs or [], strict=False):
        own = position[token]
        others = [
            f"{found.decoded_token!r} {found.logprob:.3f}"
            for other, found in sorted(position.items(), key=lambda pair: pair[1].rank)
            if other != token
        ]
        rows.append((repr(own.decoded_token), f"{own.logprob:.4f}", own.rank, "  ".join(others)))
    if len(out.outputs) > 1:
        note(f"[{one.index}]")
    print_table(("token", "logprob", "rank", "instead"), rows, right=(1, 2))
