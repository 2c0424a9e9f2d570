"""The completion line: one JSON object a request, with counts and times and without any text."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

from watched_bench import WatchedBench

from millstream.core.logs import JsonLines, TextLines, set_up_logs
from millstream.serve.records import Record, log


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
        "import logging; from millstream.core.logs import set_up_logs;"
        "from millstream.serve.records import Record, log;"
        "set_up_logs('json'); logging.getLogger('x').warning('hello'); log(Record('id', 'chat', '/r', 200, 0.5))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    first, second = map(json.loads, told.splitlines())
    assert first["message"] == "hello" and first["level"] == "warning"
    assert second["event"] == "request" and second["status"] == 200


def test_a_line_for_people_has_the_fields_and_no_second_line():
    told = logging.LogRecord("millstream.x", logging.INFO, "f.py", 1, "%s 200", ("/r",), None)
    told.fields = {"label": "a\nforged line", "output_tokens": 3}
    line = TextLines().format(told)
    assert line.endswith(' INFO millstream.x /r 200 label="a\\nforged line" output_tokens=3')


def test_logs_may_be_set_up_anew():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        out = io.StringIO()
        set_up_logs("text", "warning", out)
        logging.getLogger("x").info("quiet")
        logging.getLogger("x").warning("loud")
        assert "loud" in out.getvalue() and "quiet" not in out.getvalue()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
