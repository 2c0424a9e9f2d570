"""`millstream serve --replicas 2`: the whole server over Ray actors, one of which is killed while it answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from serving import alive, whole_server

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'millstream[cluster]'"
)

ADMIN = "admin:admin-of-tests"
ASK = {"prompt": "once", "max_tokens": 150, "temperature": 1.0, "seed": 4, "ignore_eos": True}


def replicas(admin):
    return admin.get("/admin/replicas").json


def test_a_server_of_two_engines_loses_one_and_no_word(tmp_path: Path) -> None:
    words = ("--replicas", "2", "--router", "round-robin", "--admin-port", "0", "--admin-key", ADMIN)
    with whole_server(tmp_path, *words) as server:
        admin = server.admin("admin-of-tests")
        server.until(lambda: [one["state"] for one in replicas(admin)["replicas"]] == ["up", "up"], "two engines")
        quiet = server.post("/v1/completions", ASK).json["choices"][0]["text"]
        told: list[str] = []

        def read() -> None:
            with server.open("POST", "/v1/completions", {**ASK, "stream": True}) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        told.append(json.loads(line[6:])["choices"][0]["text"])

        reading = threading.Thread(target=read)
        reading.start()
        server.until(lambda: len(told) > 3, "the first words")
        busy = [one for one in replicas(admin)["replicas"] if one["requests"]]
        assert len(busy) == 1
        os.kill(busy[0]["pid"], signal.SIGKILL)
        reading.join(30)
        assert "".join(told) == quiet
        found = replicas(admin)
        assert found["migrations"] == 1
        server.until(lambda: replicas(admin)["lost"] == 1, "the loss is noticed")
        server.until(lambda: [one["state"] for one in replicas(admin)["replicas"]] == ["up", "up"], "another engine")
        metrics = server.get("/metrics").body.decode()
        for name in ("0", "1"):
            assert re.search(rf'^millstream_replica_up{{.*replica="{name}"}} 1.0$', metrics, re.MULTILINE), metrics
        assert re.search(r"^millstream_migrations_total{.*} 1.0$", metrics, re.MULTILINE)
        assert admin.post("/admin/replicas/0/drain").status == 202
        assert admin.post("/admin/replicas/7/drain").status == 400
        pids = [one["pid"] for one in replicas(admin)["replicas"]]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        end = time.monotonic() + 10
        while any(alive(pid) for pid in pids if pid):
            assert time.monotonic() < end, "actors outlive their server"
            time.sleep(0.05)
