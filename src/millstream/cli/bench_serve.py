"""`millstream bench serve`: load a server over HTTP, this one or any that speaks OpenAI's or Anthropic's API.

The flags and the words of the result are those of `vllm bench serve`; docs/bench-serve.md says what each number means.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.cli.output import emit, json_only, note, progress_bar

if TYPE_CHECKING:
    from millstream.bench.http_client import HttpClient
    from millstream.bench.samples import Encodes, Plan, Sample
    from millstream.bench.serve import Outcome
    from millstream.sim.arrivals import RampUp

_SAMPLING = (
    ("--temperature", float),
    ("--top-p", float),
    ("--top-k", int),
    ("--min-p", float),
    ("--presence-penalty", float),
    ("--frequency-penalty", float),
    ("--repetition-penalty", float),
)
# A chat template and a begin token come on top of the words that are counted here.
_MARGIN = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    from millstream.bench.backends import BACKENDS
    from millstream.bench.samples import names

    server = parser.add_argument_group("server")
    server.add_argument("--backend", default="openai", choices=list(BACKENDS), help="the API (default openai)")
    server.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--endpoint", metavar="PATH", help="(default: the backend's own, such as /v1/completions)")
    server.add_argument(
        "--header", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="sent with each request"
    )
    server.add_argument("--api-key", metavar="KEY", help="(default: $OPENAI_API_KEY)")
    server.add_argument("--insecure", action="store_true", help="accept any certificate")
    server.add_argument("--model", metavar="NAME", help="(default: the first that the server lists)")
    server.add_argument("--served-model-name", metavar="NAME", help="what the API calls it (default: --model)")
    server.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a model to count prompt tokens with (default: --model where it is here; else a word counts as a token)",
    )
    server.add_argument("--skip-tokenizer-init", action="store_true", help="count words")
    server.add_argument(
        "--ready-check-timeout-sec", type=float, default=0.0, metavar="S", help="wait for the server this long at most"
    )
    server.add_argument("--request-timeout-sec", type=float, default=3600.0, metavar="S", help="(default 3600)")
    server.add_argument("--no-stream", action="store_true", help="ask for whole answers")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset-name", default="random", metavar="NAME", help=f"{', '.join(names())} (default random)")
    data.add_argument("--dataset-path", type=Path, metavar="FILE", help="of sharegpt, custom and timed_trace")
    data.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="(default 1000)")
    data.add_argument("--input-len", "--random-input-len", type=int, metavar="N", help="(random: 1024)")
    data.add_argument(
        "--output-len",
        "--random-output-len",
        "--sharegpt-output-len",
        "--custom-output-len",
        "--prefix-repetition-output-len",
        type=int,
        metavar="N",
        help="(random: 128; else as in the data)",
    )
    data.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths from (1-R) to (1+R)")
    data.add_argument("--random-prefix-len", "--prefix-repetition-prefix-len", type=int, metavar="N", dest="prefix_len")
    data.add_argument("--prefix-repetition-num-prefixes", type=int, default=10, metavar="N")
    data.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="times the lengths of a trace")
    data.add_argument("--disable-shuffle", action="store_true", help="take a data set in its order")
    data.add_argument("--no-oversample", action="store_true", help="no prompt twice, even if there are too few")
    data.add_argument("--ignore-eos", action="store_true", help="on for random data and traces")
    data.add_argument("--logprobs", type=int, metavar="N")
    data.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default 0)")
    for flag, kind in _SAMPLING:
        data.add_argument(flag, type=kind, metavar="N" if kind is int else "X")
    data.add_argument("--extra-body", type=_json, default={}, metavar="JSON", help="more fields of each request")

    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help="a second (default inf)")
    traffic.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1 is Poisson, less is burstier, more is more even"
    )
    traffic.add_argument("--ramp-up-strategy", choices=["linear", "exponential"])
    traffic.add_argument("--ramp-up-start-rps", type=float, metavar="R")
    traffic.add_argument("--ramp-up-end-rps", type=float, metavar="R")
    traffic.add_argument(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        help="send when the data say so (default for traces, where the data have times)",
    )
    traffic.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="times the pace of --self-timed")
    traffic.add_argument("--max-concurrency", type=int, metavar="N", help="hold requests back beyond this many")
    traffic.add_argument("--num-warmups", type=int, default=0, metavar="N")
    traffic.add_argument(
        "--probe-request-rate", type=float, default=0.0, metavar="R", help="one-token requests beside it"
    )
    traffic.add_argument("--request-id-prefix", default=f"bench-{os.getpid()}-", metavar="TEXT")

    report = parser.add_argument_group("report")
    report.add_argument(
        "--goodput", nargs="+", action="extend", default=[], metavar="NAME:MS", help="ttft:MS, tpot:MS, e2el:MS"
    )
    report.add_argument("--percentile-metrics", metavar="A,B", help="of ttft, tpot, itl, e2el, client_queue_time, ...")
    report.add_argument("--metric-percentiles", default="99", metavar="P,Q", help="(default 99)")
    report.add_argument("--save-result", action="store_true", help="write the result as JSON")
    report.add_argument("--save-detailed", action="store_true", help="with a list entry for each request")
    report.add_argument("--append-result", action="store_true", help="as a further line of the file")
    report.add_argument("--result-dir", type=Path, metavar="FOLDER")
    report.add_argument("--result-filename", metavar="FILE")
    report.add_argument("--label", metavar="TEXT", help="begins the file's name (default: the backend)")
    report.add_argument("--metadata", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="kept with it")
    report.add_argument("--plot-timeline", type=Path, metavar="PNG", help="requests over time (extra 'bench')")
    report.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    report.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    import importlib.util

    from millstream.core.errors import ConfigError

    if args.plot_timeline is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot-timeline needs matplotlib: pip install 'millstream[bench]'")
    with json_only(args.json):
        _many_files()
        found = _runner()(_bench(args))
        if args.json:
            emit(found)
    return 0 if found["completed"] else 1


async def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from millstream.bench import serve
    from millstream.bench.backends import BACKENDS, Options
    from millstream.bench.http_client import HttpClient
    from millstream.sim.metrics import lines

    backend = BACKENDS[args.backend]
    endpoint = args.endpoint or backend.endpoint
    metrics = (args.percentile_metrics or ("ttft,tpot,itl" if backend.streams else "e2el")).split(",")
    percentiles = _percentiles(args.metric_percentiles)
    goodput = _goodput(args.goodput)
    metadata = dict(_pairs("--metadata", args.metadata))
    ramp = _ramp_up(args)
    client = HttpClient(_url(args), _headers(args), insecure=args.insecure, timeout_s=args.request_timeout_sec)
    try:
        name, context = await _model(args, client)
        samples, times = await asyncio.to_thread(_samples, args, name, context, ramp)
        load = serve.Load(times, args.max_concurrency, goodput, args.probe_request_rate, args.request_id_prefix)
        sampling = {flag[2:].replace("-", "_"): getattr(args, flag[2:].replace("-", "_")) for flag, _ in _SAMPLING}
        extra = {key: value for key, value in sampling.items() if value is not None} | args.extra_body
        fixed = args.ignore_eos or (args.dataset_name not in ("sharegpt", "custom") and args.backend != "anthropic")
        options = Options(
            args.served_model_name or name, backend.streams and not args.no_stream, fixed, args.logprobs, extra
        )
        with progress_bar(len(samples), off=args.disable_tqdm) as advance:
            run = serve.Run(client, backend, endpoint, options, advance)
            if args.ready_check_timeout_sec > 0:
                await run.wait_ready(samples[0], args.ready_check_timeout_sec, note)
            if args.num_warmups > 0:
                await run.warm_up(samples[0], args.num_warmups, args.max_concurrency or 16)
            _say_traffic(args)
            outcome = await run.load(samples, load)
    finally:
        await client.close()
    result = outcome.result(metrics, percentiles, args.save_detailed)
    rate = args.request_rate if ramp is None and not _self_timed(args) else math.inf
    print("\n".join(lines(result, metrics, percentiles, args.max_concurrency, rate, not backend.streams)))
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    about = {
        "date": now,
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": name,
        "tokenizer_id": args.tokenizer or name,
        "num_prompts": len(samples),
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        **metadata,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    if _self_timed(args):
        about |= {"rate_scale": args.rate_scale, "length_scale": args.length_scale}
    if ramp is not None:
        about |= {
            "ramp_up_strategy": ramp.strategy,
            "ramp_up_start_rps": ramp.start,
            "ramp_up_end_rps": ramp.end,
        }
    found = {**about, **result}
    if args.plot_timeline is not None:
        _plot(outcome, args.plot_timeline, name)
    if args.save_result or args.append_result:
        _save(args, found, now)
    return found


def _samples(
    args: argparse.Namespace, model: str, context: int | None, ramp: RampUp | None
) -> tuple[list[Sample], list[float]]:
    from millstream.bench import samples as data
    from millstream.bench import serve
    from millstream.sim.arrivals import arrival_times

    limit = context - _MARGIN if context is not None and context > 2 * _MARGIN else None
    found, cut = data.make(_plan(args, limit), _tokenizer(args, model))
    if cut:
        note(f"{cut} of {len(found)} requests are longer than the model's context of {context} tokens: shortened")
    if _self_timed(args):
        return serve.in_order(found, serve.scaled(found, args.rate_scale))
    return found, arrival_times(len(found), args.request_rate, args.burstiness, ramp, args.seed)


def _plan(args: argparse.Namespace, limit: int | None) -> Plan:
    from millstream.bench.samples import Plan

    return Plan(
        args.dataset_name,
        args.dataset_path,
        args.num_prompts,
        args.input_len,
        args.output_len,
        args.random_range_ratio,
        args.prefix_len,
        args.prefix_repetition_num_prefixes,
        args.length_scale,
        limit,
        not args.disable_shuffle and not _self_timed(args),
        not args.no_oversample and not _self_timed(args),
        args.seed,
    )


def _tokenizer(args: argparse.Namespace, model: str) -> Encodes | None:
    """The asked tokenizer, or the model's own if it is on this machine: a load downloads nothing by itself."""
    if args.skip_tokenizer_init:
        return None
    from millstream.core.errors import MillstreamError
    from millstream.models import store
    from millstream.models.opened import open_model

    if args.tokenizer is not None:
        from millstream.cli.output import download_progress

        with download_progress(args.tokenizer) as progress:
            return open_model(args.tokenizer, progress, note).tokenizer()
    try:
        store.resolve(model, download=False)
        return open_model(model).tokenizer()
    except MillstreamError as error:
        note(f"a word counts as a token of a prompt (--tokenizer names a model to count with): {error}")
        return None


def _self_timed(args: argparse.Namespace) -> bool:
    from millstream.sim.traces import TRACES

    if args.self_timed is not None:
        return bool(args.self_timed)
    return args.dataset_name in TRACES or args.dataset_name == "timed_trace"


def _ramp_up(args: argparse.Namespace) -> RampUp | None:
    from millstream.core.errors import ConfigError
    from millstream.sim.arrivals import RampUp

    if args.ramp_up_strategy is None:
        return None
    if not math.isinf(args.request_rate):
        raise ConfigError("--ramp-up-strategy sets the rate; leave --request-rate out")
    if args.ramp_up_start_rps is None or args.ramp_up_end_rps is None:
        raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    return RampUp(args.ramp_up_strategy, args.ramp_up_start_rps, args.ramp_up_end_rps)


async def _model(args: argparse.Namespace, client: HttpClient) -> tuple[str, int | None]:
    """The model's name, and its context where the server says so."""
    from millstream.bench import serve
    from millstream.core.errors import MillstreamError

    end = time.monotonic() + args.ready_check_timeout_sec
    while True:
        try:
            found = await serve.models(client)
            break
        except MillstreamError:
            if time.monotonic() < end:
                await asyncio.sleep(0.5)
            elif args.model is not None:
                return args.model, None
            else:
                raise
    if args.model is None:
        if not found:
            raise MillstreamError("the server lists no model; name one with --model")
        return found[0]
    asked = args.served_model_name or args.model
    return args.model, next((context for name, context in found if name == asked), None)


def _url(args: argparse.Namespace) -> str:
    if args.base_url is not None:
        return str(args.base_url).removesuffix("/").removesuffix("/v1")
    return f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"


def _headers(args: argparse.Namespace) -> dict[str, str]:
    headers = {}
    if key := args.api_key or os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
        if args.backend == "anthropic":
            headers |= {"x-api-key": key, "anthropic-version": "2023-06-01"}
    return headers | dict(_pairs("--header", args.header))


def _goodput(given: list[str]) -> dict[str, float]:
    from millstream.core.errors import ConfigError

    found = {}
    for pair in given:
        name, colon, value = pair.partition(":")
        try:
            found[name] = float(value) / 1000
        except ValueError:
            colon = ""
        if not colon:
            raise ConfigError(f"--goodput {pair}: a metric and its milliseconds, such as ttft:200")
    return found


def _percentiles(given: str) -> list[float]:
    from millstream.core.errors import ConfigError

    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= q <= 100 for q in found):
        raise ConfigError(f"--metric-percentiles {given}: numbers from 0 to 100, such as 50,90,99")
    return found


def _pairs(flag: str, given: list[str]) -> Iterator[tuple[str, str]]:
    from millstream.core.errors import ConfigError

    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{flag} {pair}: KEY=VALUE")
        yield key.strip(), value.strip()


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("a JSON object")
    return found


def _say_traffic(args: argparse.Namespace) -> None:
    if _self_timed(args):
        note(f"Traffic: the data's own times, {args.rate_scale:g} times as fast")
    elif args.ramp_up_strategy is not None:
        note(f"Traffic ramp-up strategy: {args.ramp_up_strategy}.")
    else:
        note(f"Traffic request rate: {args.request_rate}")
        if not math.isinf(args.request_rate):
            shape = "Poisson process" if args.burstiness == 1 else "Gamma distribution"
            note(f"Burstiness factor: {args.burstiness} ({shape})")
    note(f"Maximum request concurrency: {args.max_concurrency}")


def _save(args: argparse.Namespace, found: dict[str, Any], now: str) -> None:
    held = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    model = found["model_id"].rsplit("/", 1)[-1]
    name = args.result_filename or f"{args.label or args.backend}-{found['request_rate']}qps{held}-{model}-{now}.json"
    path = (args.result_dir or Path()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, default=str)
    if args.append_result:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        path.write_text(text + "\n", encoding="utf-8")
    note(f"result: {path}")


def _plot(outcome: Outcome, path: Path, model: str) -> None:
    """Each request a line: waiting for its first token, then the gaps between tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    calls = [call for call in outcome.calls if call.times]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    first = [call.times[0] - outcome.start for call in calls]
    rows = range(len(calls))
    axes.hlines(
        rows, [call.due - outcome.start for call in calls], first, color="tab:orange", label="to the first token"
    )
    axes.hlines(rows, first, [call.times[-1] - outcome.start for call in calls], color="tab:blue", label="tokens")
    shed = [call.due - outcome.start for call in outcome.calls if call.shed]
    if shed:
        axes.plot(shed, [-1] * len(shed), "x", color="tab:red", label="shed (429)")
    axes.set(xlabel="seconds", ylabel="request", title=f"{model}: {len(calls)} requests over time")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    note(f"plot: {path}")


def _runner() -> Callable[[Any], Any]:
    """uvloop's where it is installed: it leaves the server more of a shared core."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run
    return asyncio.run


def _many_files() -> None:
    """As many sockets as this process may have: an open-loop load opens one a request under way."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
