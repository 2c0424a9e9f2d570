"""`millstream serve` as a user runs it: three processes, keys, signals, exit codes, TLS, sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.engine.exits import Exit
from millstream.serve.auth import sealed
from serving import Client, WholeServer, tiny_model, until, whole_server

KEY, OTHER = "ms-" + "k" * 43, "ms-" + "o" * 43


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[WholeServer]:
    folder = tmp_path_factory.mktemp("serve")
    keys = folder / "keys"
    keys.write_text(sealed(f"alice:{KEY}") + "\n")
    words = ("--api-key-file", str(keys), "--admin-port", "0", "--admin-key", "root:admin-of-tests")
    with whole_server(folder, *words, "--served-model-name", "tiny", "--shutdown-timeout", "20", model=model) as found:
        found.key = KEY
        yield found


def run(*words: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millstream", "serve", *words]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env, stdin=subprocess.DEVNULL)


# -- as it runs


def test_it_says_what_it_serves_and_how_to_ask(server: WholeServer) -> None:
    server.until(lambda: "tiny is served" in server.log, "the banner")
    assert f"playground   {server.url}/" in server.log and "curl " in server.log and "$KEY" in server.log
    assert KEY not in server.log and "admin-of-tests" not in server.log


def test_a_chat_and_a_stream_over_all_processes(server: WholeServer) -> None:
    whole = server.chat("hello", max_tokens=8)
    assert whole.status == 200 and whole.json["model"] == "tiny"
    text = whole.json["choices"][0]["message"]["content"]
    stream = server.chat("hello", max_tokens=8, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in stream.events() if e["choices"]) == text
    assert stream.body.endswith(b"data: [DONE]\n\n")


def test_the_key_file_is_read_again_at_sighup(server: WholeServer) -> None:
    assert server.with_key(OTHER).get("/v1/models").status == 401
    keys = server.log_path.parent / "keys"
    before = keys.read_text()
    keys.write_text(before + f"bob:{OTHER}\n")
    server.signal(signal.SIGHUP)
    server.until(lambda: server.with_key(OTHER).get("/v1/models").status == 200, "the new key")
    keys.write_text("short\n")
    server.signal(signal.SIGHUP)
    server.until(lambda: "could not take the new configuration" in server.log, "the complaint")
    assert server.get("/v1/models").status == server.with_key(OTHER).get("/v1/models").status == 200
    keys.write_text(before)
    server.signal(signal.SIGHUP)
    server.until(lambda: server.with_key(OTHER).get("/v1/models").status == 401, "the key is gone")


def test_the_admin_reaches_the_engine(server: WholeServer) -> None:
    admin = server.admin("admin-of-tests")
    assert admin.post("/admin/cache/reset").json["free_blocks"] > 1000
    shown = admin.get("/admin/config").json
    assert shown["serve"]["admin"]["key"] == "root:***" and shown["engine"]["cache"]["blocks"] == 2048


def test_an_engine_that_dies_is_told_truthfully_and_comes_back(server: WholeServer) -> None:
    before = server.chat("tell", max_tokens=6).json["choices"]
    pid = server.pids()["engine"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.status("/ready") == 503, "it says that it is not ready", limit_s=1.5)
    assert server.status("/health") == 200
    refused = server.chat()
    if refused.status != 200:
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
    server.until_ready()
    assert server.pids()["engine"] != pid
    assert server.chat("tell", max_tokens=6).json["choices"] == before


def test_an_api_process_that_dies_is_started_again(server: WholeServer) -> None:
    os.kill(server.pids()["api"], signal.SIGKILL)
    time.sleep(0.2)
    server.until_ready()
    assert server.chat().status == 200


def test_sigterm_finishes_the_stream_and_takes_nothing_new(server: WholeServer) -> None:
    """The last test of this server: it ends with code 0."""
    got: list[bytes] = []

    def read() -> None:
        body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with server.open("POST", "/v1/chat/completions", body) as response:
            while piece := response.read1(65536):
                got.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: b'"content"' in b"".join(got), "the stream began")
    server.signal(signal.SIGTERM)
    until(lambda: server.status("/ready") in (503, 0), "ready is taken back first")
    answer = server.chat()
    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
    reader.join(30)
    whole = b"".join(got)
    assert whole.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in whole
    assert server.wait() == Exit.DONE


# -- how it ends otherwise


def test_a_second_signal_cuts_off(tmp_path: Path, model: Path) -> None:
    with whole_server(tmp_path, "--shutdown-timeout", "30", model=model) as server:
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 8}
        with server.open("POST", "/v1/completions", body) as response:
            assert response.read(50)
            server.signal(signal.SIGINT)
            time.sleep(0.3)
            server.signal(signal.SIGINT)
            assert server.wait(15) == Exit.CUT
            rest = response.read()
            assert not rest.rstrip().endswith(b"[DONE]")


def test_the_admin_may_end_it(tmp_path: Path, model: Path) -> None:
    words = ("--admin-port", "0", "--admin-key", "root:admin-of-tests", "--uds", str(tmp_path / "sock"))
    with whole_server(tmp_path, *words, model=model, ready=False) as server:
        server.until(lambda: "is served" in server.log, "ready")
        server.pids()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "sock"))
            sock.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        assert (tmp_path / "sock").stat().st_mode & 0o777 == 0o600
        assert "curl --unix-socket" in server.log
        assert server.admin("admin-of-tests").post("/admin/drain").status == 202
        assert server.wait() == Exit.DONE
        assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--host", "0.0.0.0"), 1, "no API keys"),
        (("no-such-model-anywhere",), 1, "there is no model"),
        (("--set", "serve.prot=1"), 1, "the nearest is 'serve.port'"),
        (("--set", "cahce.blocks=1"), 1, "the nearest is 'cache'"),
        (("--set", "engine.cache.blokcs=1"), 1, "engine.cache.blocks"),
        (("--config", "/nowhere/at-all.toml"), 1, "cannot be read"),
        (("--api-key", "short"), 1, "an API key has"),
        (("--admin-port", "0"), 1, "--new-key admin"),
        (("--ssl-certfile", "/nowhere/cert.pem"), 1, "the certificate cannot be used"),
        (("--no-such-flag",), 2, "--no-such-flag"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_anything_starts(
    model: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    named = words if not words[0].startswith("--") else (str(model), *words)
    done = run(*named, "--port", "0") if "--port" not in words else run(*named)
    assert done.returncode == code, done
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "process is started" not in done.stderr


def test_a_port_that_is_taken(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(str(model), "--port", str(taken.getsockname()[1]))
    assert done.returncode == Exit.ADDRESS
    assert "already in use" in done.stderr and "process is started" not in done.stderr


# -- keys and configuration


def test_keys_from_the_command_line(tmp_path: Path) -> None:
    made = run("--new-key", "bob")
    key, line = (one.split()[1] for one in made.stdout.strip().splitlines())
    assert key.startswith("ms-") and line.startswith("bob:sha256:") and made.returncode == 0
    shown = run("--print-config", "--api-key", line, "--admin-port", "1", "--admin-key", key, MILLSTREAM_API_KEY=key)
    tree = json.loads(shown.stdout)
    assert tree["serve"]["auth"]["keys"][1] == "bob:***" and len(tree["serve"]["auth"]["keys"]) == 2
    assert key not in shown.stdout and "sha256" not in shown.stdout


def test_defaults_then_file_then_set_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'model = "from-file"\n[serve]\nport = 1\nroot_path = "/file"\n[serve.limits]\nheaders = 7\nbody_s = 7\n'
        "[cache]\nblocks = 7\nblock_size = 7\n[engine.sched]\nmax_rows = 7\n[supervisor]\ndrain_s = 7\n"
    )
    done = run(
        "--config", str(file), "--print-config", "--set", "serve.limits.headers=8", "--set", "serve.port=8",
        "--set", "cache.blocks=8", "--port", "9", "--max-num-seqs", "9", "--max-model-len", "9",
    )  # fmt: skip
    tree = json.loads(done.stdout)
    assert tree["model"] == "from-file"
    assert tree["serve"]["port"] == 9 and tree["serve"]["root_path"] == "/file"
    assert tree["serve"]["limits"]["headers"] == 8 and tree["serve"]["limits"]["body_s"] == 7
    assert tree["serve"]["limits"]["header_bytes"] == 32768
    assert tree["engine"]["cache"]["blocks"] == 8 and tree["engine"]["cache"]["block_size"] == 7
    assert tree["engine"]["sched"]["max_rows"] == 9 and tree["engine"]["model"]["max_context"] == 9
    assert tree["supervisor"]["drain_s"] == 7
    yaml = tmp_path / "serve.yaml"
    yaml.write_text("model: from-yaml\nserve: {port: 5, allowed_origins: ['*']}\n")
    tree = json.loads(run("named", "--config", str(yaml), "--print-config").stdout)
    assert tree["model"] == "named" and tree["serve"]["port"] == 5 and tree["serve"]["allowed_origins"] == ["*"]


# -- TLS


def test_https_and_client_certificates(tmp_path: Path, model: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("there is no openssl to make a certificate with")
    words = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--ssl-ca-certs", str(cert))
    with whole_server(tmp_path / "server", *words, model=model, ready=False) as server:
        server.until(lambda: "is served" in server.log, "ready")
        server.pids()
        url = next(word for word in server.log.split() if word.startswith("https://"))
        context = ssl.create_default_context(cafile=str(cert))

        def get(context: Any) -> Any:
            with urllib.request.urlopen(
                f"{url}/v1/models".replace("/v1/v1", "/v1"), context=context, timeout=20
            ) as got:
                return json.loads(got.read())

        with pytest.raises(OSError):
            get(context)
        context.load_cert_chain(cert, key)
        assert get(context)["data"][0]["object"] == "model"
        with pytest.raises(OSError):
            Client(url.replace("https", "http")).get("/health")
