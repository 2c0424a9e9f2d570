"""OpenTelemetry traces: a span for every request that an engine worked on, with its phases as children.

Spans are made when a request has ended, out of its record and its timeline, so that a request that is under way carries
nothing. They follow the semantic conventions of `gen_ai`, beside the attributes that boards made for vLLM look for. The
caller's place in a trace comes from the `traceparent` header (W3C Trace Context). OpenTelemetry is imported only when
an endpoint is set (the extra `otel`); there is no global state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import millstream
from millstream.core.errors import ConfigError
from millstream.serve.records import Record
from millstream.serve.timeline import Timeline

_TRACEPARENT = re.compile(r"^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$")
MAX_QUEUED_SPANS = 8192


@dataclass(frozen=True, slots=True)
class Parent:
    """Where a request stands in its caller's trace."""

    trace_id: int
    span_id: int
    sampled: bool


def parent_of(traceparent: str) -> Parent | None:
    """Reads a `traceparent` header; None when there is none or it is not well formed, as the standard asks."""
    found = _TRACEPARENT.match(traceparent.strip())
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    trace_id, span_id = int(found[2], 16), int(found[3], 16)
    if not trace_id or not span_id:
        return None
    return Parent(trace_id, span_id, bool(int(found[4], 16) & 1))


def traces_url(endpoint: str) -> str:
    """The address that spans are posted to. An endpoint without a path is a collector, and gets the standard one."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"the OTLP endpoint is {endpoint!r}, expected an address such as http://127.0.0.1:4318")
    return endpoint if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


class Tracer:
    """Sends the spans of ended requests to a collector, in the background and in batches.

    What cannot be sent is dropped: tracing never slows a request down, and what waits to be sent is bounded. Raises
    ConfigError when the endpoint is no address or the extra `otel` is not installed.
    """

    def __init__(self, endpoint: str, service_name: str = "millstream", timeout_s: float = 5.0) -> None:
        url = traces_url(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
        except ImportError as error:
            raise ConfigError(f"traces need the extra 'otel': pip install 'millstream[otel]' ({error})") from error
        resource = Resource.create({"service.name": service_name, "service.version": millstream.__version__})
        self._provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url, timeout=timeout_s)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))
        self._tracer = self._provider.get_tracer("millstream", millstream.__version__)

    def ended(self, record: Record, timeline: Timeline | None) -> None:
        """Makes the spans of a request."""
        from opentelemetry import trace

        context = None
        parent = parent_of(record.traceparent)
        if parent is not None:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT)
            remote = trace.SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        begin = record.started_ns
        span = self._tracer.start_span(
            f"{record.operation} {record.model}".strip(),
            context=context,
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes(record)),
            start_time=begin,
        )
        if span.is_recording():
            if record.status >= 500 or "error" in record.finish:
                span.set_status(trace.Status(trace.StatusCode.ERROR, record.error or None))
            inside = trace.set_span_in_context(span)
            for phase, start, stop in phases(record):
                child = self._tracer.start_span(phase, context=inside, start_time=begin + _ns(start))
                child.end(begin + _ns(stop))
            for name, at, fields in happenings(timeline):
                span.add_event(name, fields, begin + _ns(at))
        span.end(begin + _ns(record.total_s))

    def close(self) -> None:
        """Sends what is left. Blocks for at most a few seconds."""
        self._provider.shutdown()


def attributes(record: Record) -> Iterator[tuple[str, Any]]:
    """The attributes of a request's span: counts, names and times, never text."""
    yield "gen_ai.operation.name", record.operation
    yield "gen_ai.provider.name", "millstream"
    yield "gen_ai.request.model", record.model
    yield "gen_ai.response.model", record.model
    yield "gen_ai.response.id", record.id
    yield "gen_ai.request.choice.count", record.n
    yield "gen_ai.usage.input_tokens", record.prompt_tokens
    yield "gen_ai.usage.output_tokens", record.output_tokens
    yield "gen_ai.usage.cache_read.input_tokens", record.cached_tokens
    if record.max_tokens is not None:
        yield "gen_ai.request.max_tokens", record.max_tokens
    for name, value in record.sampling.items():
        yield f"gen_ai.request.{name}", value
    if record.finish:
        yield "gen_ai.response.finish_reasons", list(record.finish)
    yield "http.response.status_code", record.status
    yield "http.route", record.route
    yield "millstream.tenant", record.tenant
    if record.program:
        yield "millstream.program", record.program
    if record.stage:
        yield "millstream.program.stage", record.stage
    yield "millstream.preemptions", record.preemptions
    if record.label:
        yield "millstream.request.label", record.label
    if record.error:
        yield "error.type", record.error
    # The names that vLLM's spans have for the same times.
    yield "gen_ai.latency.e2e", record.total_s
    if record.queue_s is not None:
        yield "gen_ai.latency.time_in_queue", record.queue_s
    if record.ttft_s is not None:
        yield "gen_ai.latency.time_to_first_token", record.ttft_s


def phases(record: Record) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of the phases of a request, in seconds from its arrival."""
    queued = min(record.queue_s or 0.0, record.total_s)
    if record.queue_s is not None:
        yield "queue", 0.0, queued
    if record.ttft_s is not None:
        yield "prefill", queued, max(queued, record.ttft_s)
        yield "decode", record.ttft_s, max(record.ttft_s, record.total_s)


def happenings(timeline: Timeline | None) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """The entries of a timeline that a trace marks: where chunks of the prompt ended, where its place was lost."""
    for entry in timeline.entries if timeline is not None else ():
        if entry["what"] in ("admitted", "prefill", "preempted") and entry["at_s"] is not None:
            fields = {name: value for name, value in entry.items() if name not in ("what", "at_s")}
            yield entry["what"], entry["at_s"], fields


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
