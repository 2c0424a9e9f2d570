"""Anthropic's SDK against a whole server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from serving import WholeServer, whole_server

KEY = "key-of-acme-1234"
MESSAGES: Any = [{"role": "user", "content": "Where does the stream go?"}]
GREEDY: Any = {"extra_body": {"temperature": 0.0}}
TOOL: Any = {
    "name": "turn_wheel",
    "description": "Turns the wheel of the mill.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[WholeServer]:
    words = ("--served-model-name", "tiny", "--api-key", f"acme:{KEY}")
    with whole_server(tmp_path_factory.mktemp("sdk"), *words) as made:
        yield made


@pytest.fixture(scope="module")
def client(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def test_a_message_whole_and_streamed_is_the_same(client):
    given: Any = {"model": "tiny", "max_tokens": 20, "messages": MESSAGES, "system": "Be short.", **GREEDY}
    whole = client.messages.create(**given)
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.output_tokens <= 20
    with client.messages.stream(**given) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model="tiny", messages=MESSAGES, system="Be short.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_tools_are_used_whole_and_streamed(client):
    given: Any = {
        "model": "tiny", "max_tokens": 400, "messages": MESSAGES, "tools": [TOOL], **GREEDY,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    whole = client.messages.create(**given)
    (use,) = [block for block in whole.content if block.type == "tool_use"]
    assert whole.stop_reason == "tool_use" and use.name == "turn_wheel" and set(use.input) == {"on"}
    with client.messages.stream(**given) as stream:
        final = stream.get_final_message()
    (streamed,) = [block for block in final.content if block.type == "tool_use"]
    assert streamed.input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "it turns"}
    after: Any = [*MESSAGES, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model="tiny", max_tokens=5, messages=after, tools=[TOOL]).content is not None


def test_errors_have_its_own_shape(server, client):
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(
            model="tiny", max_tokens=3, messages=MESSAGES
        )
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="tiny", max_tokens=0, messages=MESSAGES)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=3, messages=MESSAGES)
