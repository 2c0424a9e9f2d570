"""Faults of a whole server, by their numbers in docs/reliability.md, as clients see them over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from canary import Canary, sse

from serving import WholeServer, whole_server

TEXT = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "the mill by the stream", "temperature": 0, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[WholeServer]:
    words = ("--set", "supervisor.backoff_s=0.05", "--set", "serve.limits.stall_s=2")
    with whole_server(tmp_path_factory.mktemp("faults"), *words) as made:
        yield made


@pytest.fixture
def canary(server) -> Iterator[Canary]:
    made = Canary(server.url, list(server.pids().values()))
    yield made
    made.close()


def request(server: WholeServer, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(head_of(data) + data)
    return sock


def head_of(data: bytes) -> bytes:
    lines = (
        f"POST {TEXT} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def streamed(server: WholeServer, body: dict[str, Any] = LONG) -> list[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        return sse(http.post(TEXT, json={**body, "stream": True}).text)


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if event != "[DONE]" and event.get("choices"))


def test_f1_clients_that_leave_at_any_moment_leave_nothing_behind(server, canary):
    chance = random.Random(3)
    for place in range(40):
        body = {
            **LONG,
            "prompt": f"{place} " * chance.randint(1, 300),
            "n": chance.choice((1, 2, 5)),
            "stream": place % 3 > 0,
        }
        sock = request(server, body)
        wanted, got = chance.choice((0, 0, 1, 300, 3000, 9000)), 0
        with contextlib.suppress(OSError):
            while got < wanted and (piece := sock.recv(min(4096, wanted - got))):
                got += len(piece)
                if not body["stream"]:
                    break
        if place % 2:
            # A reset, and not an orderly end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    canary.look([], expected_requests=40)


def test_f2_a_reader_that_takes_nothing_is_cut_off_and_holds_nobody_up(server, canary):
    body = {**LONG, "max_tokens": 1900, "n": 16, "stream": True, "logprobs": 20, "return_token_ids": True}
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    sock.sendall(head_of(data) + data)
    began, slowest = time.monotonic(), 0.0
    with httpx.Client(base_url=server.url, timeout=30) as http:
        while time.monotonic() - began < 3.0:
            start = time.monotonic()
            assert http.post(TEXT, json={"prompt": "x", "max_tokens": 2}).status_code == 200
            slowest = max(slowest, time.monotonic() - start)
    assert slowest < 3.0
    end = time.monotonic() + 20
    while http_running(server) and time.monotonic() < end:
        time.sleep(0.1)
    canary.look([])
    sock.close()


def http_running(server: WholeServer) -> int:
    found: int = server.get("/playground/state").json["running"]
    return found


@pytest.mark.parametrize("after_s", [0.05, 0.25])
def test_f3_an_engine_that_is_killed_costs_time_and_no_text(server, after_s):
    want = text_of(streamed(server))
    engine = server.pids()["engine"]
    told: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            told.append(http.post(TEXT, json={**LONG, "stream": True}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(after_s)
    os.kill(engine, signal.SIGKILL)
    end = time.monotonic() + 2.0
    seen = []
    while time.monotonic() < end and 503 not in seen:
        seen.append(server.status("/ready"))
    assert 503 in seen and server.status("/health") == 200
    for thread in threads:
        thread.join()
    assert len(told) == 4
    for response in told:
        # What had not begun may be asked again; what had goes on as if nothing had happened.
        if response.status_code == 503:
            assert after_s < 0.1 and "retry-after" in response.headers
        else:
            events = sse(response.text)
            assert events and events[-1] == "[DONE]", (response.status_code, response.text[:300])
            assert text_of(events) == want
    server.until(lambda: server.status("/ready") == 200, "ready again")
    assert server.pids()["engine"] != engine


def test_f5_a_killed_api_process_leaves_the_engine_free(server):
    api, engine = server.pids()["api"], server.pids()["engine"]
    sock = request(server, {**LONG, "max_tokens": 1900, "n": 8, "stream": True})
    sock.recv(100)
    port = server.port
    os.kill(api, signal.SIGKILL)
    server.until(lambda: server.pids().get("api") not in (None, api), "a new API process")
    server.until(lambda: server.find_url() and server.status("/ready") == 200, "ready again")
    assert server.pids()["engine"] == engine
    end = time.monotonic() + 5
    while http_running(server):
        assert time.monotonic() < end, "the engine computes for nobody"
        time.sleep(0.05)
    assert port
    sock.close()


def test_f17_without_file_descriptors_it_recovers(server, canary):
    api = server.pids()["api"]
    before = resource.prlimit(api, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{api}/fd"))
    socks: list[socket.socket] = []
    try:
        resource.prlimit(api, resource.RLIMIT_NOFILE, (used + 12, before[1]))
        for _ in range(60):
            with contextlib.suppress(OSError):
                sock = socket.create_connection(("127.0.0.1", server.port), timeout=1)
                sock.setblocking(False)
                socks.append(sock)
        time.sleep(0.5)
    finally:
        resource.prlimit(api, resource.RLIMIT_NOFILE, before)
        for sock in socks:
            sock.close()
    end = time.monotonic() + 10
    while server.status("/health") != 200:
        assert time.monotonic() < end, "it does not come back"
        time.sleep(0.1)
    canary.look([])


def soak(server: WholeServer, canary: Canary, seconds: float) -> None:
    """Mixed traffic with clients that leave; memory, files and blocks are as before."""

    def rss() -> int:
        return sum(int(open(f"/proc/{pid}/statm").read().split()[1]) * 4096 for pid in server.pids().values())

    stop = time.monotonic() + seconds
    failed: list[str] = []

    def client(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while time.monotonic() < stop:
                body: dict[str, Any] = {
                    "prompt": "".join(chance.choices("abcdef ", k=chance.randint(1, 400))),
                    "max_tokens": chance.randint(1, 60),
                    "n": chance.choice((1, 1, 1, 3)),
                    "seed": chance.randint(0, 5),
                    "stream": chance.random() < 0.7,
                }
                if chance.random() < 0.2:
                    body["guided_regex"] = "[a-z]{3,20}"
                if chance.random() < 0.1:
                    body["n"] = 0
                if chance.random() < 0.2:
                    body["deadline_s"] = 0.05
                if chance.random() < 0.2:
                    sock = request(server, body)
                    time.sleep(chance.random() * 0.05)
                    sock.close()
                    continue
                status = http.post(TEXT, json=body).status_code
                # Where deadlines cannot be met, those that have one are turned away.
                if status not in (200, 400, 504) and not (status == 429 and "deadline_s" in body):
                    failed.append(f"{status} {body}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(min(5.0, seconds / 3))
    middle = rss()
    for thread in threads:
        thread.join()
    assert not failed, failed[:3]
    canary.look([])
    assert rss() < middle + (48 << 20), f"{(rss() - middle) >> 20} MiB more"
    log = server.log
    assert "Traceback" not in log and log.count("\n") < 40_000


def test_f24_a_short_soak_leaves_everything_as_it_was(server, canary):
    soak(server, canary, 10.0)


@pytest.mark.long
def test_f24_a_soak_of_minutes(server, canary):
    soak(server, canary, 180.0)


def test_f11_signals_under_load(tmp_path):
    with whole_server(tmp_path / "signals", "--shutdown-timeout", "20") as server:
        told: list[list[Any]] = []
        body = {**LONG, "max_tokens": 1500}
        threads = [threading.Thread(target=lambda: told.append(streamed(server, body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        server.signal(signal.SIGTERM)
        end = time.monotonic() + 2
        while server.status("/ready") != 503 and time.monotonic() < end:
            time.sleep(0.01)
        late = server.post(TEXT, LONG)
        assert late.status == 503 and "retry-after" in late.headers
        assert server.status("/health") == 200
        assert server.wait() == 0
        for thread in threads:
            thread.join()
        assert len(told) == 3 and all(events[-1] == "[DONE]" for events in told)


def test_f11_a_second_signal_does_not_wait(tmp_path):
    with whole_server(tmp_path / "signals") as server:
        sock = request(server, {**LONG, "max_tokens": 1900, "n": 32, "stream": True})
        sock.recv(100)
        server.signal(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        code = server.wait()
        assert code in (0, 7) and time.monotonic() - began < 8
        sock.close()
