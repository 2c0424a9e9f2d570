"""The Responses API: items as a chat, events that come to the response, and responses that are kept."""

from __future__ import annotations

import asyncio
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from test_messages_shapes import PIECES, unrolled

from millstream.core.errors import BadRequest
from millstream.serve.responses import kept
from millstream.serve.responses.events import ResponseEvents, new_response
from millstream.serve.responses.kept import KeptLimits, Responses
from millstream.serve.responses.shapes import Ask, own_items, to_chat
from millstream.serve.store import Store
from millstream.text.tools.protocol import Content, Whole

EVENT = TypeAdapter(ResponseStreamEvent)


def ask(**given) -> Ask:
    return msgspec.json.decode(json.dumps({"model": "m", "input": "hi", **given}), type=Ask)


def chat_of(**given):
    one = ask(**given)
    one.check()
    return to_chat(one, own_items(one))


def test_a_plain_request_is_a_chat():
    assert chat_of(instructions="be kind", max_output_tokens=9, temperature=0.5, top_p=0.9, seed=1) == {
        "model": "m",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
    }


def test_items_become_messages_and_a_turn_is_one_message():
    chat = chat_of(
        input=[
            {"role": "developer", "content": "rules"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "let me see", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "get", "arguments": '{"city": "Bern"}'},
            {"type": "function_call", "call_id": "c2", "name": "get", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"type": "function_call", "call_id": "c3", "name": "end", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c3", "output": ""},
            {"type": "reasoning", "summary": []},
        ]
    )

    def call(id, name, arguments):
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert chat["messages"] == [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [call("c1", "get", '{"city": "Bern"}'), call("c2", "get", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call("c3", "end", "{}")]},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
    ]


def test_two_answers_in_a_row_are_two_messages():
    given = [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert [one["content"] for one in chat_of(input=given)["messages"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "choice, names, expected",
    [
        (None, ["f", "g"], None),
        ("required", ["f", "g"], "required"),
        ({"type": "function", "name": "g"}, ["f", "g"], {"type": "function", "function": {"name": "g"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "g"}]}, ["g"], "required"),
    ],
)
def test_tools_and_the_choice_among_them(choice, names, expected):
    tools = [{"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True} for name in "fg"]
    chat = chat_of(tools=tools, tool_choice=choice)
    assert [tool["function"]["name"] for tool in chat["tools"]] == names and chat.get("tool_choice") == expected
    assert chat["tools"][0]["function"]["strict"] is True


def test_formats_and_logprobs_are_passed_on():
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    chat = chat_of(text={"format": form}, include=["message.output_text.logprobs"], top_logprobs=2)
    assert chat["response_format"] == {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}
    assert chat["logprobs"] is True and chat["top_logprobs"] == 2
    assert "response_format" not in chat_of(text={"format": {"type": "text"}})


@pytest.mark.parametrize(
    "given, param",
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[0].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "store"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
    ],
)
def test_what_cannot_be_asked_is_named(given, param):
    with pytest.raises(BadRequest) as caught:
        chat_of(**given)
    assert caught.value.param == param


# -- answers


def told(pieces, reason="stop", **given):
    events = ResponseEvents(new_response(ask(**given), 1000.0), clock=lambda: 1001.0)
    out = events.start()
    for piece in pieces:
        out += events.add([piece])
    return events, [*out, *events.finish(reason, 10, 4, 7, 2)]


@given(PIECES)
def test_a_response_is_what_its_events_come_to(drawn):
    pieces = unrolled(drawn)
    events, out = told(pieces)
    expected = Whole()
    expected.add(pieces)
    response = out[-1]["response"]
    assert response == events.response and out[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in out] == list(range(len(out)))
    # The SDK understands every event and the response.
    for event in out:
        assert EVENT.validate_python(event).type == event["type"]
    parsed = Response.model_validate(response)
    assert parsed.output_text == expected.content
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        (one.name, one.arguments) for one in expected.calls
    ]
    thoughts = [item for item in response["output"] if item["type"] == "reasoning"]
    assert "".join(item["content"][0]["text"] for item in thoughts) == expected.reasoning
    # Deltas of an item, joined, are what its last event says; its place is its place in the output.
    items = [event["item"] for event in out if event["type"] == "response.output_item.done"]
    assert items == response["output"]
    for place, item in enumerate(items):
        deltas = "".join(e["delta"] for e in out if e["type"].endswith(".delta") and e["item_id"] == item["id"])
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {e["output_index"] for e in out if e.get("item_id") == item["id"]} <= {place}
    usage = response["usage"]
    assert usage["total_tokens"] == 17 and usage["input_tokens_details"]["cached_tokens"] == 4
    assert usage["output_tokens_details"]["reasoning_tokens"] == 2


def test_an_answer_that_was_cut_is_incomplete():
    _, out = told([Content("a")], "length")
    response = out[-1]["response"]
    assert out[-1]["type"] == "response.incomplete" and response["incomplete_details"] == {
        "reason": "max_output_tokens"
    }
    assert response["output"][0]["status"] == "incomplete"


def test_an_answer_that_failed_keeps_what_was_said():
    events = ResponseEvents(new_response(ask(), 0.0))
    events.start()
    events.add([Content("half")])
    out = events.fail("the engine was lost")
    response = out[-1]["response"]
    assert out[-1]["type"] == "response.failed" and response["error"]["code"] == "server_error"
    assert Response.model_validate(response).output_text == "half" and events.ended


def test_logprobs_lie_beside_the_text_of_their_tokens():
    events = ResponseEvents(new_response(ask(), 0.0))
    out = events.start()
    entry = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    out += events.add([Content("a")], [entry])
    out += events.add([Content("b")], [{**entry, "token": "b"}])
    out += events.finish("stop", 1, 0, 2)
    deltas = [event for event in out if event["type"] == "response.output_text.delta"]
    assert [event["logprobs"][0]["token"] for event in deltas] == ["a", "b"]
    parsed = Response.model_validate(out[-1]["response"])
    assert [one.token for one in parsed.output[0].content[0].logprobs] == ["a", "b"]


def test_background_begins_queued():
    events = ResponseEvents(new_response(ask(background=True), 0.0))
    kinds = [event["type"] for event in events.start()]
    assert kinds == ["response.created", "response.queued", "response.in_progress"]


# -- kept


def test_responses_are_kept_within_limits_the_least_used_go_first(tmp_path):
    ticks = itertools.count()

    async def work():
        store = Store(tmp_path, kept.SCHEMA)
        limits = KeptLimits(owner_count=3, owner_bytes=4000, count=4, bytes=1 << 20)
        all_kept = Responses(store, limits, clock=lambda: float(next(ticks)))
        made = [new_response(ask(), 0.0) for _ in range(6)]
        for response in made[:3]:
            await all_kept.put("a", response, [{"id": "i", "type": "message"}])
        assert (await all_kept.get("a", made[0]["id"]))[0] == made[0]
        assert await all_kept.get("b", made[0]["id"]) is None and not await all_kept.delete("b", made[0]["id"])
        await all_kept.put("a", made[3], [])
        # The second was used longest ago.
        found = [await all_kept.get("a", response["id"]) is not None for response in made[:4]]
        assert found == [True, False, True, True]
        await all_kept.put("b", made[4], [])
        await all_kept.put("b", made[5], [])
        found = [await all_kept.get("a", response["id"]) is not None for response in made[:4]]
        assert sum(found) == 2 and await all_kept.get("b", made[4]["id"]) is not None
        await all_kept.put("a", {**made[0], "metadata": {"k": "v" * 3500}}, [])
        assert await all_kept.get("a", made[2]["id"]) is None
        assert await all_kept.delete("b", made[5]["id"]) and await all_kept.get("b", made[5]["id"]) is None
        store.close()

    asyncio.run(work())


def test_what_was_under_way_when_a_server_died_has_failed(tmp_path):
    async def work():
        store = Store(tmp_path, kept.SCHEMA)
        response = new_response(ask(background=True), 0.0)
        await Responses(store).put("a", response, [])
        store.close()
        store = Store(tmp_path, kept.SCHEMA)
        again = Responses(store)
        await again.start()
        found, _ = await again.get("a", response["id"])
        assert found["status"] == "failed" and "restarted" in found["error"]["message"]
        store.close()

    asyncio.run(work())
