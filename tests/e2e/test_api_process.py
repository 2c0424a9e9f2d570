"""A whole server as it is started: supervisor, engine process on a tiny model, API process at a port."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_supervisor import alive, children_of

from millstream.engine.exits import Exit
from tiny_files import build_model

WAIT_S = 60.0
MODULES = {"engine": "millstream.engine.process", "api": "millstream.serve.api"}


class Whole:
    """`python -m millstream.serve.supervisor` in a folder of its own."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        config = folder / "server.json"
        config.write_text(json.dumps(tree))
        self.log = folder / "log"
        words = [sys.executable, "-m", "millstream.serve.supervisor", "--config", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stderr=log)
        self.seen: set[int] = set()

    def pids(self) -> dict[str, int]:
        """Process ids of the engine and the API."""
        found = children_of(self.process.pid)
        self.seen |= set(found)
        return {name: pid for pid, words in found.items() for name in MODULES if MODULES[name] in words}

    def base(self) -> str:
        told = re.findall(r"listening at (http://\S+)", self.log.read_text())
        return told[-1] if told else ""

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(self.base() + path, timeout=WAIT_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def status(self, path: str) -> int:
        try:
            return self.get(path)[0]
        except OSError:
            return 0

    def until(self, check: Any, what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not check():
            assert time.monotonic() < end, f"{what}\n{self.log.read_text()}"
            assert self.process.poll() is None, f"{what}: it ended\n{self.log.read_text()}"
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until(lambda: self.base() and self.status("/ready") == 200, "ready")
        self.pids()

    def wait(self) -> int:
        code = self.process.wait(WAIT_S)
        assert not [pid for pid in self.seen if alive(pid)], "a process is left behind"
        return code

    def end(self) -> None:
        pids = self.pids() if self.process.poll() is None else {}
        for pid in (self.process.pid, *pids.values()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def server(tmp_path_factory, model, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[Whole] = []

    def start(**tree: Any) -> Whole:
        tree = {
            "model": str(model),
            "engine": {
                "cache": {"bytes": "16MB"},
                "sched": {"step_tokens": 64},
                "runner": {"ops": "ref", "attention": "torch-ref"},
            },
            "serve": {"port": 0},
            **tree,
        }
        started.append(Whole(tmp_path_factory.mktemp("w"), tree))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_health_and_readiness_say_what_is_true_from_start_to_end(server):
    one = server(supervisor={"backoff_s": 0.05})
    one.until(one.base, "the port is open")
    # Alive at once; ready only with the model.
    assert one.get("/health") == (200, {"status": "ok"})
    code, body = one.get("/ready")
    assert code in (200, 503) and body["status"] in ("ready", "the engine is not there")
    one.until_ready()
    assert one.get("/ready") == (200, {"status": "ready"})

    engine = one.pids()["engine"]
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    one.until(lambda: one.status("/ready") == 503, "not ready without an engine")
    assert time.monotonic() - killed < 1.0 and one.status("/health") == 200
    one.until_ready()
    assert one.pids()["engine"] != engine

    api = one.pids()["api"]
    os.kill(api, signal.SIGKILL)
    one.until(lambda: one.pids().get("api") not in (None, api), "a new API process")
    one.until_ready()

    one.process.send_signal(signal.SIGHUP)
    one.until(lambda: "read again" in one.log.read_text(), "SIGHUP arrives")
    assert one.status("/ready") == 200

    start = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    assert one.wait() == Exit.DONE
    assert time.monotonic() - start < 10.0


def test_a_port_that_is_taken_ends_the_server_with_its_code(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        one = server(serve={"port": taken.getsockname()[1]})
        one.until(one.pids, "it begins")
        assert one.process.wait(WAIT_S) == Exit.ADDRESS
    assert "Address already in use" in one.log.read_text()


@pytest.mark.parametrize(
    "tree",
    [{"serve": {"prot": 1}}, {"serve": {"port": 70_000}}, {"engine": {"cach": {}}}, {"supervisor": {"drain": 1}}],
)
def test_a_wrong_setting_ends_the_server_with_its_code(server, tree):
    one = server(**tree)
    assert one.process.wait(WAIT_S) == Exit.USAGE
    assert "no setting" in one.log.read_text() or "serve.port" in one.log.read_text()
