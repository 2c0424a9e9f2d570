"""However an engine cuts its outputs into chunks, a stream tells what the whole response tells, and that is the text.

The engine here is a script: it says given tokens in given pieces. So every cut, and every order of outputs, can be had.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from api_bench import ApiBench, OpenGate
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from millstream.core.client import Chunk, Usage
from millstream.core.errors import MillstreamError
from millstream.core.plan import Logprob, TokenLogprobs
from millstream.core.request import Request
from millstream.core.sequence import Finish
from millstream.serve.caller import Caller
from millstream.serve.errors import told
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Observatory
from millstream.serve.openai.routes import routes
from millstream.serve.records import log_line
from millstream.serve.service import ApiConfig, Service
from millstream.text.stream import StreamText
from tiny_files import build_model

CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/generate"
MESSAGES = [{"role": "user", "content": "Where does the stream go?"}]
PROMPT = "the mill"
# Half of what is said is of these, so that stop strings and characters of several bytes come up.
LETTERS = "ab é🎉"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    bench = ApiBench(build_model(tmp_path_factory.mktemp("m") / "tiny"))
    yield bench.service.served
    bench.close()


class Script:
    """An engine that says `outputs`, each in pieces of `sizes` tokens, one piece of each output after the other."""

    def __init__(self, outputs: Sequence[tuple[list[int], Finish, str | None]], sizes: Sequence[int]) -> None:
        self.outputs, self.sizes, self.asked = outputs, sizes, list[Request]()

    def new_id(self) -> int:
        return len(self.asked) + 1

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        self.asked.append(request)
        left = [list(tokens) for tokens, _, _ in self.outputs]
        ended = [False for _ in left]
        count, turn = request.num_prompt, 0
        while not all(ended):
            for index, tokens in enumerate(left):
                if ended[index]:
                    continue
                size = self.sizes[turn % len(self.sizes)]
                turn += 1
                said, left[index] = tokens[:size], tokens[size:]
                _, finish, stop = self.outputs[index]
                ended[index] = not left[index]
                total = len(self.outputs[index][0])
                yield Chunk(
                    request.id,
                    index,
                    tuple(said),
                    tuple(logprob(token) for token in said) if request.params.logprobs is not None else (),
                    finish=finish if ended[index] else None,
                    stop_reason=stop if ended[index] else None,
                    usage=Usage(count, total, 3) if ended[index] else None,
                )
                await asyncio.sleep(0)


def logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(Logprob(token, -token / 100, 2), (Logprob((token + 1) % 250, -0.5, 1),))


class Room:
    """The routes over a script, without a socket."""

    def __init__(self, served: Any, script: Script, config: ApiConfig | None = None) -> None:
        self.gate, self.records = OpenGate(), list[Any]()
        watched = Observatory(Metrics("tiny", process=False))
        watched.ended = self.records.append  # type: ignore[method-assign]
        self.service = Service(script, watched, self.gate, config or ApiConfig())  # type: ignore[arg-type]
        self.service.served = served

        async def handler(request: Any, error: Exception) -> Any:
            return told(request, error)

        inner = Starlette(routes=routes(self.service)[1], exception_handlers={Exception: handler})

        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["caller"] = Caller("r" * 32)
            # Starlette raises again what it has answered.
            with contextlib.suppress(MillstreamError, msgspec.ValidationError):
                await inner(scope, receive, send)

        self.app = app

    def ask(self, *asked: tuple[str, dict[str, Any]]) -> list[httpx.Response]:
        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                return [await http.post(route, json=body) for route, body in asked]

        try:
            return asyncio.run(all_of_them())
        finally:
            self.service._threads.shutdown()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


@st.composite
def scripts(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[str], bool]:
    letter = st.sampled_from(sorted({4 + byte for byte in LETTERS.encode()}))
    output = st.lists(letter | st.integers(4, 259) | st.sampled_from([0, 2]), min_size=1, max_size=24)
    return (
        draw(st.lists(output, min_size=1, max_size=3)),
        draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        draw(st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2)),
        draw(st.booleans()),
    )


def ended(served: Any, tokens: list[int], stop: list[str]) -> tuple[list[int], Finish, str | None, str]:
    """What an engine makes of an output that would go on so, and its text."""
    stream = StreamText(served.tokenizer, stop)
    text = stream.push(tokens)
    if stream.stopped:
        return tokens[: stream.num_tokens], Finish.STOP, str(stream.stop_reason), text
    return tokens, Finish.LENGTH, None, text + stream.finish()


@settings(max_examples=60, deadline=None)
@given(made=scripts())
def test_a_stream_is_the_whole_for_every_cut(tiny, made):
    said, sizes, stop, logprobs = made
    found = [ended(tiny, tokens, stop) for tokens in said]
    n = len(said)
    room = Room(tiny, Script([one[:3] for one in found], sizes))
    base = {"n": n, "stop": stop, "max_tokens": 24, "return_token_ids": True}
    live = {"stream": True, "stream_options": {"include_usage": True}}
    text = {**base, "prompt": PROMPT, "logprobs": 1 if logprobs else None}
    chat = {**base, "messages": MESSAGES, "logprobs": logprobs, "top_logprobs": 2 if logprobs else None}
    ids = {**base, "token_ids": [5, 6], "logprobs": 1 if logprobs else None}
    del ids["return_token_ids"]
    whole, stream, chat_whole, chat_stream, ids_whole, ids_stream = room.ask(
        (TEXT, text),
        (TEXT, {**text, **live}),
        (CHAT, chat),
        (CHAT, {**chat, **live}),
        (TOKENS, ids),
        (TOKENS, {**ids, "stream": True}),
    )

    # Text, and what the rest of the engine's users are given for the same tokens.
    choices = whole.json()["choices"]
    assert [choice["text"] for choice in choices] == [one[3] for one in found]
    assert [choice["token_ids"] for choice in choices] == [one[0] for one in found]
    told = events(stream)
    folded = fold(told, n)
    for choice, mine in zip(choices, folded, strict=True):
        assert mine["text"] == choice["text"]
        assert mine["logprobs"] == (choice["logprobs"] or {})
        assert mine["last"]["finish_reason"] == choice["finish_reason"]
        assert mine["last"]["stop_reason"] == choice["stop_reason"]
        assert mine["token_ids"] == choice["token_ids"] and mine["prompt"] == [choice["prompt_token_ids"]]
    assert told[-1] == {**told[-1], "choices": [], "usage": whole.json()["usage"]}

    # Chats.
    choices, told = chat_whole.json()["choices"], events(chat_stream)
    folded = fold(told, n)
    for choice, mine in zip(choices, folded, strict=True):
        assert mine["text"] == choice["message"]["content"]
        assert mine["entries"] == ((choice["logprobs"] or {}).get("content") or [])
        assert mine["last"]["finish_reason"] == choice["finish_reason"]
        assert mine["token_ids"] == choice["token_ids"]
        if logprobs:
            assert [bytes(entry["bytes"]) for entry in mine["entries"]] == [
                tiny.tokenizer.token_bytes(token) for token in choice["token_ids"]
            ]
    assert [event["prompt_token_ids"] for event in told if "prompt_token_ids" in event] == [
        chat_whole.json()["prompt_token_ids"]
    ]
    assert told[-1] == {**told[-1], "choices": [], "usage": chat_whole.json()["usage"]}

    # Tokens.
    choices, told = ids_whole.json()["choices"], events(ids_stream)
    for choice in choices:
        mine = [one for event in told for one in event["choices"] if one["index"] == choice["index"]]
        assert [token for one in mine for token in one["token_ids"]] == choice["token_ids"]
        assert [entry for one in mine for entry in one.get("logprobs", [])] == choice.get("logprobs", [])
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert told[-1]["usage"] == ids_whole.json()["usage"]

    # Each was counted once, and has left its place.
    assert [record.status for record in room.records] == [200] * 6
    assert room.gate.inside == room.gate.waiting == 0


def fold(told: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"text": "", "logprobs": {}, "entries": [], "token_ids": [], "prompt": [], "last": {}} for _ in range(n)
    ]
    for choice in (one for event in told for one in event["choices"]):
        mine = made[choice["index"]]
        assert mine["last"].get("finish_reason") is None, "more after the end of an output"
        mine["last"] = choice
        mine["text"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        mine["token_ids"] += choice.get("token_ids", [])
        if "prompt_token_ids" in choice:
            mine["prompt"].append(choice["prompt_token_ids"])
        for name, values in (choice["logprobs"] or {}).items():
            if name == "content":
                mine["entries"] += values
            elif name != "refusal":
                mine["logprobs"].setdefault(name, []).extend(values)
    return made


def test_thinking_is_counted_over_all_outputs(tiny):
    said = ["<think>ab</think>b", "a"]
    outputs = [(tiny.tokenizer.encode(one), Finish.LENGTH, None) for one in said]
    room = Room(tiny, Script(outputs, [3]), ApiConfig(reasoning_parser="think"))
    body = {"messages": MESSAGES, "n": 2, "max_tokens": 30, "temperature": 0.3, "seed": 4}
    whole, stream = room.ask((CHAT, body), (CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert whole.json()["choices"][0]["message"]["reasoning_content"] == "ab"
    count = whole.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < count < len(outputs[0][0]) + len(outputs[1][0])
    assert events(stream)[-1]["usage"] == whole.json()["usage"]
    # Whoever watches is told the same, and how it was sampled.
    for record in room.records:
        assert record.reasoning_tokens == count and log_line(record)["reasoning_tokens"] == count
        assert record.sampling["temperature"] == 0.3 and record.sampling["seed"] == 4


def test_what_a_stream_would_lose_is_refused(tiny):
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]))
    asked = {CHAT: {"messages": MESSAGES}, TEXT: {"prompt": PROMPT}, TOKENS: {"token_ids": [5]}}
    answers = room.ask(
        *((route, {**body, "stream": True, "prompt_logprobs": 1, "max_tokens": 1}) for route, body in asked.items())
    )
    for answer in answers:
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"


def test_a_sampling_field_lies_in_one_place(tiny):
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]), ApiConfig(strict=True))
    inside = {"max_new_tokens": 7, "temperature": 0.5, "slo": {"ttft_s": 2.0}}
    good, twice, unknown, wrong, model = room.ask(
        (TOKENS, {"token_ids": [5], "slo": {"tpot_s": 1.0}, "sampling_params": {"max_new_tokens": 7, "top_k": 3}}),
        (TOKENS, {"token_ids": [5], "temperature": 1, "sampling_params": inside}),
        (TOKENS, {"token_ids": [5], "sampling_params": {"temprature": 1}}),
        (TOKENS, {"token_ids": [5], "sampling_params": {"top_k": "3"}}),
        (TOKENS, {"token_ids": [5], "sampling_params": {"token_ids": [6]}}),
    )
    assert good.status_code == 200
    asked = room.service.client.asked[0]  # type: ignore[attr-defined]
    assert (asked.params.max_tokens, asked.params.top_k, asked.slo.tpot_s) == (7, 3, 1.0)
    for answer, name in (
        (twice, "temperature"),
        (unknown, "temprature"),
        (wrong, "top_k"),
        (model, "token_ids"),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == f"sampling_params.{name}", error
    assert "temperature" in unknown.json()["error"]["message"]


def test_a_priority_that_no_engine_could_be_told_is_named(tiny):
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]))
    low, high, over = room.ask(
        *((TEXT, {"prompt": PROMPT, "priority": one}) for one in (-(2**63) + 1, 2**63 - 1, 2**64))
    )
    assert low.status_code == high.status_code == 200
    assert over.status_code == 400 and over.json()["error"]["param"] == "priority"


def test_bytes_are_counted_and_not_characters(tiny):
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]), ApiConfig(prompt_bytes=300))
    long = "é" * 151
    tool = {"type": "function", "function": {"name": "f", "description": long}}
    asked = (
        (TEXT, {"prompt": long}, "prompt"),
        (TEXT, {"prompt": ["é" * 80, "é" * 80]}, "prompt"),
        ("/tokenize", {"prompt": long}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
        (CHAT, {"messages": MESSAGES, "tools": [tool]}, "tools"),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"x": [long]}}, "chat_template_kwargs"),
    )
    for (_, _, param), answer in zip(asked, room.ask(*(one[:2] for one in asked)), strict=True):
        assert answer.status_code == 413 and answer.json()["error"]["param"] == param
    (fits,) = room.ask((TEXT, {"prompt": "é" * 150, "max_tokens": 1}))
    assert fits.status_code == 200


def test_what_is_long_is_done_beside_the_event_loop(tiny, monkeypatch):
    """Whatever of it is long: the prompt, many short ones, tools, names, tokens. A client's template is always."""
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]), ApiConfig(chat_templates=True))
    aside: list[bool] = []

    def noted(method: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            aside.append(threading.current_thread().name.startswith("millstream-text"))
            return method(*given, **named)

        return called

    words = "word " * 1000
    tool = {"type": "function", "function": {"name": "f", "description": words}}
    one = {"role": "user", "content": "x"}
    short: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"prompt": "x", "max_tokens": 1}),
        (f"{CHAT}/render", {"messages": [one]}),
    ]
    long: list[tuple[str, dict[str, Any]]] = [
        ("/tokenize", {"prompt": words}),
        (f"{TEXT}/render", {"prompt": ["word " * 10] * 100}),
        (f"{CHAT}/render", {"messages": [{"role": "user", "content": words}]}),
        (f"{CHAT}/render", {"messages": [one], "tools": [tool]}),
        (f"{CHAT}/render", {"messages": [one], "chat_template_kwargs": {"x": [words]}}),
        (f"{CHAT}/render", {"messages": [one], "chat_template": "{{ messages[0].content }}"}),
    ]
    kind = type(tiny.tokenizer)
    for name in ("encode", "encode_segments"):
        monkeypatch.setattr(kind, name, noted(getattr(kind, name)))
    for asked, expected in ((short, False), (long, True)):
        for body in asked:
            aside.clear()
            (answer,) = Room(tiny, room.service.client, room.service.config).ask(body)  # type: ignore[arg-type]
            assert answer.status_code == 200, answer.text
            assert aside and all(found is expected for found in aside), body


@pytest.mark.parametrize(("word", "own"), [("model", True), ("auto", True), ("none", False), ("vllm", False)])
def test_whose_sampling_defaults_there_are(tiny, word, own):
    room = Room(tiny, Script([([5], Finish.LENGTH, None)], [1]), ApiConfig(generation_config=word))
    served = room.service.take(tiny.facts, tiny.tokenizer)
    assert served.defaults == ({"temperature": 0.5, "top_k": 7} if own else {})
    room.service.close()
