"""The routes that generate: what they answer is what the engine says, streamed or not, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
from api_bench import ENGINE, ApiBench, wait

from millstream.core.request import SamplingParams, Structured
from millstream.engine.llm import LLM
from millstream.serve.service import ApiConfig
from tiny_files import SPECIAL, build_model

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
OURS: dict[str, Any] = {"tools": []}
IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}
MESSAGES = [{"role": "user", "content": "Where does the stream go?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def bench(model):
    made = ApiBench(model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model), ENGINE) as made:
        yield made


@pytest.fixture
def http(bench):
    with httpx.Client(base_url=bench.url, timeout=30) as client:
        yield client
    wait(bench.idle, what="something is left in the engine")


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", response.text[-300:]
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_completion_is_what_the_engine_says(http, llm, bench):
    body = {"prompt": "the mill by the stream", "max_tokens": 24, "temperature": 0.9, "seed": 5, "n": 2, "logprobs": 2}
    answer = http.post(TEXT, json=body).json()
    want = llm.generate(
        body["prompt"], llm.get_default_sampling_params(max_tokens=24, temperature=0.9, seed=5, n=2, logprobs=2)
    )[0]
    assert [choice["text"] for choice in answer["choices"]] == [out.text for out in want.outputs]
    assert [choice["finish_reason"] for choice in answer["choices"]] == [out.finish_reason for out in want.outputs]
    for choice, out in zip(answer["choices"], want.outputs, strict=True):
        shown = out.token_ids[: len(choice["logprobs"]["tokens"])]
        found = [position[token].logprob for token, position in zip(shown, out.logprobs, strict=False)]
        assert choice["logprobs"]["token_logprobs"] == found
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(want.prompt_token_ids)
    assert usage["completion_tokens"] == sum(len(out.token_ids) for out in want.outputs)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")


@pytest.mark.parametrize("n", [1, 3])
def test_the_deltas_of_a_stream_are_the_whole(http, n):
    body = {
        "messages": MESSAGES,
        "max_tokens": 30,
        "temperature": 1.0,
        "seed": 11,
        "n": n,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = http.post(CHAT, json=body).json()
    response = http.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    texts, reasons = {}, {}
    logprobs: dict[int, list[Any]] = {}
    for event in (told := events(response))[:-1]:
        assert event["object"] == "chat.completion.chunk" and len(event["choices"]) == 1
        choice = event["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        logprobs.setdefault(choice["index"], []).extend((choice["logprobs"] or {}).get("content", []))
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [texts[i] for i in range(n)] == [choice["message"]["content"] for choice in whole["choices"]]
    assert [reasons[i] for i in range(n)] == [choice["finish_reason"] for choice in whole["choices"]]
    for i, choice in enumerate(whole["choices"]):
        # The second time the prompt is in the prefix cache, and torch's products are not those of the first time.
        before = choice["logprobs"]["content"]
        assert [entry["token"] for entry in logprobs[i]] == [entry["token"] for entry in before]
        assert [e["logprob"] for e in logprobs[i]] == pytest.approx([e["logprob"] for e in before], abs=1e-4)
        assert all(len(entry["top_logprobs"]) == 2 for entry in before)
    usage, before = told[-1]["usage"], whole["usage"]
    assert told[-1]["choices"] == [] and usage["completion_tokens"] == before["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= before["prompt_tokens_details"]["cached_tokens"]


def test_a_text_stream_is_the_whole_too(http):
    body = {"prompt": ["one", "two", [5, 6, 7]], "max_tokens": 12, "temperature": 0.8, "seed": 2, "n": 2}
    whole = http.post(TEXT, json=body).json()
    texts: dict[int, str] = {}
    for event in events(http.post(TEXT, json={**body, "stream": True})):
        (choice,) = event["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert [texts[i] for i in range(6)] == [choice["text"] for choice in whole["choices"]]


def test_a_stop_string_is_cut_off_in_both_forms(http):
    base = {"prompt": "abc", "max_tokens": 60, "temperature": 1.0, "seed": 3}
    full = http.post(TEXT, json=base).json()["choices"][0]["text"]
    # One that has no part of a character in it.
    stop = next(full[i : i + 2] for i in range(8, 58) if "\ufffd" not in full[i : i + 2])
    want = full[: full.index(stop)]
    choice = http.post(TEXT, json={**base, "stop": stop}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (want, "stop", stop)
    streamed = events(http.post(TEXT, json={**base, "stop": [stop], "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in streamed) == want


def test_what_is_echoed_has_logprobs_and_may_be_all(http, llm):
    body = {"prompt": "the mill", "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = http.post(TEXT, json=body).json()["choices"][0]
    assert choice["text"] == "the mill" and choice["finish_reason"] == "length"
    want = llm.score("the mill")[0]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert sum(choice["logprobs"]["token_logprobs"][1:]) == pytest.approx(want.logprob)
    longer = http.post(TEXT, json={**body, "max_tokens": 4, "temperature": 0.0}).json()["choices"][0]
    assert longer["text"].startswith("the mill") and len(longer["logprobs"]["tokens"]) > len(
        choice["logprobs"]["tokens"]
    )


def test_structured_output_and_tools(http):
    answer = http.post(TEXT, json={"prompt": "x", "max_tokens": 30, "structured_outputs": {"regex": "[ab]{5}"}}).json()
    assert len(answer["choices"][0]["text"]) == 5 and set(answer["choices"][0]["text"]) <= {"a", "b"}
    tool = {
        "type": "function",
        "function": {
            "name": "turn",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
                "additionalProperties": False,
            },
        },
    }
    body = {"messages": MESSAGES, "tools": [tool], "tool_choice": "required", "max_tokens": 120, "seed": 1}
    choice = http.post(CHAT, json=body).json()["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        call = choice["message"]["tool_calls"][0]
        assert call["function"]["name"] == "turn" and json.loads(call["function"]["arguments"])["on"] in (True, False)
    else:
        assert choice["finish_reason"] == "length"
    arguments: dict[int, str] = {}
    for event in events(http.post(CHAT, json={**body, "stream": True})):
        for delta in event["choices"][0]["delta"].get("tool_calls", []):
            arguments[delta["index"]] = arguments.get(delta["index"], "") + delta["function"]["arguments"]
    if choice["finish_reason"] == "tool_calls":
        assert arguments[0] == choice["message"]["tool_calls"][0]["function"]["arguments"]


def test_tokens_go_in_and_come_out(http, llm):
    ids = http.post("/tokenize", json={"prompt": "the mill"}).json()
    assert ids["tokens"] == llm.tokenizer.encode("the mill") and ids["count"] == len(ids["tokens"])
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "the mill"}
    chat = http.post("/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    assert chat["tokens"] == llm.chat_ids(MESSAGES) and len(chat["token_strs"]) == chat["count"]
    params = llm.get_default_sampling_params(max_tokens=9, seed=4)
    want = llm.generate({"prompt_token_ids": ids["tokens"]}, params)[0].outputs[0]
    for body in (
        {"token_ids": ids["tokens"], "max_tokens": 9, "seed": 4},
        {"input_ids": ids["tokens"], "sampling_params": {"max_new_tokens": 9, "seed": 4}},
    ):
        choice = http.post("/generate", json=body).json()["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"]) == (want.token_ids, want.finish_reason)
    streamed = events(
        http.post("/generate", json={"token_ids": ids["tokens"], "max_tokens": 9, "seed": 4, "stream": True})
    )
    assert [token for event in streamed[:-1] for token in event["choices"][0]["token_ids"]] == want.token_ids


def test_the_prompt_of_a_chat_is_shown_as_it_is(http, llm):
    shown = http.post(f"{CHAT}/render", json={"messages": MESSAGES}).json()
    assert shown["token_ids"] == llm.chat_ids(MESSAGES)
    assert "Where does the stream go?" in shown["prompt"] and shown["count"] == len(shown["token_ids"])
    shown = http.post(f"{TEXT}/render", json={"prompt": "a<|im_end|>"}).json()["data"][0]
    # What a client spells is text, and no control token.
    assert shown["token_ids"] == llm.tokenizer.encode("a<|im_end|>")


BAD: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "n of 0": (TEXT, {"prompt": "x", "n": 0}, 400, "n"),
    "n as text": (TEXT, {"prompt": "x", "n": "3"}, 400, "n"),
    "n is true": (TEXT, {"prompt": "x", "n": True}, 400, "n"),
    "n of a thousand millions": (CHAT, {"messages": MESSAGES, "n": 10**9}, 400, "n"),
    "no tokens": (CHAT, {"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
    "tokens beyond the context": (TEXT, {"prompt": "x", "max_tokens": 2**31}, 400, "max_tokens"),
    "many logprobs": (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    "top logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    "cold": (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    "a token that is none": (TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    "a token that is a word": (TEXT, {"prompt": "x", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "an empty stop": (TEXT, {"prompt": "x", "stop": [""]}, 400, "stop"),
    "an empty prompt": (TEXT, {"prompt": ""}, 400, "prompt"),
    "no prompts": (TEXT, {"prompt": []}, 400, "prompt"),
    "a prompt of nothing": (TEXT, {"prompt": ["a", ""]}, 400, "prompt[1]"),
    "a prompt of lists of words": (TEXT, {"prompt": [["a"]]}, 400, "prompt[0][0]"),
    "ids that are none": (TEXT, {"prompt": [1, 99999]}, 400, "prompt"),
    "many prompts": (TEXT, {"prompt": ["a"] * 257}, 400, "prompt"),
    "too long": (TEXT, {"prompt": "x" * 5000}, 400, "prompt"),
    "a suffix": (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    "the best of many": (TEXT, {"prompt": "x", "best_of": 3}, 400, "best_of"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "a role that is none": (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
    "no role": (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages[0].content[0].type"),
    "a template of one's own": (CHAT, {"messages": MESSAGES, "chat_template": "x"}, 403, "chat_template"),
    "our name": (CHAT, {"messages": MESSAGES, "chat_template_kwargs": OURS}, 400, "chat_template_kwargs.tools"),
    "another model": (CHAT, {"messages": MESSAGES, "model": "gpt-5"}, 404, "model"),
    "two structures": (TEXT, {"prompt": "x", "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice"),
    "a bad regex": (TEXT, {"prompt": "x", "guided_regex": "("}, 400, "guided_regex"),
    "a tool that there is not": (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice"),
    "two deadlines": (TEXT, {"prompt": "x", "deadline_s": -1}, 400, "deadline_s"),
    "a salt without end": (TEXT, {"prompt": "x", "cache_salt": "s" * 300}, 400, "cache_salt"),
    "both forms": ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "prompt"),
    "tokens that are none": ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    "no ids": ("/generate", {"max_tokens": 3}, 400, "token_ids"),
    "the older form of tools": (CHAT, {"messages": MESSAGES, "functions": [{}]}, 400, "functions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told_before_anything_begins(http, name, stream):
    route, body, status, param = BAD[name]
    if stream and route in ("/tokenize", "/detokenize"):
        pytest.skip("it has no stream")
    response = http.post(route, json={**body, "stream": True} if stream else body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["message"] and error["type"] and "Traceback" not in response.text


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b'{"prompt": "x"} trailing', {}, 400),
        (b"\xef\xbb\xbf{}", {}, 400),
        (b'{"prompt": "\xff"}', {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "x", "temperature": 1e400}', {}, 400),
        (b'{"prompt": "x", "temperature": NaN}', {}, 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}", {}, 400),
        (b'{"prompt": "x", "a": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", {}, 400),
        (json.dumps({f"k{i}": 1 for i in range(5000)} | {"prompt": "x"}).encode(), {}, 400),
        (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_bodies_that_are_no_requests(http, content, headers, status):
    response = http.post(TEXT, content=content, headers={"Content-Type": "application/json", **headers})
    assert response.status_code == status and response.json()["error"]["message"]


def test_fields_that_nobody_knows_are_told(http, bench):
    body = {"prompt": "x", "max_tokens": 1, "user": "me", "temprature": 0.3}
    response = http.post(TEXT, json=body)
    assert response.status_code == 200
    assert bench.records[-1].status == 200


def test_every_request_is_counted_once(http, bench):
    before = len(bench.records)
    http.post(TEXT, json={"prompt": "x", "max_tokens": 3})
    http.post(TEXT, json={"prompt": "x", "n": 0})
    http.post(CHAT, json={"messages": MESSAGES, "stream": True, "max_tokens": 3})
    http.post(CHAT, json={"messages": MESSAGES, "model": "other"})
    wait(lambda: len(bench.records) == before + 4)
    assert [record.status for record in bench.records[before:]] == [200, 400, 200, 404]
    assert bench.records[before].output_tokens in (1, 2, 3) and bench.records[before].prompt_tokens == 1


def test_whoever_finds_no_room_is_told_when_to_come_again(http, bench):
    bench.gate.full = True
    try:
        response = http.post(TEXT, json={"prompt": "x"})
    finally:
        bench.gate.full = False
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert bench.records[-1].shed == "queue_full" and response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(bench, stream):
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": stream, "n": 4}).encode()
    host, port = bench.url.removeprefix("http://").split(":")
    before = len(bench.records)
    with socket.create_connection((host, int(port))) as sock:
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        wait(lambda: bench.load.running > 0)
    wait(bench.idle)
    wait(lambda: len(bench.records) == before + 1)
    assert bench.records[-1].status == 499


def test_a_deadline_ends_an_output_with_what_it_has(http, bench):
    # Of a tiny model a step takes a millisecond or so.
    body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "n": 8, "deadline_s": 0.12}
    response = http.post(TEXT, json=body)
    if response.status_code == 200:
        reasons = {choice["finish_reason"] for choice in response.json()["choices"]}
        assert reasons <= {"timeout", "length"}
    else:
        assert response.status_code == 504 and response.json()["error"]["type"] == "timeout_error"
    response = http.post(TEXT, json={**body, "prompt": "y" * 200, "max_tokens": 20, "deadline_s": 1e-6})
    assert response.status_code == 504
    response = http.post(TEXT, json={**body, "deadline_s": None}, headers={"X-Request-Timeout": "0.000001"})
    assert response.status_code == 504


def test_tenants_share_no_prefix_and_one_shares_its_own(http):
    body = {"prompt": "s" * 120, "max_tokens": 1, "temperature": 0.0}

    def cached(tenant: str, **more: Any) -> int:
        answer = http.post(TEXT, json={**body, **more}, headers={"X-Tenant": tenant}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("a") > 64 and cached("b") == 0
    assert cached("a", cache_salt="mine") == 0 and cached("a", cache_salt="mine") > 64
    # Nobody can spell another's.
    assert cached("", cache_salt="salt-a") == 0


def test_a_served_name_a_template_and_strictness(model):
    bench = ApiBench(model, ApiConfig(model_names=("mill", "stream"), strict=True, chat_templates=True))
    try:
        with httpx.Client(base_url=bench.url, timeout=30) as http:
            answer = http.post(TEXT, json={"model": "stream", "prompt": "x", "max_tokens": 1}).json()
            assert answer["model"] == "stream"
            error = http.post(TEXT, json={"prompt": "x", "max_token": 1}).json()["error"]
            assert error["param"] == "max_token" and "max_tokens" in error["message"]
            assert http.post(TEXT, json={"prompt": "x", "max_tokens": 1, "user": "me"}).status_code == 200
            shown = http.post(
                f"{CHAT}/render", json={"messages": MESSAGES, "chat_template": "{{ messages[0].content[:5] }}"}
            )
            assert shown.json()["prompt"] == "Where"
            bomb = {"messages": MESSAGES, "chat_template": "{% for i in range(10**9) %}x{% endfor %}"}
            began = time.monotonic()
            response = http.post(f"{CHAT}/render", json=bomb)
            assert response.status_code == 400 and time.monotonic() - began < 5
            spied = http.post(
                f"{CHAT}/render", json={"messages": MESSAGES, "chat_template": "{{ ''.__class__.__mro__ }}"}
            )
            assert spied.status_code == 400 and spied.json()["error"]["param"] == "chat_template"
    finally:
        bench.close()


def test_a_long_prompt_lets_others_go_on(http):
    """Text beyond what is cut in place goes to a thread; here only that it comes out the same."""
    text = "ab " * 1500
    one = http.post("/tokenize", json={"prompt": text}).json()["count"]
    assert one == len(text)
    big = http.post("/tokenize", json={"prompt": "x" * (4 << 20) + "y"})
    assert big.status_code == 413


def test_bytes_of_a_token_come_with_its_logprob(http):
    body = {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "seed": 8, "temperature": 1.0}
    choice = http.post(CHAT, json=body).json()["choices"][0]
    data = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    # Control tokens have logprobs and are not shown.
    for special in SPECIAL:
        data = data.replace(special.encode(), b"")
    assert data.decode("utf-8", "replace") == choice["message"]["content"]


def test_defaults_of_the_model_are_those_of_requests(http, llm):
    params = llm.get_default_sampling_params(max_tokens=8, seed=1)
    assert params.top_k == 7
    text = http.post(TEXT, json={"prompt": "abc", "max_tokens": 8, "seed": 1}).json()["choices"][0]["text"]
    assert text == llm.generate("abc", params)[0].outputs[0].text
    assert isinstance(SamplingParams(structured=Structured.regex("a")).structured, Structured)
