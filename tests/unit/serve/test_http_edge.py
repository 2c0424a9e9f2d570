"""What comes over a socket before it is a request: heads, bodies and connections that are too large, too slow or wrong.

Rows B1 to B9 and B45 of docs/reliability.md. After each test the server answers the same question with the same words.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving import AppServer, app_server, until

LIMITS = {
    "body_bytes": 200_000, "header_bytes": 8192, "headers": 40, "json_depth": 32, "connections": 20, "header_s": 0.4,
    "body_s": 0.6, "body_rate": 1_000_000, "idle_s": 0.8, "stall_s": 0.5,
}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(tmp_path_factory.mktemp("edge"), {"serve": {"limits": LIMITS}}) as found:
        yield found


@pytest.fixture(autouse=True)
def canary(server: AppServer) -> Iterator[None]:
    """The words of an answer are the same before and after, and nothing is left inside."""
    before = server.post("/v1/chat/completions", CHAT).json["choices"]
    yield
    until(lambda: not server.app.watched._inside, "requests are left inside")
    assert server.post("/v1/chat/completions", CHAT).json["choices"] == before
    until(server.idle, "something is held")


@contextlib.contextmanager
def connected(server: AppServer, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as sock:
        yield sock


def raw(server: AppServer, *pieces: bytes, pause_s: float = 0.0, read: bool = True) -> tuple[int, bytes]:
    """(status, all that came) of bytes as they are; the connection must be closed by the server. Status 0: nothing."""
    with connected(server) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause_s)
        except OSError:
            pass
        data = _rest(sock) if read else b""
    found = re.match(rb"HTTP/1.1 (\d{3})", data)
    return int(found.group(1)) if found else 0, data


def _rest(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def head(method: str = "POST", path: str = "/v1/chat/completions", **headers: Any) -> bytes:
    given = {"Host": "127.0.0.1", "Content-Type": "application/json", "Connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def code(data: bytes) -> str:
    error = json.loads(data.rpartition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


# -- heads


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nX: " + b"a" * (1 << 20),
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(10_000)) + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBig: " + b"b" * (64 << 10) + b"\r\n\r\n",
        b"GET /" + b"c" * 50_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"N" * 70_000 + b": 1\r\n\r\n",
    ],
    ids=["endless header", "10 000 headers", "64 KiB header", "endless path", "endless name"],
)
def test_a_head_that_is_too_large_is_431(server: AppServer, sent: bytes) -> None:
    for step in (len(sent), 1000):
        pieces = [sent[at : at + step] for at in range(0, min(len(sent), 200_000), step)]
        status, data = raw(server, *pieces)
        assert status in (431, 0), data
        if status:
            assert code(data) == "headers_too_large"
    assert raw(server, sent[:100_000])[0] == 431


def test_trailers_have_the_limit_of_headers(server: AppServer) -> None:
    # On a busy machine their time may be over first.
    sent = head(Transfer_Encoding="chunked") + b"2\r\n{}\r\n0\r\n"
    status, _ = raw(server, sent, *(b"T-%d: %s\r\n" % (n, b"x" * 500) for n in range(100)))
    assert status in (431, 400, 408, 0)
    status, _ = raw(server, head(Transfer_Encoding="chunked") + b"2\r\n{}\r\n0\r\nT: ", *[b"x" * 9000] * 4)
    assert status in (431, 400, 408, 0)


def test_a_slow_head_is_408(server: AppServer) -> None:
    began = time.monotonic()
    status, data = raw(server, *(bytes([byte]) for byte in b"GET /health HTTP/1.1\r\nA: b\r\n"), pause_s=0.05)
    assert status == 408 and code(data) == "too_slow"
    assert time.monotonic() - began < 3


def test_who_says_nothing_is_not_waited_for(server: AppServer) -> None:
    with connected(server) as sock:
        began = time.monotonic()
        assert sock.recv(100) == b""
        assert 0.5 < time.monotonic() - began < 5
    with connected(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert _rest(sock).endswith(b'{"status":"ok"}')


def test_a_new_connection_takes_the_place_of_one_that_waits(server: AppServer) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(server)) for _ in range(30)]
        assert server.get("/health").status == 200
        closed = 0
        for sock in silent:
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                closed += sock.recv(1) == b""
        assert closed < 30


def test_connections_that_are_all_at_work_are_not_cut_for_a_new_one(server: AppServer) -> None:
    body = json.dumps({**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
    with contextlib.ExitStack() as stack:
        busy = []
        for _ in range(20):
            sock = stack.enter_context(connected(server))
            sock.sendall(head(Content_Length=len(body)) + body)
            busy.append(sock)
        for sock in busy:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        status, data = raw(server, head("GET", "/health"))
        assert status == 503 and code(data) == "too_many_connections" and b"retry-after: 1" in data
    until(server.idle, "streams that nobody reads go on")


# -- bodies


def test_a_body_that_is_too_large_is_413(server: AppServer) -> None:
    big = b'{"messages": "' + b"a" * 300_000 + b'"}'
    status, data = raw(server, head(Content_Length=len(big)), big)
    assert status == 413 and code(data) == "too_large"
    # Nothing is read of what is announced only.
    status, data = raw(server, head(Content_Length=10**15))
    assert status == 413 and code(data) == "too_large"
    # Nor is it asked for where a client waits to be asked.
    status, data = raw(server, head(Content_Length=10**6, Expect="100-continue"))
    assert status == 413 and b" 100 " not in data
    status, data = raw(server, head("PUT", Content_Length=10**6, Expect="100-continue"))
    assert status == 405 and b" 100 " not in data
    pieces = [b"10000\r\n" + b"a" * 65536 + b"\r\n"] * 12
    status, data = raw(server, head(Transfer_Encoding="chunked"), *pieces)
    assert status == 413 and code(data) == "too_large"
    small = server.post("/v1/batches", b" " * 70_000, headers={"Content-Type": "application/json"})
    assert small.status == 413


def test_a_slow_body_is_408(server: AppServer) -> None:
    status, data = raw(server, head(Content_Length=100), *[b"{"] * 30, pause_s=0.05)
    assert status == 408 and code(data) == "too_slow"
    status, data = raw(server, head(Content_Length=100))
    assert status == 408


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", "x-unknown"])
def test_packed_bodies_are_not_taken(server: AppServer, coding: str) -> None:
    answer = server.post("/v1/chat/completions", CHAT, headers={"Content-Encoding": coding})
    assert answer.status == 415 and answer.error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", ""])
def test_other_forms_are_415(server: AppServer, kind: str) -> None:
    body = json.dumps(CHAT).encode()
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize", "/v1/batches"):
        answer = server.post(path, body, headers={"Content-Type": kind})
        assert answer.status == 415, path
    assert server.post("/v1/files", body, headers={"Content-Type": "application/json"}).status == 415


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"messages": [}', b'{"messages": []} x', b"\xef\xbb\xbf{}", '{"messages": []}'.encode("utf-16"),
        b'{"messages": "\xff\xfe"}', b'{"a": "\\ud800"}', b"[1, 2]", b"null", b'"text"', b"[" * 100_000,
        b'{"a":' * 30_000, b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}", b'{"temperature": 1e400, "messages": []}',
        b'{"temperature": NaN, "messages": []}', b'{"seed": ' + b"9" * 5000 + b', "messages": []}',
        b'{"max_tokens": Infinity, "messages": []}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_400(server: AppServer, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate", "/v1/score"):
        answer = server.post(path, body, headers={"Content-Type": "application/json"})
        assert answer.status == 400, (path, answer)
        error = answer.json["error"]
        assert error["message"] and "Traceback" not in answer.body.decode()


def test_many_keys_and_keys_said_twice(server: AppServer) -> None:
    many = {f"key-{number}": 1 for number in range(5000)}
    assert server.post("/v1/chat/completions", {**CHAT, **many}).status == 400
    twice = json.dumps(CHAT)[:-1].encode() + b', "max_tokens": 2}'
    answer = server.post("/v1/chat/completions", twice, headers={"Content-Type": "application/json"})
    assert answer.status == 200 and answer.json["usage"]["completion_tokens"] <= 2, "the last of them counts"


# -- what is no HTTP, or two ways of it


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"HELLO\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_and_closes(server: AppServer, sent: bytes) -> None:
    status, data = raw(server, sent)
    assert status == 400, data
    assert b"connection: close" in data


def test_requests_that_come_at_once_are_answered_in_order(server: AppServer) -> None:
    _, data = raw(server, head("GET", "/health", Connection=None) + head("GET", "/nowhere"))
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"404"]


def test_upgrades_are_not_taken(server: AppServer) -> None:
    sent = head("GET", "/health", Connection="Upgrade, close", Upgrade="websocket", Sec_WebSocket_Key="x")
    assert raw(server, sent)[0] == 200


# -- readers


def test_who_reads_nothing_is_cut_off(server: AppServer) -> None:
    """All that may be said of each token, of four outputs: more than the buffers of two sockets take."""
    asked = {**CHAT, "max_tokens": 1900, "n": 4, "ignore_eos": True, "stream": True, "logprobs": True}
    body = json.dumps({**asked, "top_logprobs": 20}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(head(Content_Length=len(body)) + body)
        until(lambda: server.load.running > 0, "it never began")
        until(server.idle, "it still computes for somebody who does not read", limit_s=40)
        assert server.records[-1].status == 499
    finally:
        sock.close()


def test_who_leaves_ends_the_request(server: AppServer) -> None:
    body = json.dumps({**CHAT, "max_tokens": 1900, "ignore_eos": True}).encode()
    for stream in (b"", b', "stream": true'):
        sent = body[:-1] + stream + b"}"
        with connected(server) as sock:
            sock.sendall(head(Content_Length=len(sent)) + sent)
            until(lambda: server.load.running > 0, "it never began")
        until(server.idle, "nobody waits for it any more")
        assert server.records[-1].status == 499


# -- ids and headers


def test_the_label_of_a_request_is_given_back_and_never_its_id(server: AppServer) -> None:
    one = server.post("/v1/chat/completions", CHAT, headers={"X-Request-Id": "mine"})
    two = server.post("/v1/chat/completions", CHAT, headers={"X-Request-Id": "mine"})
    assert one.headers["x-request-id"] == two.headers["x-request-id"] == "mine"
    ids = {answer.headers["x-millstream-request-id"] for answer in (one, two)}
    assert len(ids) == 2 and all(re.fullmatch(r"req_[0-9a-f]{32}", name) for name in ids)
    assert [record.label for record in server.records[-2:]] == ["mine", "mine"]


@pytest.mark.parametrize("label", ["x" * 129, "caf\u00e9", "\t", ""])
def test_labels_that_cannot_be_shown_are_left_out(server: AppServer, label: str) -> None:
    answer = server.get("/health", headers={"X-Request-Id": label.encode("latin-1").decode("latin-1")})
    assert answer.headers["x-request-id"] == answer.headers["x-millstream-request-id"]


def test_names_of_other_sites_are_not_answered_to(server: AppServer) -> None:
    """A page of another site whose name has come to mean this machine; and one that just asks."""
    assert raw(server, head("GET", "/v1/models", Host="evil.example"))[0] == 421
    for good in ("localhost:1", "127.0.0.1", "[::1]:80", "10.1.2.3"):
        assert raw(server, head("GET", "/v1/models", Host=good))[0] == 200
    assert server.get("/v1/models", headers={"Origin": "https://evil.example"}).status == 403
    own = server.get("/v1/models", headers={"Origin": server.url})
    assert own.status == 200 and "access-control-allow-origin" not in own.headers
    ahead = server.ask(
        "OPTIONS", "/v1/chat/completions",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
    )  # fmt: skip
    assert ahead.status in (403, 405)
