"""The Messages and Responses APIs through their own SDKs, over scripted chats."""

from __future__ import annotations

import json

import anthropic
import httpx
import openai
import pytest
from dialect_bench import ScriptedChats, said, serving, wait, weather, words

from millstream.core.errors import BadRequest, RequestFault
from millstream.text.tools.protocol import Content

SCRIPTS = {
    "weather?": weather(),
    "long": words("one two three", "length"),
    "stopped": words("one", stop="END"),
    "slow": [said(Content("a")), 0.2, said(Content("b")), 60.0, said(finish="stop")],
    "lost": [said(Content("half")), RequestFault("the engine was lost")],
    "bug": [said(Content("half")), KeyError("/secret/path")],
    "refused": [BadRequest("max_tokens", 9, "less")],
    "broken": [said(Content("half"))],
    "at once": [said(Content("all"), finish="stop", output_tokens=1)],
}
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
FUNCTION = {"type": "function", "name": "get_weather", "parameters": TOOL["input_schema"], "strict": None}


@pytest.fixture(scope="module")
def chats():
    return ScriptedChats(SCRIPTS)


@pytest.fixture(scope="module")
def url(chats, tmp_path_factory):
    with serving(chats, tmp_path_factory.mktemp("store")) as url:
        yield url


@pytest.fixture
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="key-a", max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key-a", max_retries=0) as client:
        yield client


def ask(text: str, **given):
    return {"model": "m", "max_tokens": 20, "messages": [{"role": "user", "content": text}], **given}


# -- Messages


def test_a_message(claude, chats):
    message = claude.messages.create(**ask("hello", system="be kind", stop_sequences=["x"]))
    assert message.content[0].text == "you said hello" and message.stop_reason == "end_turn"
    assert message.role == "assistant" and message.id.startswith("msg_") and message.model == "m"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (6, 4, 4)
    assert chats.asked[-1]["messages"][0] == {"role": "system", "content": "be kind"}
    assert chats.asked[-1]["stop"] == ["x"] and chats.asked[-1]["max_completion_tokens"] == 20


def test_a_message_streamed(claude):
    with claude.messages.stream(**ask("hello")) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert texts == ["you", " said", " hello"] and final.content[0].text == "you said hello"
    assert final.usage.output_tokens == 4 and final.stop_reason == "end_turn"


def test_a_tool_is_used_and_its_result_comes_back(claude, chats):
    for stream in (False, True):
        if stream:
            with claude.messages.stream(**ask("weather?", tools=[TOOL], tool_choice={"type": "any"})) as events:
                message = events.get_final_message()
        else:
            message = claude.messages.create(**ask("weather?", tools=[TOOL], tool_choice={"type": "any"}))
        thinking, call = message.content
        assert thinking.type == "thinking" and thinking.thinking == "hm"
        assert call.type == "tool_use" and call.name == "get_weather" and call.input == {"city": "Bern"}
        assert message.stop_reason == "tool_use" and chats.asked[-1]["tool_choice"] == "required"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        turns = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
        ]
        answer = claude.messages.create(model="m", max_tokens=9, messages=turns, tools=[TOOL])
        assert answer.content[0].text == "you said so?"
        asked = chats.asked[-1]["messages"]
        assert asked[1]["tool_calls"][0]["id"] == asked[2]["tool_call_id"] == call.id
        assert json.loads(asked[1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Bern"}


@pytest.mark.parametrize(
    "text, reason, stop",
    [("long", "max_tokens", None), ("stopped", "stop_sequence", "END"), ("at once", "end_turn", None)],
)
def test_why_a_message_ended(claude, text, reason, stop):
    message = claude.messages.create(**ask(text))
    assert (message.stop_reason, message.stop_sequence) == (reason, stop)


def test_tokens_are_counted(claude):
    counted = claude.messages.count_tokens(model="m", system="one two", messages=[{"role": "user", "content": "three"}])
    assert counted.input_tokens == 3


def test_errors_have_the_shape_that_the_sdk_reads(claude, url):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**ask("refused"))
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in body["error"]["message"] and body["request_id"] == "req_1"
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(**ask("refused"), stream=True)
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(**ask([{"type": "image", "source": {"type": "url", "url": "http://x"}}]))
    for text in (b"", b"{", b'{"model": 3}', b"[]"):
        answer = httpx.post(f"{url}/v1/messages", content=text)
        assert answer.status_code == 400 and answer.json()["type"] == "error", answer.text


@pytest.mark.parametrize("text, said_why", [("lost", "the engine was lost"), ("bug", "the server failed")])
def test_an_answer_that_is_lost_ends_its_stream_with_an_error(claude, text, said_why):
    with claude.messages.stream(**ask(text)) as stream, pytest.raises(anthropic.APIStatusError) as caught:
        list(stream.text_stream)
    assert said_why in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(anthropic.InternalServerError if text == "lost" else anthropic.APIStatusError) as caught:
        claude.messages.create(**ask(text))


def test_a_client_that_leaves_ends_its_message(claude, chats):
    left = chats.left
    with claude.messages.stream(**ask("slow")) as stream:
        assert next(iter(stream.text_stream)) == "a"
    wait(lambda: chats.left == left + 1 and chats.open == 0)


# -- Responses


def test_a_response(gpt, chats):
    response = gpt.responses.create(model="m", input="hello", instructions="be kind", max_output_tokens=20)
    assert response.output_text == "you said hello" and response.status == "completed"
    assert response.usage.input_tokens == 10 and response.usage.input_tokens_details.cached_tokens == 4
    assert response.usage.total_tokens == 14 and chats.asked[-1]["max_completion_tokens"] == 20
    assert gpt.responses.retrieve(response.id) == response


def test_a_response_streamed(gpt):
    with gpt.responses.stream(model="m", input="hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == ["you", " said", " hello"] and final.output_text == "you said hello"
    assert gpt.responses.retrieve(final.id).output_text == "you said hello"


def test_a_function_is_called_and_the_conversation_goes_on(gpt, chats):
    for stream in (False, True):
        asked = {"model": "m", "input": "weather?", "tools": [FUNCTION], "tool_choice": "required"}
        if stream:
            with gpt.responses.stream(**asked) as events:
                response = events.get_final_response()
        else:
            response = gpt.responses.create(**asked)
        thought, call = response.output
        assert thought.type == "reasoning" and thought.content[0].text == "hm"
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Bern"}
        assert response.usage.output_tokens_details.reasoning_tokens == 2
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        after = gpt.responses.create(model="m", previous_response_id=response.id, input=[result])
        assert after.output_text == "you said sun" and after.previous_response_id == response.id
        messages = chats.asked[-1]["messages"]
        assert [one["role"] for one in messages] == ["user", "assistant", "tool"]
        assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == call.call_id
        # And further, from there.
        last = gpt.responses.create(model="m", previous_response_id=after.id, input="and?", instructions="short")
        assert last.output_text == "you said and?"
        roles = [one["role"] for one in chats.asked[-1]["messages"]]
        assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]
        items = gpt.responses.input_items.list(last.id, order="asc").data
        assert [item.type for item in items][-2:] == ["message", "message"] and len(items) == 6


def test_why_a_response_ended(gpt):
    response = gpt.responses.create(model="m", input="long")
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"


def test_responses_that_are_not_stored_are_not_there(gpt):
    response = gpt.responses.create(model="m", input="hello", store=False)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.create(model="m", input="x", previous_response_id=response.id)


def test_responses_belong_to_their_key(gpt, url):
    response = gpt.responses.create(model="m", input="hello")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key-b", max_retries=0) as other:
        for work in (
            lambda: other.responses.retrieve(response.id),
            lambda: other.responses.delete(response.id),
            lambda: other.responses.input_items.list(response.id),
            lambda: other.responses.create(model="m", input="x", previous_response_id=response.id),
        ):
            with pytest.raises(openai.NotFoundError):
                work()
    gpt.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(response.id)


@pytest.mark.parametrize(
    "text, said_why", [("lost", "the engine was lost"), ("bug", "the server failed"), ("broken", "broke off")]
)
def test_a_response_that_is_lost_says_so_and_keeps_what_was_said(gpt, text, said_why):
    with gpt.responses.create(model="m", input=text, stream=True) as stream:
        last = list(stream)[-1]
    assert last.type == "response.failed" and said_why in last.response.error.message
    assert last.response.output_text == "half" and "secret" not in last.response.error.message
    whole = gpt.responses.create(model="m", input=text)
    assert whole.status == "failed" and gpt.responses.retrieve(whole.id).status == "failed"


def test_a_request_that_cannot_be_taken_is_refused_before_the_stream(gpt):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            gpt.responses.create(model="m", input="refused", stream=stream)


def test_a_client_that_leaves_ends_its_response(gpt, chats):
    left = chats.left
    with gpt.responses.create(model="m", input="slow", stream=True) as stream:
        created = next(iter(stream)).response
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    wait(lambda: chats.left == left + 1 and chats.open == 0)
    wait(lambda: _status(gpt, created.id) == "cancelled")
    assert gpt.responses.retrieve(created.id).output_text.startswith("a")


def _status(gpt, response_id):
    try:
        return gpt.responses.retrieve(response_id).status
    except openai.NotFoundError:
        return None


# -- in the background


def test_a_response_in_the_background_is_fetched_later(gpt):
    response = gpt.responses.create(model="m", input="hello", background=True)
    assert response.status == "queued" and response.background is True
    wait(lambda: gpt.responses.retrieve(response.id).status == "completed")
    assert gpt.responses.retrieve(response.id).output_text == "you said hello"
    assert gpt.responses.cancel(response.id).status == "completed"


def test_a_response_in_the_background_is_cancelled(gpt, chats):
    response = gpt.responses.create(model="m", input="slow", background=True)
    wait(lambda: gpt.responses.retrieve(response.id).status == "in_progress")
    cancelled = gpt.responses.cancel(response.id)
    assert cancelled.status == "cancelled" and chats.open == 0
    assert gpt.responses.retrieve(response.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="background"):
        gpt.responses.cancel(gpt.responses.create(model="m", input="x").id)


def test_a_stream_in_the_background_is_taken_up_where_it_was_left(gpt):
    seen = []
    with gpt.responses.create(model="m", input="slow", background=True, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
    response_id = seen[0].response.id
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    with gpt.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number) as stream:
        event = next(iter(stream))
    assert event.type == "response.output_text.delta" and event.delta == "b"
    assert event.sequence_number == seen[-1].sequence_number + 1
    gpt.responses.delete(response_id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(response_id)


def test_what_fails_in_the_background_is_told_by_the_response(gpt):
    response = gpt.responses.create(model="m", input="refused", background=True)
    wait(lambda: gpt.responses.retrieve(response.id).status == "failed")
    assert "max_tokens" in gpt.responses.retrieve(response.id).error.message
