"""Throughput and latency of a model in this process, and the start of a fresh one.

throughput  `num_prompts` requests, at most `batch` inside at once; the next one is let in when one leaves. How much
            work a full engine does.
latency     `batch` requests that arrive together, repeated. What one of them waits.
start_up    a fresh process of `millstream complete`, from the start of the process to its first token.

Greedy, ignoring the model's end token, so that every run makes the same number of tokens. Prompts differ between
repeats and each request has its own cache salt, so that the prefix cache cannot help. Metrics: see metrics.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.bench.load import Ask, random_prompts, run_load, text_prompts
from millstream.core.errors import BadRequest, MillstreamError
from millstream.core.request import SamplingParams
from millstream.sim.metrics import LoadReport

if TYPE_CHECKING:
    from millstream.engine.llm import LLM

RATES = (
    "requests_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "duration_s",
)
TIMES = ("ttft_s", "itl_s", "tpot_s", "e2el_s")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens. `text` gives the prompts as windows of a tokenized text; without it they are random tokens."""

    input_len: int = 128
    output_len: int = 32
    num_prompts: int = 32
    batch: int = 32
    seed: int = 0
    text: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "batch"):
            if getattr(self, name) < 1:
                raise BadRequest(name, getattr(self, name), "an integer from 1")

    def asks(self, llm: LLM, count: int, repeat: int) -> list[Ask]:
        """The requests of one repeat: other prompts in each, the same for the same seed."""
        lengths, seed = [self.input_len] * count, hash((self.seed, repeat)) & 0x7FFFFFFF
        if self.text:
            prompts = text_prompts(self.text, lengths, seed)
        else:
            vocabulary = llm.tokenizer.vocabulary
            banned = frozenset(vocabulary.special_ids) | frozenset(llm.tokenizer.stop_ids)
            prompts = random_prompts(llm.assembled.spec.vocab_size, lengths, seed, banned)
        params = SamplingParams(max_tokens=self.output_len, temperature=0.0, ignore_eos=True)
        return [Ask(ids, params, salt=f"bench-{seed}-{repeat}-{place}") for place, ids in enumerate(prompts)]


def throughput(
    llm: LLM, work: Workload, repeats: int = 3, warmup: int = 1, say: Say = lambda text: None
) -> list[LoadReport]:
    """One report a repeat; the warm-up runs are a batch each and are not reported. Raises BadRequest."""
    return _repeat(llm, work, repeats, warmup, say, work.num_prompts, work.batch)


def latency(
    llm: LLM, work: Workload, repeats: int = 5, warmup: int = 1, say: Say = lambda text: None
) -> list[LoadReport]:
    """One report a repeat of `batch` requests that arrive together. Raises BadRequest."""
    return _repeat(llm, work, repeats, warmup, say, work.batch, None)


def _repeat(
    llm: LLM, work: Workload, repeats: int, warmup: int, say: Say, count: int, concurrency: int | None
) -> list[LoadReport]:
    if repeats < 1:
        raise BadRequest("repeats", repeats, "an integer from 1")
    for turn in range(warmup):
        say(f"warm-up {turn + 1} of {warmup}")
        run_load(llm, work.asks(llm, min(count, work.batch), -1 - turn), concurrency=concurrency)
    reports = []
    for turn in range(repeats):
        report = run_load(llm, work.asks(llm, count, turn), concurrency=concurrency).report()
        if report.failed:
            raise MillstreamError(f"{report.failed} of {report.requests} requests failed in repeat {turn + 1}")
        say(f"repeat {turn + 1} of {repeats}: {report.total_tokens_per_s:.1f} tokens/s in {report.duration_s:.2f} s")
        reports.append(report)
    return reports


def medians(reports: Sequence[LoadReport]) -> dict[str, Any]:
    """Each rate and each percentile as its median over the repeats."""
    out: dict[str, Any] = {name: statistics.median(getattr(one, name) for one in reports) for name in RATES}
    for name in TIMES:
        out[name] = {
            part: statistics.median(getattr(getattr(one, name), part) for one in reports)
            for part in ("mean", "p50", "p90", "p99", "max")
        }
    return out


def spread(reports: Sequence[LoadReport]) -> dict[str, dict[str, float]]:
    """Lowest and highest of each rate, and of the median time to first token and between tokens, over the repeats."""
    values = {name: [getattr(one, name) for one in reports] for name in RATES}
    for name in TIMES:
        values[f"{name}.p50"] = [getattr(one, name).p50 for one in reports]
    return {name: {"low": min(found), "high": max(found)} for name, found in values.items()}


def as_rows(reports: Sequence[LoadReport]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]


# -- start-up


@dataclass(frozen=True, slots=True)
class Start:
    """One start. `total_s` is to the first token, `wall_s` to the end of the process; `phases_s` are in order."""

    state: str
    total_s: float
    wall_s: float
    phases_s: dict[str, float]


def start_up(
    model: Path, arguments: Sequence[str], cold: int, warm: int, limit_s: float = 900.0, say: Say = lambda text: None
) -> tuple[list[Start], list[Start]]:
    """(cold starts, warm starts) of `python -m millstream complete`, each a process of its own.

    A cold start has an empty MILLSTREAM_HOME, so it converts the weights, builds the tokenizer and compiles kernels;
    the warm ones use the home that the last cold one filled. The system's page cache is left as it is. Raises
    MillstreamError when a start fails.
    """
    if cold < 1 or warm < 1:
        raise BadRequest("repeats", min(cold, warm), "an integer from 1")
    colds, warms = [], []
    with tempfile.TemporaryDirectory(prefix="millstream-startup-") as scratch:
        for turn in range(cold):
            place = Path(scratch) / f"home-{turn}"
            colds.append(_start(model, arguments, place, limit_s))
            say(f"cold {turn + 1} of {cold}: {colds[-1].total_s:.2f} s")
        for turn in range(warm):
            warms.append(_start(model, arguments, place, limit_s))
            say(f"warm {turn + 1} of {warm}: {warms[-1].total_s:.2f} s")
    return colds, warms


def _start(model: Path, arguments: Sequence[str], place: Path, limit_s: float) -> Start:
    command = [sys.executable, "-m", "millstream", "complete", str(model), "Once upon a time"]
    command += ["--max-tokens", "1", "--temperature", "0", "--json", "--timing", *arguments]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "MILLSTREAM_HOME": str(place)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
        )
        wall = time.perf_counter() - started
        timing = json.loads(done.stdout)["timing"]
    except subprocess.TimeoutExpired:
        raise MillstreamError(f"a start took more than {limit_s:.0f} s") from None
    except (ValueError, KeyError):
        raise MillstreamError(f"a start failed: {done.stderr.strip()[-500:]}") from None
    return Start(timing["state"], timing["total_s"], wall, timing["phases_s"])
