"""A real worker process with an engine that is none: commands, answers, errors, and that it sits still between them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from peers.protocol import Worker, WorkerFailed, cpu_seconds

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

ENGINE = """
import sys, threading, time
from peers.protocol import imported, serve

class Fake:
    def __init__(self, setup):
        imported()
        if setup.get("refuse"):
            raise RuntimeError("no such model")
        self.told = {"engine": "fake", "version": "7", "threads": setup["threads"]}
        print("noise on stdout")
        if setup.get("spin"):
            threading.Thread(target=self.spin, daemon=True).start()
    def spin(self):
        while True:
            pass
    def generate(self, prompts, output_len):
        if prompts[0][0] == 666:
            sys.exit("the last words")
        if prompts[0][0] == 777:
            time.sleep(60)
        return [[ids[-1] + n for n in range(output_len)] for ids in prompts]

sys.exit(serve(Fake))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "fake.py").write_text(ENGINE)
    begun = []

    def make(**setup) -> Worker:
        worker = Worker(
            "fake",
            [sys.executable, str(tmp_path / "fake.py")],
            {"threads": 2, "first_prompt": [5], **setup},
            tmp_path / "logs" / "fake.log",
            {**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        )
        begun.append(worker)
        return worker

    yield make
    for worker in begun:
        worker.close()


def test_a_worker_starts_answers_and_ends(start, tmp_path):
    worker = start()
    said = worker.ready(30)
    assert said["ready"] == {"engine": "fake", "version": "7", "threads": 2} and said["outputs"] == [[5]]
    phases = said["phases_s"]
    assert said["total_s"] == pytest.approx(sum(phases.values())) and min(phases.values()) >= 0
    answer = worker.ask(do="generate", prompts=[[1, 2], [3]], output_len=3)
    assert answer["outputs"] == [[2, 3, 4], [3, 4, 5]] and 0 <= answer["seconds"] < 10
    # What the engine prints is not taken for an answer.
    assert "noise on stdout" in (tmp_path / "logs" / "fake.log").read_text()
    worker.close()
    assert not Path(f"/proc/{worker.pid}").exists() or cpu_seconds(worker.pid) == 0


def test_what_an_engine_cannot_do_is_said(start):
    worker = start()
    worker.ready(30)
    with pytest.raises(WorkerFailed, match="'score' is not something"):
        worker.ask(do="score", prompts=[[1]])


def test_an_engine_that_cannot_load_says_why(start):
    with pytest.raises(WorkerFailed, match="RuntimeError: no such model"):
        start(refuse=True).ready(30)


def test_a_worker_that_dies_leaves_its_last_words(start):
    worker = start()
    worker.ready(30)
    with pytest.raises(WorkerFailed, match="the last words"):
        worker.ask(do="generate", prompts=[[666]], output_len=1)


def test_a_worker_that_hangs_is_given_up(start):
    worker = start()
    worker.ready(30)
    with pytest.raises(WorkerFailed, match="did not answer in 0 s"):
        worker.ask(0.2, do="generate", prompts=[[777]], output_len=1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_that_would_spin_is_stopped_while_it_is_not_asked(start):
    worker = start(spin=True)
    worker.ready(30)
    before = worker.cpu_s()
    assert before > 0
    time.sleep(0.5)
    assert worker.cpu_s() - before < 0.1
    assert worker.ask(do="generate", prompts=[[1]], output_len=1)["outputs"] == [[1]]
