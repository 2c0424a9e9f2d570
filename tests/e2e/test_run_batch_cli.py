"""`millstream run-batch` on a tiny random model: what it writes is what the server's routes would answer."""

from __future__ import annotations

import json

import pytest

from millstream.cli.main import main
from tiny_files import build_model

OPTIONS = ["--set", "runner.ops=ref", "--set", "runner.attention=torch-ref", "--set", 'cache.bytes="16MB"']


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_model(tmp_path_factory.mktemp("m") / "tiny"))


def line(custom_id: str, url: str, **body):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def test_a_file_of_requests_is_answered_and_taken_up(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "seed": 1}
    rows = [line(f"c{i}", "/v1/chat/completions", **chat) for i in range(5)]
    rows += [
        line("text", "/v1/completions", prompt="abc", max_tokens=4, temperature=0),
        line("wrong", "/v1/chat/completions", messages=[], max_tokens=5),
        line("streamed", "/v1/chat/completions", **chat, stream=True),
        line("elsewhere", "/v1/nothing", prompt="x"),
        "no json",
    ]
    source.write_text("\n".join(rows))
    words = ["run-batch", model, "-i", str(source), "-o", str(target), "--json", *OPTIONS]
    assert main(words) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["requests"], told["completed"], told["failed"]) == (10, 6, 4)
    found = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    texts = {found[f"c{i}"]["response"]["body"]["choices"][0]["message"]["content"] for i in range(5)}
    assert len(texts) == 1
    assert found["text"]["response"]["body"]["usage"]["completion_tokens"] <= 4
    assert found["wrong"]["response"]["status_code"] == 400
    assert found["wrong"]["response"]["body"]["error"]["param"] == "messages"
    # What was answered stays; what was wrong is told once more.
    before = target.read_text()
    main(words)
    told = json.loads(capsys.readouterr().out)
    assert told["done_before"] >= 7 and told["completed"] == 0
    assert {row["custom_id"]: row["response"] for row in map(json.loads, before.splitlines())} == {
        row["custom_id"]: row["response"] for row in map(json.loads, target.read_text().splitlines())
    }


def test_what_is_missing_is_told_before_a_model_is_loaded(model, tmp_path, capsys):
    words = ["run-batch", model, "-i", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(words) == 1 and "none.jsonl: is no file" in capsys.readouterr().err
    assert main(["run-batch", "-i", "a", "-o", "b"]) == 1 and "no model was named" in capsys.readouterr().err
