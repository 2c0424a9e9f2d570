"""Traces: what a collector gets over OTLP, decoded from the protobuf that was posted to it."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_bench import WatchedBench

from millstream.core.errors import ConfigError
from millstream.serve.records import Record
from millstream.serve.tracing import Parent, Tracer, parent_of, traces_url

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


class Collector:
    """Takes what is posted to it, and answers as a collector does."""

    def __init__(self, status: int = 200) -> None:
        bodies = self.bodies = []
        paths = self.paths = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                paths.append((self.path, self.headers["Content-Type"]))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def spans(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {one.key: one.value.string_value for one in resource.resource.attributes}
                assert named["service.name"] == "millstream" and named["service.version"]
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector():
    one = Collector()
    yield one
    one.close()


def plain(value):
    kind = value.WhichOneof("value")
    inner = getattr(value, kind)
    return [plain(one) for one in inner.values] if kind == "array_value" else inner


def attributes(span):
    return {one.key: plain(one.value) for one in span.attributes}


def served(url, **changes):
    """One request served under a tracer, and what was sent of it."""
    bench = WatchedBench(budget=8)
    tracer = bench.watched.tracer = Tracer(url)
    call = bench.begin(list(range(1, 13)), 4)
    for name, value in changes.items():
        setattr(call, name, value)
    bench.finish()
    tracer.close()
    return call


def test_a_request_is_a_span_with_its_phases_inside(collector):
    call = served(collector.url, sampling={"temperature": 0.5, "top_p": 0.9}, program="walk", stage="plan")
    assert collector.paths == [("/v1/traces", "application/x-protobuf")]
    spans = {span.name: span for span in collector.spans()}
    assert set(spans) == {"chat tiny", "queue", "prefill", "decode"}
    root = spans["chat tiny"]
    assert root.kind == 2 and root.parent_span_id == b""  # a server's span, the first of its trace
    assert all(spans[name].parent_span_id == root.span_id for name in ("queue", "prefill", "decode"))
    assert all(span.trace_id == root.trace_id for span in spans.values())
    told = attributes(root)
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.response.id"] == call.id and told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.usage.input_tokens"] == 12 and told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.max_tokens"] == 4
    assert told["gen_ai.latency.time_to_first_token"] == 2.0 and told["http.response.status_code"] == 200
    assert told["millstream.tenant"] == "acme"
    assert (told["millstream.program"], told["millstream.program.stage"]) == ("walk", "plan")
    assert [event.name for event in root.events] == ["admitted", "prefill", "prefill"]


def test_times_of_spans_follow_one_another_and_fill_the_request(collector):
    call = served(collector.url)
    spans = {span.name: span for span in collector.spans()}
    root = spans["chat tiny"]
    assert root.start_time_unix_nano == call.started_ns
    assert root.end_time_unix_nano - root.start_time_unix_nano == 5_000_000_000
    assert spans["prefill"].end_time_unix_nano - root.start_time_unix_nano == 2_000_000_000
    assert spans["prefill"].start_time_unix_nano == spans["queue"].end_time_unix_nano
    assert spans["decode"].start_time_unix_nano == spans["prefill"].end_time_unix_nano
    assert spans["decode"].end_time_unix_nano == root.end_time_unix_nano


def test_the_callers_trace_goes_on(collector):
    served(collector.url, traceparent=f"00-{TRACE}-{SPAN}-01")
    root = next(span for span in collector.spans() if span.name == "chat tiny")
    assert root.trace_id.hex() == TRACE and root.parent_span_id.hex() == SPAN


def test_what_the_caller_does_not_sample_is_not_sent(collector):
    served(collector.url, traceparent=f"00-{TRACE}-{SPAN}-00")
    assert collector.spans() == []


def test_no_text_is_in_a_span(collector):
    served(collector.url, label="a label of the client")
    for span in collector.spans():
        for name, value in attributes(span).items():
            assert not isinstance(value, str) or len(value) < 100, name
        assert not any("prompt" in name and name != "gen_ai.usage.input_tokens" for name in attributes(span))


def test_a_failure_is_an_error_and_says_its_code(collector):
    tracer = Tracer(collector.url)
    tracer.ended(Record("x", "chat", "/r", 500, 1.0, finish=("error",), error="engine_fault"), None)
    tracer.close()
    (root,) = collector.spans()
    assert root.status.code == 2 and attributes(root)["error.type"] == "engine_fault"


def test_a_collector_that_is_away_costs_a_request_nothing():
    collector = Collector()
    collector.close()
    tracer = Tracer(collector.url, timeout_s=0.2)
    for place in range(10):
        tracer.ended(Record(str(place), "chat", "/r", 200, 1.0, finish=("stop",)), None)
    tracer.close()


def test_requests_that_no_engine_worked_on_leave_no_span(collector):
    bench = WatchedBench()
    bench.watched.tracer = Tracer(collector.url)
    bench.watched.begin("x", "chat", "/r").end(429, shed="queue_full")
    bench.watched.tracer.close()
    assert collector.spans() == []


@pytest.mark.parametrize(
    ("given_url", "expected"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://c.example/otlp/v1/traces", "https://c.example/otlp/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_is_a_collector(given_url, expected):
    assert traces_url(given_url) == expected


@pytest.mark.parametrize("bad", ["", "127.0.0.1:4318", "grpc://x:1", "http://"])
def test_what_is_no_address_is_refused_with_an_example(bad):
    with pytest.raises(ConfigError, match=r"expected an address such as http://127\.0\.0\.1:4318"):
        Tracer(bad)


def test_a_traceparent_is_read_as_the_standard_says():
    assert parent_of(f"00-{TRACE}-{SPAN}-01") == Parent(int(TRACE, 16), int(SPAN, 16), True)
    assert parent_of(f"00-{TRACE}-{SPAN}-02") == Parent(int(TRACE, 16), int(SPAN, 16), False)
    # A later version may have more fields; what is known of it is read.
    assert parent_of(f"cc-{TRACE}-{SPAN}-01-more") is not None
    for bad in (
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
    ):
        assert parent_of(bad) is None, bad


@given(st.text(max_size=80))
def test_any_header_is_read_or_ignored(text):
    parent_of(text)


def test_opentelemetry_is_not_imported_without_an_endpoint():
    code = (
        "import sys, millstream.serve.observatory, millstream.serve.tracing; "
        "assert not any(name.split('.')[0] == 'opentelemetry' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
