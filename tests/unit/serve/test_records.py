"""The completion line: one JSON object a request, with counts and times and without any text."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

from watched_bench import WatchedBench

from millstream.serve.records import JsonLines, Record, log


def lines_of(act) -> list[dict]:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("millstream.serve.requests")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        act()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_one_line_a_request_with_what_an_operator_asks_for():
    bench = WatchedBench()

    def act():
        call = bench.begin([1, 2, 3], 3)
        call.label = "from-the-client"
        bench.finish()
        call.end(500)

    (line,) = lines_of(act)
    assert line["event"] == "request" and line["level"] == "info"
    assert line["id"] == "call-" + "0" * 32 and line["label"] == "from-the-client"
    assert (line["tenant"], line["model"], line["status"], line["finish"]) == ("acme", "tiny", 200, "length")
    assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (3, 0, 3)
    assert (line["ttft_s"], line["tpot_s"], line["total_s"]) == (1.0, 1.0, 3.0)
    assert line["time"].endswith("Z")


def test_what_never_happened_is_null_and_what_is_usual_is_left_out():
    (line,) = lines_of(lambda: log(Record("x", "chat", "/v1/chat/completions", 429, 0.001, shed="queue_full")))
    assert line["ttft_s"] is None and line["tpot_s"] is None and line["finish"] == ""
    assert line["shed"] == "queue_full" and "stream" not in line and "preemptions" not in line


def test_labels_of_clients_cannot_forge_a_line():
    record = Record("x", "chat", "/r", 200, 0.1, label='a"}\n{"event": "request", "id": "forged"}\u2028')
    (line,) = lines_of(lambda: log(record))
    assert line["id"] == "x" and "forged" in line["label"]


def test_other_messages_are_lines_too():
    formatter = JsonLines()
    try:
        raise ValueError("why")
    except ValueError as error:
        told = logging.LogRecord(
            "millstream.x", logging.ERROR, "f.py", 1, "it %s", ("broke",), (ValueError, error, None)
        )
    line = json.loads(formatter.format(told))
    assert line["message"] == "it broke" and line["level"] == "error" and "ValueError: why" in line["exception"]


def test_everything_can_be_logged_as_json():
    code = (
        "import logging; from millstream.serve.records import Record, log, log_json; log_json();"
        "logging.getLogger('x').warning('hello'); log(Record('id', 'chat', '/r', 200, 0.5))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    first, second = map(json.loads, told.splitlines())
    assert first["message"] == "hello" and first["level"] == "warning"
    assert second["event"] == "request" and second["status"] == 200
