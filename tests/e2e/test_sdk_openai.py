"""The clients that people use, against a whole server: OpenAI's SDK, LangChain on top of it, and plain HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from serving import WholeServer, whole_server

KEY = "key-of-acme-1234"
MESSAGES: Any = [{"role": "user", "content": "Where does the stream go?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "turn_wheel",
        "description": "Turns the wheel of the mill.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[WholeServer]:
    words = ("--served-model-name", "tiny", "--api-key", f"acme:{KEY}")
    with whole_server(tmp_path_factory.mktemp("sdk"), *words) as made:
        yield made


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_models_and_errors(server, client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[], max_tokens=3)
    assert caught.value.param == "messages" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found" and "tiny" in missing.value.message


def test_a_chat_whole_and_streamed_is_the_same(client):
    given: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_completion_tokens": 20,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**given)
    choice = whole.choices[0]
    assert choice.finish_reason in ("stop", "length") and whole.usage is not None and choice.logprobs is not None
    assert choice.logprobs.content is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.completion_tokens <= 20 and len(choice.logprobs.content[0].top_logprobs) == 2
    text, usage = "", None
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        else:
            usage = chunk.usage
    assert text == choice.message.content and usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_helper_that_folds_a_stream(client):
    # It takes an answer that was cut off for an error.
    given: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": {"guided_choice": ["the sea", "the mill"]}}
    with client.chat.completions.stream(**given) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content


def test_text_completions(client):
    given: Any = {
        "model": "tiny",
        "prompt": ["the mill", "a stream"],
        "max_tokens": 9,
        "seed": 1,
        "n": 2,
        "logprobs": 1,
    }
    whole = client.completions.create(**given)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**given, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_structured_output_is_parsed(client):
    class Answer(pydantic.BaseModel):
        good: bool
        size: int = pydantic.Field(ge=0, le=9)

    parsed = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Answer, max_completion_tokens=200, seed=5
    )
    answer = parsed.choices[0].message.parsed
    assert isinstance(answer, Answer) and 0 <= answer.size <= 9
    choice = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=10, seed=1, extra_body={"guided_choice": ["yes", "no"]}
    ).choices[0]
    assert choice.message.content in ("yes", "no")


def test_tools_are_called_whole_and_streamed(client):
    given: Any = {
        "model": "tiny", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "seed": 7,
        "parallel_tool_calls": False, "max_completion_tokens": 400,
    }  # fmt: skip
    choice = client.chat.completions.create(**given).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.name == "turn_wheel" and set(json.loads(call.function.arguments)) == {"on"}
    arguments, names = "", []
    for chunk in client.chat.completions.create(**given, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            names += [delta.function.name] if delta.function.name else []
            arguments += delta.function.arguments or ""
    assert (names, arguments) == (["turn_wheel"], call.function.arguments)
    answered = [
        *MESSAGES,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "it turns"},
    ]
    after = client.chat.completions.create(model="tiny", messages=answered, tools=[TOOL], max_completion_tokens=8)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_many_at_once_with_the_async_client(server):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(seed: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_completion_tokens=10, seed=seed % 4, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(one, range(24)))

    texts = asyncio.run(ask())
    # The same seed gives the same text, whoever is beside it.
    assert len(set(texts)) <= 4 and all(texts[i] == texts[i % 4] for i in range(24))


def test_a_client_that_waits_no_longer_than_so_is_told(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(
            model="tiny", prompt="x" * 1000, max_tokens=500, extra_headers={"X-Request-Timeout": "0.000001"}
        )
    assert caught.value.status_code == 504


def test_responses(client):
    whole = client.responses.create(model="tiny", input="hello", max_output_tokens=9, instructions="Be short.")
    assert whole.status in ("completed", "incomplete") and whole.output[0].type == "message"
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    events = list(client.responses.create(model="tiny", input="hello", max_output_tokens=9, stream=True))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == events[-1].response.output_text
    )
    after = client.responses.create(model="tiny", input="and then?", previous_response_id=whole.id, max_output_tokens=4)
    assert after.previous_response_id == whole.id and after.usage is not None and whole.usage is not None
    assert after.usage.input_tokens > whole.usage.input_tokens
    background = client.responses.create(
        model="tiny", input="count", max_output_tokens=1500, background=True, extra_body={"ignore_eos": True}
    )
    assert background.status in ("queued", "in_progress")
    assert client.responses.cancel(background.id).status in ("cancelled", "completed", "incomplete")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_00000000000000000000000000000000")


def test_files_and_batches(client):
    rows = [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "seed": 1}}
        for i in range(6)
    ]  # fmt: skip
    rows.append({"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}})
    data = io.BytesIO("\n".join(map(json.dumps, rows)).encode())
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    end = time.monotonic() + 30
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
    assert batch.status == "completed" and batch.request_counts is not None and batch.output_file_id is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 1)
    lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    texts = {line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(6)] and len(texts) == 1
    assert batch.error_file_id is not None and '"bad"' in client.files.content(batch.error_file_id).text
    assert client.files.delete(file.id).deleted and file.id not in [one.id for one in client.files.list()]


def test_langchain(server):
    llm = ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=KEY, max_tokens=12, seed=3, temperature=0)  # type: ignore[call-arg, arg-type]
    messages = [SystemMessage("Be short."), HumanMessage("Where does the stream go?")]
    whole = llm.invoke(messages)
    assert "".join(str(chunk.content) for chunk in llm.stream(messages)) == whole.content
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] <= 12
    bound = llm.bind_tools([TOOL], tool_choice="turn_wheel").bind(max_tokens=400)
    (call,) = bound.invoke(messages).tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "turn_wheel" and isinstance(call["args"]["on"], bool)


def test_plain_http(server):
    """As small tools ask, with nothing but a POST and lines."""
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as http:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        assert json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"
