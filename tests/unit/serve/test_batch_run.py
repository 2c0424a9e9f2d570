"""`millstream run-batch` without a model: lines in, results out, and again after an interruption."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from batch_bench import ENDPOINT, as_lines, echo, request

from millstream.core.errors import BadFile, BadRequest
from millstream.serve.batch_lines import Answer, BatchLimits
from millstream.serve.batch_run import BatchRun


async def answer(endpoint, body, label):
    return await echo(endpoint, body, "", label)


def batch(tmp_path, *rows, **given) -> BatchRun:
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_lines(*rows))
    return BatchRun(source, tmp_path / "out.jsonl", (ENDPOINT,), **given)


def run(one: BatchRun, execute=answer, at_once=4):
    one.prepare()
    asyncio.run(one.run(execute, at_once))
    return [json.loads(line) for line in one.target.read_text().splitlines()]


def test_results_come_in_the_order_of_the_requests(tmp_path):
    async def backwards(endpoint, body, label):
        await asyncio.sleep(0.03 / (1 + int(json.loads(body)["messages"][0]["content"])))
        return await answer(endpoint, body, label)

    one = batch(tmp_path, *(request(f"c{i}", str(i)) for i in range(12)))
    rows = run(one, backwards, at_once=12)
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(12)]
    assert [row["response"]["body"]["said"] for row in rows] == [str(i) for i in range(12)]
    assert (one.summary.total, one.summary.completed, one.summary.failed, one.summary.before) == (12, 12, 0, 0)


def test_no_more_are_under_way_than_may_be(tmp_path):
    now, most = [0], [0]

    async def counted(endpoint, body, label):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.002)
        now[0] -= 1
        return await answer(endpoint, body, label)

    run(batch(tmp_path, *(request(f"c{i}") for i in range(20))), counted, at_once=3)
    assert most == [3]


def test_wrong_lines_fail_alone(tmp_path):
    one = batch(
        tmp_path,
        request("a"),
        b"{nonsense",
        request("b", "bad"),
        request("a"),
        request("c", url="/v1/other"),
        request("d", "x" * 3000),
        request("e"),
        limits=BatchLimits(line_bytes=2000),
    )
    rows = run(one)
    assert [row["custom_id"] for row in rows[:3]] == ["a", "b", "e"]
    assert rows[1]["response"]["status_code"] == 400
    codes = [row["error"]["code"] for row in rows[3:]]
    assert codes == ["invalid_json_line", "duplicate_custom_id", "mismatched_url", "line_too_long"]
    assert "line 2" in rows[3]["error"]["message"] and "line 4" in rows[4]["error"]["message"]
    assert (one.summary.completed, one.summary.failed) == (2, 5)


def test_a_second_run_does_only_what_is_missing(tmp_path):
    asked = []

    async def counted(endpoint, body, label):
        said = json.loads(body)["messages"][0]["content"]
        asked.append(said)
        if said == "later" and asked.count("later") == 1:
            return Answer(503, b'{"error": {"message": "not now"}}', label)
        return await answer(endpoint, body, label)

    rows = [request("a", "one"), request("b", "bad"), request("c", "later")]
    run(batch(tmp_path, *rows), counted)
    one = batch(tmp_path, *rows, request("d", "new"))
    found = run(one, counted)
    assert sorted(asked) == ["bad", "later", "later", "new", "one"]
    assert [row["custom_id"] for row in found] == ["a", "b", "c", "d"] and one.summary.before == 2
    assert [row["response"]["status_code"] for row in found] == [200, 400, 200, 200]


def test_a_killed_run_is_taken_up(tmp_path):
    """kill -9 while lines are written, then the same command again; a line that was written in part is done again."""
    log = tmp_path / "log"
    code = (
        "import asyncio, json, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_batch_run import BatchRun, ENDPOINT, answer\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[2])\n"
        "async def slow(endpoint, body, label):\n"
        "    await asyncio.sleep(0.01)\n"
        "    with (folder / 'log').open('a') as file: file.write(json.loads(body)['messages'][0]['content'] + '\\n')\n"
        "    return await answer(endpoint, body, label)\n"
        "one = BatchRun(folder / 'in.jsonl', folder / 'out.jsonl', (ENDPOINT,))\n"
        "one.prepare()\n"
        "asyncio.run(one.run(slow, 2))\n"
    )
    one = batch(tmp_path, *(request(f"c{i}", f"line {i}") for i in range(40)))
    command = [sys.executable, "-c", code, os.path.dirname(__file__), str(tmp_path)]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + 30
        while (len(log.read_text().splitlines()) if log.exists() else 0) < 15 and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with one.target.open("ab") as file:
        file.write(b'{"id": "batch_req_x", "custom_id": "c3')
    subprocess.run(command, timeout=60, check=True)
    rows = [json.loads(line) for line in one.target.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(40)]
    assert len(log.read_text().splitlines()) <= 42


def test_files_that_are_no_batch_are_told(tmp_path):
    with pytest.raises(BadFile, match="no file"):
        BatchRun(tmp_path / "none.jsonl", tmp_path / "out.jsonl", (ENDPOINT,))
    with pytest.raises(BadFile, match="no requests"):
        batch(tmp_path).prepare()
    one = batch(tmp_path, request("a"))
    with pytest.raises(BadRequest, match="another file"):
        BatchRun(one.source, one.source, (ENDPOINT,))
    one.target.write_text("my thesis\n")
    with pytest.raises(BadFile, match="line 1"):
        one.prepare()
    one.target.write_text('{"a": 1}\n')
    with pytest.raises(BadFile, match="another output"):
        one.prepare()
    assert one.target.read_text() == '{"a": 1}\n'
