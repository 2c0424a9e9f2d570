"""Anthropic's Messages API: what a request means as a chat, and what a stream of events comes to."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.core.errors import BadRequest
from millstream.serve.anthropic.events import MessageEvents, WholeMessage, error_kind
from millstream.serve.anthropic.shapes import Ask, Counted, to_chat
from millstream.text.tools.protocol import CallStart, CallText, Content, Reasoning, Whole

PIECES = st.lists(
    st.one_of(
        st.builds(Content, st.text(max_size=5)),
        st.builds(Reasoning, st.text(min_size=1, max_size=5)),
        st.tuples(st.sampled_from(["f", "g"]), st.lists(st.sampled_from(['{"a"', ": 1", "}"]), max_size=4)),
    ),
    max_size=8,
)


def unrolled(drawn):
    """Calls get their indexes, and their text right behind them."""
    pieces, calls = [], 0
    for one in drawn:
        if isinstance(one, tuple):
            pieces += [CallStart(calls, one[0]), *(CallText(calls, text) for text in one[1])]
            calls += 1
        else:
            pieces.append(one)
    return pieces


def ask(**given) -> Ask:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **given}
    return msgspec.json.decode(json.dumps(body), type=Ask)


def test_a_plain_request_is_a_chat():
    chat = to_chat(ask(system="be kind", temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x"], seed=4))
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["x"],
        "seed": 4,
    }


def test_blocks_calls_results_and_thinking_become_messages():
    chat = to_chat(
        ask(
            system=[
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "let me see"},
                        {"type": "tool_use", "id": "t1", "name": "get", "input": {"city": "Bern"}},
                        {"type": "tool_use", "id": "t2", "name": "get", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                        {"type": "tool_result", "tool_use_id": "t2", "content": "none", "is_error": True},
                        {"type": "text", "text": "so?"},
                        {"type": "document", "title": "T", "source": {"type": "text", "data": "words"}},
                    ],
                },
            ],
        )
    )
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Bern"}'}},
        {"id": "t2", "type": "function", "function": {"name": "get", "arguments": "{}"}},
    ]
    assert chat["messages"] == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "let me see", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: none"},
        {"role": "user", "content": "so?\nT\nwords"},
    ]


def test_the_last_turn_of_the_assistant_is_gone_on_with():
    chat = to_chat(ask(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]))
    assert chat["continue_final_message"] is True and chat["add_generation_prompt"] is False


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)
def test_tools_and_the_choice_among_them(choice, expected):
    tools = [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": None}]
    chat = to_chat(ask(tools=tools, tool_choice=choice))
    function = {"name": "f", "parameters": {"type": "object"}, "description": "d"}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert {name: chat.get(name) for name in expected} == expected


def test_output_formats_and_thinking_are_passed_on():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    chat = to_chat(ask(output_config={"format": form}, thinking={"type": "disabled"}))
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "given, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"x": 1}]}]}
                ]
            },
            "messages[0].content[0].content",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_what_cannot_be_asked_is_named(given, param):
    with pytest.raises(BadRequest) as caught:
        to_chat(ask(**given))
    assert caught.value.param == param


def test_counting_takes_the_same_prompt():
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "system": "s"}
    assert to_chat(msgspec.convert(body, Counted))["messages"] == to_chat(ask(system="s"))["messages"]


# -- answers


@given(PIECES)
def test_a_message_is_what_its_events_come_to(drawn):
    pieces = unrolled(drawn)
    events, whole = MessageEvents("m"), WholeMessage()
    told = [*events.start(10, 4)]
    for piece in pieces:
        told += events.add([piece])
    told += events.finish("stop", None, 10, 4, 7)
    whole.add(told)
    expected = Whole()
    expected.add(pieces)
    message = whole.message
    blocks = message["content"]
    assert "".join(block["text"] for block in blocks if block["type"] == "text") == expected.content
    assert "".join(block["thinking"] for block in blocks if block["type"] == "thinking") == expected.reasoning
    calls = [block for block in blocks if block["type"] == "tool_use"]
    assert [call["name"] for call in calls] == [call.name for call in expected.calls]
    for call, other in zip(calls, expected.calls, strict=True):
        given = json.loads(other.arguments) if other.valid else {} if not other.arguments else None
        assert call["input"] == (given if given is not None else {"partial_json": other.arguments})
    assert message["stop_reason"] == ("tool_use" if calls else "end_turn")
    assert message["usage"]["input_tokens"] == 6 and message["usage"]["cache_read_input_tokens"] == 4
    assert message["usage"]["output_tokens"] == 7 and message["id"] == events.id
    # Blocks never overlap, and their numbers go up by one.
    open_block, last = None, -1
    for event in told:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == last + 1
            open_block = last = event["index"]
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
    assert open_block is None
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]


@pytest.mark.parametrize(
    "reason, stop, expected",
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("timeout", None, ("timeout", None)),
    ],
)
def test_the_reason_of_an_end_is_told(reason, stop, expected):
    events, whole = MessageEvents("m"), WholeMessage()
    whole.add([*events.start(1, 0), *events.add([Content("a")]), *events.finish(reason, stop, 1, 0, 1)])
    assert (whole.message["stop_reason"], whole.message["stop_sequence"]) == expected


def test_errors_have_the_names_that_the_sdk_knows():
    assert [error_kind(status) for status in (400, 401, 404, 413, 418, 429, 500, 503)] == [
        "invalid_request_error",
        "authentication_error",
        "not_found_error",
        "request_too_large",
        "invalid_request_error",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
    ]
