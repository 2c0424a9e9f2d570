"""The whole comparison, with workers that are processes and engines that are none."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
from peers import __main__ as driver
from peers.install import NotInstalled
from peers.launch import Launch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
ENGINE = """
import sys, time
from peers.protocol import imported, serve

class Fake:
    def __init__(self, setup):
        imported()
        self.step_s = setup["step_s"]
        self.told = {"engine": "fake", "version": "1", "precision": "none", "set": "nothing"}
    def generate(self, prompts, output_len):
        time.sleep(self.step_s * output_len)
        return [[ids[-1]] * output_len for ids in prompts]
    def score(self, prompts):
        return -2.0 * sum(len(ids) - 1 for ids in prompts), sum(len(ids) - 1 for ids in prompts)

sys.exit(serve(Fake))
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """`millstream` and `vllm` are fakes, the second half as fast; `openvino` is not installed."""
    package = tmp_path / "fakes"
    package.mkdir()
    (package / "fake_engine.py").write_text(ENGINE)

    def prepare(name, bench):
        if name == "openvino":
            raise NotInstalled("its environment is not there")
        setup = bench.setup(step_s=0.01 if name == "vllm" else 0.005)
        env = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{package}"}
        return Fake(name, "x", Path(sys.executable), setup, env, tmp_path / "logs" / f"{name}.log")

    class Fake(Launch):
        def start(self):
            from peers.protocol import Worker

            return Worker(self.name, [str(self.python), "-m", "fake_engine"], self.setup, self.log, self.env)

    tokenizer = types.SimpleNamespace(encode=lambda text, add_bos: list(range(len(text))))
    source = types.SimpleNamespace(stored_bytes=lambda: 1)
    opened = types.SimpleNamespace(source=source, tokenizer=lambda: tokenizer)
    monkeypatch.setattr(driver, "prepare", prepare)
    monkeypatch.setattr(driver, "open_model", lambda name: opened)
    monkeypatch.setattr(driver.data, "text", lambda name: "x" * 9000)


def test_one_table_with_ratios_and_everything_as_json(engines, monkeypatch, tmp_path, capsys):
    file = tmp_path / "out" / "peers.json"
    words = ["--engines", "millstream,openvino,vllm", "--batches", "1,2", "--input-len", "16", "--output-len", "5"]
    words += ["--prefill", "32x1", "--repeats", "2", "--starts", "2", "--perplexity", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    assert driver.main() == 0
    out = capsys.readouterr().out
    assert "openvino: not measured, its environment is not there" in out
    assert "| decode 2 | tokens/s |" in out and "x |" in out
    value = json.loads(file.read_text())
    rows = {row["measure"]: row["engines"] for row in value["rows"]}
    assert set(rows) == {
        "decode 1", "decode 2", "prefill 32 x 1", "prefill 16 x 1", "prefill 16 x 2", "total 1", "total 2",
        "start to first token", "first token after imports",
    }  # fmt: skip
    # Sleeps are never shorter than asked for, and not much longer: half the rate, give or take.
    assert 1.2 < rows["decode 2"]["vllm"]["ratio"] < 3.0
    assert rows["decode 2"]["millstream"]["count"] == 2 and value["absent"].keys() == {"openvino"}
    assert len(value["starts"]["vllm"]) == 2 and value["engines"]["vllm"]["version"] == "1"
    # Both windows of 1,024 have 1,023 tokens of logprob -2.
    assert value["perplexity"] == pytest.approx({"millstream": 7.389, "millstream-float32": 7.389}, abs=1e-3)
    assert value["perplexity_tokens"] == 2046 and value["machine"]["cores"] >= 1
    assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engines", "millstream,lama.cpp"], "unknown engine 'lama.cpp'"),
        (["--batches", "1,x"], "--batches is like"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    with pytest.raises(SystemExit):
        driver.main()
    assert said in capsys.readouterr().err
