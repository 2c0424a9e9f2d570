"""Bad inputs, by their numbers in docs/reliability.md, sent to a whole server: each has its clear answer, and leaves
nothing behind (`canary.py`)."""

from __future__ import annotations

import gzip
import json
import random
import socket
import string
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from canary import Canary, sse

from serving import WholeServer, whole_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
HUGE = 2**63
KEY = "ms-a-key-of-acme-0123456789abcdef"
OTHER = "ms-a-key-of-bolt-0123456789abcdef"


LIMITS = {"header_s": 1.5, "body_s": 1.5, "body_bytes": 1 << 20, "connections": 256}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[WholeServer]:
    words = [word for name, value in LIMITS.items() for word in ("--set", f"serve.limits.{name}={value}")]
    with whole_server(tmp_path_factory.mktemp("open"), *words) as made:
        yield made


@pytest.fixture(scope="module")
def canary(server) -> Iterator[Canary]:
    made = Canary(server.url, list(server.pids().values()))
    yield made
    made.close()


@dataclass(frozen=True)
class Case:
    """One request and its answer: a status among `want`, and where given the field that the error names."""

    path: str
    body: Any = None
    want: tuple[int, ...] = (400,)
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"


def text(want: tuple[int, ...] = (400,), param: str | None = None, **fields: Any) -> Case:
    return Case(TEXT, {"prompt": "x", "max_tokens": 4, **fields}, want, param)


def chat(want: tuple[int, ...] = (400,), param: str | None = None, **fields: Any) -> Case:
    return Case(CHAT, {"messages": MESSAGES, "max_tokens": 4, **fields}, want, param)


def raw(body: bytes, want: tuple[int, ...] = (400,), path: str = TEXT, **headers: str) -> Case:
    return Case(path, body, want, headers={"Content-Type": "application/json", **headers})


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


def says(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def schema(value: Any, **fields: Any) -> Case:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": True}}
    return chat(**{"want": (400,), "response_format": form, **fields})


def deep(levels: int) -> Any:
    found: Any = {"type": "object"}
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}}
    return found


FINE = (200,)
EITHER = (200, 400)
CASES: dict[str, list[Case]] = {
    "B2": [
        raw(b'{"prompt": "' + b"x" * (1 << 20) + b'"}', (413,)),
        raw(gzip.compress(b'{"prompt": "x"}'), (415,), **{"Content-Encoding": "gzip"}),
        raw(gzip.compress(b"x" * (10 << 20)), (415,), **{"Content-Encoding": "gzip"}),
    ],
    "B4": [
        Case(TEXT, None, (405,), method="GET"),
        Case("/v1/../v1/models", None, (200, 404), method="GET"),
        Case("/v1/%2e%2e/health", None, (200, 404), method="GET"),
        Case("//v1//models", None, (404,), method="GET"),
        Case("/v1/models%00", None, (404,), method="GET"),
        Case("/playground/..%2f..%2fetc%2fpasswd", None, (404,), method="GET"),
        Case("/v1/modelz", None, (404,), method="GET"),
    ],
    "B5": [
        raw(b"prompt=x", (415,), **{"Content-Type": "text/plain"}),
        raw(b""),
        raw(b'{"prompt": "x"'),
        raw(b'{"prompt": "x"} x'),
        raw(b"\xef\xbb\xbf" + b'{"prompt": "x"}'),
        raw('{"prompt": "x"}'.encode("utf-16")),
        raw(b'{"prompt": "\xff\xfe"}'),
        raw(b'{"prompt": "\\ud800"}'),
        raw(b"null"),
        raw(b"[]"),
        raw(b'"x"'),
        raw(b"7"),
    ],
    "B6": [
        raw(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        raw(b'{"prompt": "x", "metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}"),
        raw(b'{"prompt": "x", "max_tokens": 1, "prompt": "y"}', FINE),
        raw(b'{"prompt": "x", "temperature": 1e400}'),
        raw(b'{"prompt": "x", "temperature": NaN}'),
        raw(b'{"prompt": "x", "top_p": Infinity}'),
        raw(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"),
        raw(json.dumps({"prompt": "x", **{f"k{i}": i for i in range(2000)}}).encode()),
    ],
    "B12": [text(n=value, param="n") for value in (0, -1, 10**9, "3", 2.5, True, HUGE)],
    "B13": [text(max_tokens=value, param="max_tokens") for value in (0, -1, 2**31, HUGE, "4")]
    + [chat(max_completion_tokens=0, param="max_completion_tokens")],
    "B14": [text(logprobs=value, param="logprobs") for value in (-2, 21, 32000, 10**9)]
    + [chat(logprobs=True, top_logprobs=value, param="top_logprobs") for value in (-1, 21, 10**9)]
    + [chat(top_logprobs=3, param="top_logprobs"), text(prompt_logprobs=99, param="prompt_logprobs")],
    "B15": [text(temperature=value, param="temperature") for value in (-1, 101, "hot")]
    + [text(temperature=1e-30, want=FINE), text(top_p=0, param="top_p"), text(top_p=1.1, param="top_p")]
    + [text(top_k=-5, param="top_k"), text(top_k=2**31, param="top_k"), text(min_p=2, param="min_p")],
    "B16": [
        text(**{name: value}, param=name) for name in ("presence_penalty", "frequency_penalty") for value in (1e9, -1e9)
    ]
    + [text(repetition_penalty=value, param="repetition_penalty") for value in (0, -1, 1e9)]
    + [text(want=FINE, repetition_penalty=1.3, presence_penalty=2, frequency_penalty=-2, n=3, guided_regex="[ab]{3}")],
    "B17": [
        text(logit_bias=value, param="logit_bias")
        for value in ({"-1": 1}, {"99999": 1}, {str(2**40): 1}, {"x": 1}, {"5": 1e9}, {str(i): 1 for i in range(3000)})
    ]
    + [text(want=(200, 400, 500), logit_bias={str(i): -100 for i in range(260)})],
    "B18": [text(stop=value, param="stop") for value in (["a"] * 1000, [""], "x" * 100_000)]
    + [
        text(stop=[["a"]]),
        text(stop_token_ids=[-1], param="stop_token_ids"),
        text(stop_token_ids=[10**9], param="stop_token_ids"),
    ],
    "B19": [text(seed=value, param="seed") for value in (-1, 2**64, 1.5, "x")],
    "B20": [text(min_tokens=9, param="min_tokens"), text(min_tokens=-1, param="min_tokens")],
    "B21": [text(want=FINE, no_such_field=1), text(want=FINE, messages=MESSAGES), text(want=FINE, priority=3)],
    "B22": [
        text(prompt="", param="prompt"),
        text(prompt=[], param="prompt"),
        text(prompt=["x"] * 10_000, param="prompt"),
        text(prompt="   ", want=FINE),
        text(prompt="x" * 900_000, param="prompt"),
        text(prompt=" " * 900_000),
    ],
    "B23": [
        text(prompt=[1, -1], param="prompt"),
        text(prompt=[10**9], param="prompt"),
        text(prompt=[1.5]),
        text(prompt=[True]),
        text(prompt=[HUGE]),
        text(prompt=[[1], ["a"]]),
    ],
    "B24": [text(prompt=[5] * count, param="prompt") for count in (2048, 2049, 4000)]
    + [text(prompt=[5] * 2045, max_tokens=4, param="max_tokens"), text(prompt=[5] * 2044, max_tokens=4, want=FINE)],
    "B25": [
        chat(want=FINE, messages=says(word))
        for word in ("<|im_end|>", "<|image_pad|>", "</think>", "<tool_call>{}</tool_call>")
    ],
    "B26": [
        chat(messages=[], param="messages"),
        chat(messages=says("x", "king"), param="messages[0].role"),
        chat(messages=says(7), param="messages[0].content"),
        chat(messages=says([{"type": "what"}]), param="messages[0].content[0].type"),
        chat(messages=[{"role": "tool", "content": "x"}], param="messages[0].tool_call_id"),
        chat(messages="hi", param="messages"),
        chat(messages=[1], param="messages[0]"),
        chat(messages=says("x") * 10_000, want=(400, 413)),
    ],
    "B27": [
        chat(want=FINE, messages=says(word))
        for word in ("\u202e\u200b\u200d" * 50, "a" + "\u0301" * 500, "\U0001f9d1\u200d\U0001f680")
    ],
    "B28": [chat(chat_template="{{ 1 }}", want=(403,), param="chat_template")],
    "B29": [chat(chat_template_kwargs={name: 1}) for name in ("messages", "tools", "tokenize", "add_generation_prompt")]
    + [chat(chat_template_kwargs="x", param="chat_template_kwargs")],
    "B31": [text(guided_regex=value) for value in ("(", "(?=a)b", r"(a)\1")]
    + [
        text(guided_regex=value, want=EITHER)
        for value in ("(a+)+b", "(a|a)*b", "((a{1,50}){1,50}){1,50}", "a{1,100000000}")
    ],
    "B32": [
        text(guided_grammar="(" * 60_000),
        text(guided_grammar="start: start"),
        text(guided_grammar="x: y"),
        text(guided_grammar='root ::= root "a"'),
        text(guided_grammar="x" * (1 << 19)),
    ],
    "B33": [
        schema({"$ref": "http://127.0.0.1:1/x.json"}),
        schema({"type": "nothing"}),
        schema({"type": "string", "pattern": "("}),
        schema(7),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, want=EITHER),
        schema(deep(100)),
        schema({"enum": [str(i) for i in range(100_000)]}, want=(200, 400, 413)),
        schema({"type": "array", "minItems": 10**9}),
        schema({"allOf": [{"type": "string"}, {"type": "number"}]}, want=EITHER),
    ],
    "B35": [
        chat(response_format={"type": "json_schema"}, param="response_format.json_schema"),
        chat(response_format={"type": "x"}, param="response_format.type"),
        text(guided_regex="a", guided_choice=["b"], param="guided_choice"),
        text(structured_outputs={}, param="structured_outputs"),
        text(guided_choice=[]),
        text(guided_regex=""),
        text(guided_decoding_backend="outlines", guided_regex="a", param="guided_decoding_backend"),
        text(structured_outputs={"regex": "a", "json": {}}),
    ],
    "B36": [
        chat(tools=[tool('a"b')]),
        chat(tools=[tool("a\nb")]),
        chat(tools=[tool("x" * 10_000)]),
        chat(tools=[tool(), tool()]),
        chat(tools=[tool(f"f{i}") for i in range(5000)]),
        chat(tools=[{"type": "x"}]),
        chat(tools=[{}]),
        chat(tools="x", param="tools"),
        chat(tools=[tool(type="object", properties={"a": {"type": "nothing"}})], tool_choice="required"),
    ],
    "B38": [
        chat(tool_choice="required", param="tool_choice"),
        chat(tools=[tool()], tool_choice="sometimes", param="tool_choice"),
        chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}, param="tool_choice"),
    ],
    "B39": [chat(messages=says([image("data:image/png;base64,AAAA")]), param="messages[0].content[0].type")],
    "B40": [chat(messages=says([image(url)])) for url in ("file:///etc/passwd", "http://169.254.169.254/")],
    "B42": [text(want=FINE, prompt_embeds="gASVAAAA")],
    "B43": [chat(messages=says([{"type": "input_audio", "input_audio": {"data": "x"}}]))],
    "B44": [Case("/v1/embeddings", {"input": "x"}, (400, 404))],
    "B50": [Case("/v1/load_lora_adapter", {"lora_path": "/etc"}, (404,))],
    "B58": [Case(f"/v1/{kind}/x_{'0' * 32}", None, (404,), method="GET") for kind in ("responses", "files", "batches")]
    + [Case("/v1/requests/req_00000000000000000000000000000000/timeline", None, (404,), method="GET")],
}


def send(server: WholeServer, case: Case, stream: bool = False) -> httpx.Response:
    body = case.body
    if stream and isinstance(body, dict):
        body = {**body, "stream": True}
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body, allow_nan=True).encode()
    headers = {"Content-Type": "application/json", **case.headers} if content is not None else case.headers
    with httpx.Client(base_url=server.url, timeout=30) as http:
        return http.request(case.method, case.path, content=content, headers=headers)


def check(case: Case, response: httpx.Response) -> None:
    shown = json.dumps(case.body, default=repr)[:200]
    assert response.status_code in case.want, (shown, response.status_code, response.text[:300])
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and error["type"], error
        assert case.param is None or error["param"] == case.param or str(error["param"]).startswith(case.param), (
            shown,
            error,
        )


@pytest.mark.parametrize("row", CASES)
def test_a_row(server, canary, row):
    answers = []
    for case in CASES[row]:
        response = send(server, case)
        check(case, response)
        # What the engine itself may refuse is told of one request, not of the server.
        answers.append((200 if response.status_code in case.want else response.status_code, response.text))
    canary.look(answers)


@pytest.mark.parametrize(
    "row", ["B12", "B13", "B14", "B15", "B16", "B17", "B18", "B19", "B23", "B24", "B31", "B33", "B36"]
)
def test_a_row_streamed_beside_a_stream_that_goes_on(server, canary, row):
    """S and P: an error comes before the first event, and whoever streams beside it gets the same text."""
    body = {"prompt": "a bystander", "temperature": 0, "max_tokens": 300, "ignore_eos": True, "stream": True}
    said: list[str] = []

    def bystander() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            events = sse(http.post(TEXT, json=body).text)
            assert events[-1] == "[DONE]"
            said.append("".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"]))

    bystander()
    thread = threading.Thread(target=bystander)
    thread.start()
    answers = []
    for case in CASES[row]:
        response = send(server, case, stream=True)
        if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
            events = sse(response.text)
            assert events and (events[-1] == "[DONE]" or "error" in events[-1])
        else:
            check(case, response)
        answers.append((200 if response.status_code in case.want else response.status_code, response.text))
    thread.join()
    assert len(said) == 2 and said[0] == said[1]
    canary.look(answers)


# -- rows of HTTP itself, over sockets


def exchange(server: WholeServer, data: bytes, wait_s: float = 6.0) -> bytes:
    """Sends bytes, and reads until the server closes or says nothing more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait_s) as sock:
        got = b""
        try:
            sock.sendall(data)
            while piece := sock.recv(65536):
                got += piece
                if b"\r\n\r\n" in got and not data.endswith(b"!"):
                    sock.settimeout(0.4)
        except (TimeoutError, OSError):
            pass
        return got


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def head(path: str = "/health", method: str = "GET", *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


HTTP_ROWS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "B1 one header of 64 KiB": (head("/health", "GET", "X: " + "a" * 65536), (431, 400, 0)),
    "B1 a head of 1 MiB": (head("/health", "GET", *(f"X{i}: {'a' * 1000}" for i in range(1000))), (431, 400, 0)),
    "B1 10,000 headers": (head("/health", "GET", *(f"X{i}: a" for i in range(10_000))), (431, 400, 0)),
    "B7 length and chunks": (
        head(TEXT, "POST", "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        (400,),
    ),
    "B7 two lengths": (head(TEXT, "POST", "Content-Length: 4", "Content-Length: 5") + b"{}{}", (400,)),
    "B7 a length that is none": (head(TEXT, "POST", "Content-Length: -1"), (400,)),
    "B7 no HTTP at all": (b"hello there\r\n\r\n", (400, 0)),
    "B7 TLS to a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", (400, 0)),
    "B4 a null byte": (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404, 421, 0)),
    "B8 another host": (head().replace(b"127.0.0.1", b"evil.example"), (421, 403, 400)),
    "B8 another origin": (head("/v1/models", "GET", "Origin: http://evil.example"), (403, 421)),
    "B8 a preflight": (
        head(CHAT, "OPTIONS", "Origin: http://evil.example", "Access-Control-Request-Method: POST"), (400, 403, 405),
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", HTTP_ROWS)
def test_a_row_of_http(server, canary, row):
    data, want = HTTP_ROWS[row]
    answer = exchange(server, data)
    assert status_of(answer) in want, answer[:300]
    assert b"access-control-allow-origin" not in answer.lower()
    canary.look([(min(status_of(answer), 499), answer.decode("latin-1"))])


def test_b2_a_body_without_a_length_is_cut_where_it_is_too_large(server, canary):
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    data = head(TEXT, "POST", "Content-Type: application/json", "Transfer-Encoding: chunked") + piece * 40
    answer = exchange(server, data)
    assert status_of(answer) == 413, answer[:200]
    canary.look([(413, answer.decode("latin-1"))])


@pytest.mark.parametrize("part", ["head", "body"])
def test_b3_whoever_sends_too_slowly_is_cut_off(server, canary, part):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        whole = head(TEXT, "POST", "Content-Type: application/json", "Content-Length: 1000")
        if part == "body":
            sock.sendall(whole)
            whole = b"{" * 1000
        got = b""
        try:
            for place in range(100):
                sock.sendall(whole[place : place + 1])
                sock.settimeout(0.1)
                try:
                    if not (piece := sock.recv(4096)):
                        break
                    got += piece
                except TimeoutError:
                    continue
        except OSError:
            pass
    assert time.monotonic() - began < 8
    assert status_of(got) in (408, 0), got[:200]
    canary.look([(408, got.decode("latin-1"))])


def test_b3_silent_connections_take_no_place_from_others(server, canary):
    socks = []
    try:
        for _ in range(400):
            socks.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        began = time.monotonic()
        with httpx.Client(base_url=server.url, timeout=10) as http:
            assert http.post(TEXT, json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for sock in socks:
            sock.close()
    canary.look([])


def test_b7_requests_in_a_row_are_answered_in_order(server, canary):
    answer = exchange(server, head("/health") + head("/version") + head("/nothing"))
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.count(b"HTTP/1.1 404") == 1
    canary.look([])


def test_b45_the_names_that_clients_give_are_labels(server, canary):
    body = {"prompt": "x", "max_tokens": 2}
    with httpx.Client(base_url=server.url, timeout=30) as http:
        answers = [http.post(TEXT, json=body, headers={"X-Request-Id": "same"}) for _ in range(3)]
        assert {a.headers["x-request-id"] for a in answers} == {"same"}
        assert (
            len({a.json()["id"] for a in answers}) == 3 == len({a.headers["x-millstream-request-id"] for a in answers})
        )
        long = http.post(TEXT, json=body, headers={"X-Request-Id": "x" * 5000})
        assert long.status_code == 200 and len(long.headers["x-request-id"]) < 200
    sly = exchange(server, head("/health", "GET", "X-Request-Id: a\tb"))
    assert status_of(sly) in (200, 400)
    canary.look([])


def test_b22_long_texts_hold_nobody_up(server, canary):
    """While text at the limit is cut into tokens, streams go on."""
    body = {"prompt": "a bystander", "temperature": 0, "max_tokens": 200, "ignore_eos": True, "stream": True}
    gaps: list[float] = []

    def bystander() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http, http.stream("POST", TEXT, json=body) as response:
            last = time.monotonic()
            for _ in response.iter_raw():
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

    thread = threading.Thread(target=bystander)
    thread.start()
    answers = []
    for word in ("x", "\u0301", " ", "ab1"):
        # An accent is six characters of JSON.
        count = 900_000 // len(json.dumps(word)[1:-1])
        response = send(server, text(prompt=word * count))
        assert response.status_code == 400 and "2047" in response.text, response.text[:200]
        answers.append((response.status_code, response.text))
    thread.join()
    assert max(gaps) < 3.0, max(gaps)
    canary.look(answers)


def test_b34_many_schemas_stay_within_their_cache(server, canary):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for number in range(60):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": f"v{number}"}}}
            assert (
                http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2, "response_format": form}).status_code
                == 200
            )
    canary.look([])


def test_b60_names_of_models_do_not_become_labels(server, canary):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for number in range(200):
            response = http.post(TEXT, json={"prompt": "x", "model": f"model-{number}"})
            assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
        metrics = http.get("/metrics").text
    assert "model-7" not in metrics and len(metrics) < 400_000
    canary.look([])


# -- a server with keys


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[WholeServer]:
    words = ("--api-key", f"acme:{KEY}", "--api-key", f"bolt:{OTHER}", "--served-model-name", "tiny")
    with whole_server(tmp_path_factory.mktemp("locked"), *words) as made:
        yield made


@pytest.fixture(scope="module")
def locked_canary(locked) -> Iterator[Canary]:
    made = Canary(locked.url, list(locked.pids().values()), {"Authorization": f"Bearer {KEY}"})
    yield made
    made.close()


def test_b9_no_route_answers_without_a_key(locked, locked_canary):
    with httpx.Client(base_url=locked.url, timeout=30) as http:
        paths = http.get("/openapi.json", headers={"X-Api-Key": KEY}).json()["paths"]
        answers = []
        for path, methods in paths.items():
            for method in methods:
                if path in ("/health", "/ready", "/ping", "/", "/playground/{name}"):
                    continue
                for headers in (
                    {},
                    {"Authorization": f"Bearer {KEY}x"},
                    {"Authorization": f"Bearer {KEY[:-1]}"},
                    {"Authorization": KEY},
                    {"X-Api-Key": ""},
                ):
                    response = http.request(method.upper(), path.replace("{", "").replace("}", ""), headers=headers)
                    assert response.status_code == 401, (method, path, headers, response.status_code)
                    answers.append((401, response.text))
        for path in ("/v1/models?api_key=" + KEY, "/docs", "/invocations", "/pooling", "/nothing"):
            assert http.get(path).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {OTHER}"}).status_code == 200
    assert KEY not in "".join(body for _, body in answers)
    locked_canary.look(answers)


def test_b56_one_key_sees_nothing_of_anothers_prefixes(locked, locked_canary):
    prompt = "".join(random.Random(5).choices(string.ascii_lowercase, k=300))

    def cached(key: str, **more: Any) -> int:
        with httpx.Client(base_url=locked.url, timeout=30) as http:
            body = {"prompt": prompt, "max_tokens": 1, **more}
            usage = http.post(TEXT, json=body, headers={"X-Api-Key": key}).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(KEY) == 0 and cached(KEY) > 200
    assert cached(OTHER) == 0 and cached(OTHER) > 200
    assert cached(OTHER, cache_salt="acme") == 0
    locked_canary.look([])


def test_b58_what_one_key_keeps_another_does_not_find(locked, locked_canary):
    mine, theirs = {"X-Api-Key": KEY}, {"X-Api-Key": OTHER}
    with httpx.Client(base_url=locked.url, timeout=30) as http:
        file = http.post(
            "/v1/files", files={"file": ("../../x.jsonl", b"{}\n")}, data={"purpose": "batch"}, headers=mine
        )
        file_id = file.json()["id"]
        assert ".." not in file.json()["filename"] or "/" not in file.json()["filename"]
        response = http.post(
            "/v1/responses", json={"model": "tiny", "input": "hi", "max_output_tokens": 3}, headers=mine
        )
        assert response.status_code == 200, response.text
        response_id = response.json()["id"]
        batch = http.post("/v1/batches", json={"input_file_id": file_id, "endpoint": CHAT}, headers=mine).json()["id"]
        request_id = http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=mine).headers[
            "x-millstream-request-id"
        ]
        paths = (
            f"/v1/files/{file_id}",
            f"/v1/files/{file_id}/content",
            f"/v1/responses/{response_id}",
            f"/v1/batches/{batch}",
            f"/v1/requests/{request_id}/timeline",
        )
        for path in paths:
            assert http.get(path, headers=mine).status_code == 200, path
            assert http.get(path, headers=theirs).status_code == 404, path
        body = {"input_file_id": file_id, "endpoint": CHAT}
        assert http.post("/v1/batches", json=body, headers=theirs).status_code == 400
        asked = {"model": "tiny", "input": "and?", "previous_response_id": response_id}
        assert http.post("/v1/responses", json=asked, headers=theirs).status_code == 404
        assert http.delete(f"/v1/files/{file_id}", headers=theirs).status_code == 404
    locked_canary.look([])


def test_b59_no_prompt_and_no_key_is_in_the_logs(locked, locked_canary):
    word = "xyzzyplughfoobar"
    with httpx.Client(base_url=locked.url, timeout=30) as http:
        for body in (
            {"prompt": word, "max_tokens": 2},
            {"prompt": word, "n": 0},
            {"prompt": word, "guided_regex": f"({word}"},
        ):
            http.post(TEXT, json=body, headers={"X-Api-Key": KEY})
        metrics = http.get("/metrics", headers={"X-Api-Key": KEY}).text
    told = locked.log
    assert word not in told and word not in metrics and KEY not in told and KEY not in metrics
    locked_canary.look([])
