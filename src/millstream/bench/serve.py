"""Load on a server over HTTP, any that speaks OpenAI's or Anthropic's API: what `millstream bench serve` runs.

Arrivals are open-loop: each request is sent at its time, however many are under way, so that a slow server is seen to
be slow. TTFT and E2EL count from that time, also where this client was late to send (`Client lag` says by how much).
With `max_concurrency` the load is closed-loop: requests wait here for a place, their times count from when they are
sent, and the wait is reported apart. The other definitions are those of metrics.py, stamped where bytes leave the
socket.

A 429 is a request that the server shed: counted by itself, neither successful nor failed. Shed and failed requests are
in no percentile and in no throughput.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from millstream.bench.backends import Backend, Options
from millstream.bench.http_client import HttpClient, SseSplitter
from millstream.bench.samples import Sample
from millstream.core.errors import BadRequest, MillstreamError
from millstream.sim.metrics import METRICS, RequestTiming, peak_open, peak_rate, percentile, statistics_of

GOODPUT_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Load:
    """How the samples are sent. `times_s` has a time for each sample, ascending; `goodput` is in seconds by metric."""

    times_s: Sequence[float]
    max_concurrency: int | None = None
    goodput: dict[str, float] = field(default_factory=dict)
    probe_rate: float = 0.0
    label: str = "bench-"

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise BadRequest("max_concurrency", self.max_concurrency, "an integer from 1")
        for name, limit in self.goodput.items():
            if name not in GOODPUT_NAMES:
                raise BadRequest("goodput", name, ", ".join(GOODPUT_NAMES))
            if not limit >= 0:
                raise BadRequest(f"goodput.{name}", limit, "milliseconds, a number from 0")


class Call:
    """One request under way, and then its stamps (perf_counter seconds). An Exchange."""

    __slots__ = (
        "_backend",
        "_body",
        "_done",
        "_sse",
        "cached",
        "due",
        "ended",
        "error",
        "finish",
        "num_output",
        "num_prompt",
        "pieces",
        "retry_after_s",
        "sample",
        "sent_at",
        "status",
        "times",
    )

    def __init__(self, sample: Sample, backend: Backend, due: float, done: Callable[[Call], None]) -> None:
        self.sample, self._backend, self.due, self._done = sample, backend, due, done
        self._sse: SseSplitter | None = None
        self._body: list[bytes] = []
        self.sent_at = self.ended = math.nan
        self.times: list[float] = []
        self.pieces: list[str] = []
        self.status = 0
        self.num_prompt: int | None = None
        self.num_output: int | None = None
        self.cached = 0
        self.finish = ""
        self.error: str | None = None
        self.retry_after_s: float | None = None

    def sent(self, now: float) -> None:
        # A request that had to be sent again, on a new connection, was sent the first time.
        if math.isnan(self.sent_at):
            self.sent_at = now

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        if status == 200 and headers.get("content-type", "").startswith("text/event-stream"):
            self._sse = SseSplitter()
        if "retry-after" in headers:
            try:
                self.retry_after_s = float(headers["retry-after"])
            except ValueError:
                self.retry_after_s = None

    def data(self, piece: bytes, now: float) -> None:
        if self._sse is None:
            self._body.append(piece)
            return
        for event in self._sse.push(piece):
            self._take(event, now)

    def end(self, error: str | None, now: float) -> None:
        self.ended = now
        if error is not None:
            self.error = self.error or error
        elif self.status != 200:
            self.error = f"{self.status}: {_error_of(b''.join(self._body))}"
        elif self._sse is None:
            self._take(b"".join(self._body), now, whole=True)
        elif not self.times and self.error is None and self.num_output is None:
            self.error = "the stream ended without a token"
        self._body.clear()
        self._done(self)

    def _take(self, event: bytes, now: float, whole: bool = False) -> None:
        try:
            said = self._backend.read(event)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self.error = self.error or f"an answer that cannot be read: {error}"
            return
        if said.error is not None:
            self.error = self.error or said.error
        if said.text is not None or whole:
            self.times.append(now)
        if said.text is not None:
            self.pieces.append(said.text)
        if said.num_prompt is not None:
            self.num_prompt = said.num_prompt
        if said.num_output is not None:
            self.num_output = said.num_output
        if said.cached is not None:
            self.cached = said.cached
        if said.finish is not None:
            self.finish = said.finish

    @property
    def shed(self) -> bool:
        return self.status == 429

    def timing(self, closed: bool) -> RequestTiming:
        """`closed`: times count from when it was sent, not from when it was due."""
        count = self.num_output if self.num_output is not None else len(self.times)
        return RequestTiming(
            self.sent_at if closed else self.due,
            tuple(self.times),
            self.num_prompt if self.num_prompt is not None else self.sample.num_prompt,
            count,
            self.cached,
            self.finish,
            self.error,
        )


class Run:
    """One load on one server. `progress` hears of each request that ended, shed and failed ones included."""

    def __init__(
        self, client: HttpClient, backend: Backend, endpoint: str, options: Options, progress: Callable[[], None] | None
    ) -> None:
        self._client, self._backend, self._endpoint, self._options = client, backend, endpoint, options
        self._progress = progress
        self._loop = asyncio.get_running_loop()

    async def wait_ready(self, sample: Sample, timeout_s: float, say: Callable[[str], None]) -> None:
        """Sends `sample` until it is answered. Raises MillstreamError, with the last answer, after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            call = await self._once(sample)
            if call.error is None:
                return
            # What is wrong with the request itself does not change by waiting.
            if time.monotonic() >= end or call.status in (400, 401, 403, 404, 405, 413, 415):
                raise MillstreamError(f"the server does not answer a first request: {call.error}")
            say(f"not ready: {call.error}")
            await asyncio.sleep(min(1.0, max(0.0, end - time.monotonic())))

    async def warm_up(self, sample: Sample, count: int, at_once: int) -> None:
        for start in range(0, count, at_once):
            await asyncio.gather(*(self._once(sample) for _ in range(min(at_once, count - start))))

    async def load(self, samples: Sequence[Sample], load: Load) -> Outcome:
        """Sends every sample at its time, and returns when all have ended."""
        bodies = [self._encode(sample) for sample in samples]
        finished = self._loop.create_future()
        calls: list[Call] = []
        queue: deque[int] = deque()
        left, inside = len(samples), 0
        limit = load.max_concurrency or len(samples)
        probes: list[Call] = []
        # Nothing of what is made here dies before the end: the collector would only look at it again and again.
        gc.collect()
        gc.freeze()
        start = time.perf_counter() + 0.05

        def ended(call: Call) -> None:
            nonlocal left, inside
            left -= 1
            inside -= 1
            if self._progress is not None:
                self._progress()
            if not left and not finished.done():
                finished.set_result(None)
            elif queue and inside < limit:
                send(queue.popleft())

        def send(place: int) -> None:
            nonlocal inside
            inside += 1
            call = calls[place]
            self._client.post(self._endpoint, bodies[place], call, f"{load.label}{place}")

        def due() -> None:
            """Sends what is due and sets the clock for what is next: never behind by more than the loop itself is."""
            now = time.perf_counter()
            while len(calls) < len(samples):
                at = start + load.times_s[len(calls)]
                if at > now:
                    self._loop.call_later(at - now, due)
                    return
                place = len(calls)
                calls.append(Call(samples[place], self._backend, at, ended))
                if inside < limit:
                    send(place)
                else:
                    queue.append(place)

        probing = asyncio.create_task(self._probe(load.probe_rate, probes)) if load.probe_rate > 0 else None
        try:
            due()
            if left:
                await finished
        finally:
            gc.unfreeze()
            if probing is not None:
                probing.cancel()
        duration = max((call.ended for call in calls), default=start) - start
        return Outcome(calls, load, start, duration, probes)

    async def _probe(self, rate: float, kept: list[Call]) -> None:
        """One-token requests beside the load, past its limit: what the load does to others."""
        sample = Sample("Hi", 1, 1)
        while True:
            kept.append(await self._once(sample))
            await asyncio.sleep(1 / rate)

    async def _once(self, sample: Sample) -> Call:
        done = asyncio.Event()
        call = Call(sample, self._backend, time.perf_counter(), lambda _: done.set())
        self._client.post(self._endpoint, self._encode(sample), call)
        await done.wait()
        return call

    def _encode(self, sample: Sample) -> bytes:
        return msgspec.json.encode(self._backend.body(sample, self._options))


@dataclass(slots=True)
class Outcome:
    """What came of a load. Seconds; `start` is on the clock of the calls."""

    calls: list[Call]
    load: Load
    start: float
    duration: float
    probes: list[Call] = field(default_factory=list)

    def result(self, metrics: Sequence[str], percentiles: Sequence[float], detailed: bool = False) -> dict[str, Any]:
        """The numbers, under the names that `vllm bench serve` saves them by, and what it does not have beside them.

        `detailed` adds a list with an entry for each request. Raises BadRequest for a metric that there is not.
        """
        closed = self.load.max_concurrency is not None
        good = [call for call in self.calls if call.error is None]
        shed = [call for call in self.calls if call.shed]
        timings = [call.timing(closed) for call in good]
        duration = self.duration
        prompt, output = sum(one.num_prompt for one in timings), sum(one.num_output for one in timings)
        late = [call.sent_at - call.due for call in self.calls if not math.isnan(call.sent_at)]
        errors = Counter(_kind(call) for call in self.calls if call.error is not None and not call.shed)
        found: dict[str, Any] = {
            "duration": duration,
            "completed": len(good),
            "failed": len(self.calls) - len(good) - len(shed),
            "shed": len(shed),
            "total_input_tokens": prompt,
            "total_cached_tokens": sum(one.cached_tokens for one in timings),
            "total_output_tokens": output,
            "request_throughput": len(good) / duration if duration else 0.0,
            "request_goodput": self._goodput(timings) / duration if self.load.goodput and duration else None,
            "slo_attainment": self._goodput(timings) / len(self.calls) if self.load.goodput else None,
            "output_throughput": output / duration if duration else 0.0,
            "total_token_throughput": (prompt + output) / duration if duration else 0.0,
            "max_output_tokens_per_s": peak_rate(timings),
            "max_concurrent_requests": peak_open([(call.sent_at, call.ended) for call in good]),
            "errors_by_kind": dict(errors.most_common()),
            "mean_retry_after_s": _mean([call.retry_after_s for call in shed if call.retry_after_s is not None]),
        }
        if not closed:
            found |= {
                "client_lag_p99_ms": percentile(sorted(late), 99) * 1000 if late else None,
                "client_lag_max_ms": max(late) * 1000 if late else None,
            }
        values = {
            "ttft": [one.ttft_s for one in timings if one.ttft_s is not None],
            "tpot": [one.tpot_s for one in timings if one.tpot_s is not None],
            "itl": [gap for one in timings for gap in one.gaps_s],
            "e2el": [one.e2el_s for one in timings if one.e2el_s is not None],
            "client_queue_time": [call.sent_at - call.due for call in good],
            "e2el_including_client_queue": [call.times[-1] - call.due for call in good if call.times],
        }
        for name in metrics:
            if name not in METRICS:
                raise BadRequest("percentile_metrics", name, ", ".join(METRICS))
            found |= statistics_of(name, values[name], percentiles)
        if self.probes:
            found |= self._probe_result()
        if detailed:
            found |= {
                "input_lens": [call.timing(closed).num_prompt for call in self.calls],
                "output_lens": [0 if call.error else call.timing(closed).num_output for call in self.calls],
                "ttfts": [call.timing(closed).ttft_s or 0.0 for call in self.calls],
                "itls": [call.timing(closed).gaps_s for call in self.calls],
                "latencies": [call.timing(closed).e2el_s or 0.0 for call in self.calls],
                "start_times": [call.sent_at - self.start for call in self.calls],
                "queue_times": [call.sent_at - call.due for call in self.calls],
                "statuses": [call.status for call in self.calls],
                "generated_texts": ["".join(call.pieces) for call in self.calls],
                "errors": [call.error or "" for call in self.calls],
            }
        return found

    def _goodput(self, timings: Sequence[RequestTiming]) -> int:
        """Requests that keep all limits; one of a single token has no pace to break."""
        kept = 0
        for one in timings:
            got = {"ttft": one.ttft_s or 0.0, "tpot": one.tpot_s or 0.0, "e2el": one.e2el_s or 0.0}
            kept += all(got[name] <= limit for name, limit in self.load.goodput.items())
        return kept

    def _probe_result(self) -> dict[str, Any]:
        latencies = sorted(call.ended - call.due for call in self.probes if call.error is None)
        return {
            "probe_completed": len(latencies),
            "probe_failed": len(self.probes) - len(latencies),
            "probe_median_e2el_ms": percentile(latencies, 50) * 1000 if latencies else None,
            "probe_p99_e2el_ms": percentile(latencies, 99) * 1000 if latencies else None,
            "probe_max_e2el_ms": latencies[-1] * 1000 if latencies else None,
        }


def scaled(samples: Sequence[Sample], rate_scale: float) -> list[float]:
    """The samples' own times, `rate_scale` times as fast. Raises BadRequest where the data set has none."""
    if not 0 < rate_scale < math.inf:
        raise BadRequest("rate_scale", rate_scale, "a number above 0")
    if any(sample.at_s is None for sample in samples):
        raise BadRequest("self_timed", True, "a data set that has times")
    return [(sample.at_s or 0.0) / rate_scale for sample in samples]


def in_order(samples: Sequence[Sample], times: Sequence[float]) -> tuple[list[Sample], list[float]]:
    """Samples and times by time, the first at 0."""
    pairs = sorted(zip(times, range(len(samples)), strict=True))
    first = pairs[0][0] if pairs else 0.0
    return [samples[place] for _, place in pairs], [at - first for at, _ in pairs]


async def models(client: HttpClient) -> list[tuple[str, int | None]]:
    """The ids of the models that the server lists, each with its context where it says so. Raises MillstreamError."""
    answer = await client.fetch("/v1/models")
    if answer.error is not None or answer.status != 200:
        said = answer.error or f"{answer.status}: {_error_of(answer.body)}"
        raise MillstreamError(f"GET /v1/models of {client.host}:{client.port}: {said}")
    try:
        return [(str(one["id"]), one.get("max_model_len")) for one in json.loads(answer.body)["data"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MillstreamError(f"GET /v1/models gave no list of models: {error}") from error


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _kind(call: Call) -> str:
    return " ".join((call.error or "").split())[:160]


def _error_of(body: bytes) -> str:
    try:
        error = json.loads(body)
        error = error.get("error", error) if isinstance(error, dict) else error
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        return body[:200].decode("utf-8", "replace")
