"""Grammars of calls: what a grammar lets through its format's reader takes without loss, whatever the model wanted."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core import registry
from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.text.grammar.build import build, make_tokenizer
from millstream.text.grammar.wire import Ask
from millstream.text.grammar.worker import judge
from millstream.text.tokenizer import Facts, Special
from millstream.text.tools.plan import closed, dialect_of, prepared, reader_of, schemas_of, shape_of
from millstream.text.tools.prompt import in_words
from millstream.text.tools.protocol import Tool, Toolbox, Whole
from millstream.text.vocabulary import Vocabulary

pytest.importorskip("llguidance")

MARKS = ["<eos>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"]
SPECIALS = {mark: Special(256 + i) for i, mark in enumerate(MARKS)}
VOCABULARY = Vocabulary.from_bytes([*(bytes([i]) for i in range(256)), *(m.encode() for m in MARKS)], range(256, 264))
EOS = 256
ENDS = frozenset(b'"}],:') | {EOS}
WORDS = frozenset(b"abc019.-\\nu<[{ ") | set(range(257, 264))
LLTOKENIZER = make_tokenizer(VOCABULARY, 264, {EOS})
PLAIN_BYTES = make_tokenizer(Vocabulary.from_bytes([bytes([i]) for i in range(256)] + [b"<eos>"], (256,)), 257, {EOS})

TOOLS = (
    Tool(
        "get_weather",
        "The weather of a city",
        {"properties": {"city": {"enum": ["Paris", "Bonn"]}, "days": {"type": "integer"}}, "required": ["city"]},
    ),
    Tool("math.add-2", parameters={"$defs": {"n": {"type": "number"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}),
    Tool("now"),
)


class FakeTokenizer:
    """What plans ask of a tokenizer."""

    def __init__(self, template: str, specials: dict[str, Special]) -> None:
        self.chat_template = template
        self.facts = Facts(264, "byte-level", specials)


TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>",
    "llama": "{{ tools }}<|python_tag|>",
    "mistral": "{{ tools }}[TOOL_CALLS]",
    "mistral-args": "{{ tools }}[TOOL_CALLS][ARGS]",
    "plain": "{{ messages }}",
    "thinking": "{{ tools }}<tool_call><think></think>",
}


def made(template: str, toolbox: Toolbox, tokens: bool, structured: Structured | None = None, opened: bool = False):
    """The dialect, the matcher at its start and a reader."""
    tokenizer = FakeTokenizer(TEMPLATES[template], SPECIALS if tokens else {})
    dialect = dialect_of(tokenizer)
    schemas = [schema for _, schema in schemas_of(toolbox)]
    shape = shape_of(dialect, tokenizer, toolbox, schemas, structured, opened)
    assert shape is not None
    matcher = build(LLTOKENIZER if tokens else PLAIN_BYTES, shape)
    return dialect, matcher, reader_of(dialect, toolbox, opened, True)


def wander(matcher, rng: random.Random, limit: int = 700) -> str | None:
    """A text that the grammar lets through, one random byte after the other; None where it had no end in time.

    What ends something is preferred, or strings would go on for ever.
    """
    out = bytearray()
    for _ in range(limit):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        ends = [token for token in allowed.tolist() if token in ENDS]
        words = [token for token in allowed.tolist() if token in WORDS]
        token = rng.choice(ends if ends and rng.random() < 0.5 else words or allowed.tolist())
        if token == EOS:
            return out.decode(errors="replace")
        assert matcher.consume_token(token), matcher.get_error()
        out += VOCABULARY.token_bytes(token)
        if matcher.is_stopped():
            return out.decode(errors="replace")
    return None


def whole(reader, text: str) -> Whole:
    found = Whole()
    for char in text:
        found.add(reader.push(char))
    found.add(reader.finish())
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokens", [True, False])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), many=st.booleans(), only=st.booleans())
def test_a_call_that_must_be_is_always_there_and_always_valid(template, tokens, seed, many, only):
    toolbox = Toolbox(TOOLS, "required", "get_weather" if only else None, many)
    _, matcher, reader = made(template, toolbox, tokens)
    text = wander(matcher, random.Random(seed))
    if text is None:
        return
    found = whole(reader, text)
    assert found.calls and not found.content and all(call.valid for call in found.calls)
    assert many or len(found.calls) == 1
    for call in found.calls:
        assert not only or call.name == "get_weather"
        if call.name == "get_weather":
            given_ = json.loads(call.arguments)
            assert given_["city"] in ("Paris", "Bonn") and isinstance(given_.get("days", 1), int)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokens", [True, False])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), many=st.booleans(), begin=st.integers(0, 2))
def test_a_call_that_may_be_is_valid_when_it_comes(template, tokens, seed, many, begin):
    toolbox = Toolbox(TOOLS, many=many)
    dialect, matcher, reader = made(template, toolbox, tokens)
    key = "parameters" if dialect.name == "llama" else "arguments"
    opening = f'{{"name": "get_weather", "{key}": {{"ci'
    starts = {
        "hermes": ["Well ", "<tool_call>", "Hm. <tool_call>\n" + opening],
        "llama": ["Well ", opening, "<|python_tag|>" + opening],
        "mistral": [
            "Well ",
            "[TOOL_CALLS]",
            "So [TOOL_CALLS]" + ("now[ARGS]" if "args" in template else " [" + opening),
        ],
        "plain": ["Well ", opening, "[" + opening],
    }[dialect.name]
    if template == "plain" and not many:
        starts[2] = opening
    prefix = starts[begin]
    for part in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", prefix) if tokens else [prefix]:
        ids = [SPECIALS[part].id] if tokens and part in SPECIALS else list(part.encode())
        for token in ids:
            assert matcher.consume_token(token), matcher.get_error()
    rest = wander(matcher, random.Random(seed))
    if rest is None:
        return
    found = whole(reader, prefix + rest)
    assert all(call.valid for call in found.calls) and (many or len(found.calls) <= 1)
    assert begin == 0 or found.calls, "what began a call became one"


def test_content_beside_tools_is_held_to_what_was_asked():
    structured = Structured.json({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})
    for template in TEMPLATES:
        for seed in range(6):
            _, matcher, reader = made(template, Toolbox(TOOLS), True, structured)
            text = wander(matcher, random.Random(seed))
            if text is not None:
                found = whole(reader, text)
                assert found.calls or isinstance(json.loads(found.content)["x"], int)
    with pytest.raises(BadRequest, match="beside tools"):
        made("hermes", Toolbox(TOOLS), True, Structured.grammar('start: "x"'))


@pytest.mark.parametrize("tokens", [True, False])
def test_thinking_comes_before_what_is_enforced(tokens):
    for opened in (False, True):
        _, matcher, reader = made("thinking", Toolbox(TOOLS, "required"), tokens, opened=opened)
        thought = ("" if opened else "<think>") + 'I may say {"a"} and <b></think>\n\n'
        for part in re.split("(<think>|</think>)", thought):
            for token in [SPECIALS[part].id] if tokens and part in SPECIALS else list(part.encode()):
                assert matcher.consume_token(token), matcher.get_error()
        assert not matcher.is_accepting()
        rest = wander(matcher, random.Random(1), 3000)
        assert rest is not None
        found = whole(reader, thought + rest)
        assert found.reasoning == 'I may say {"a"} and <b>' and found.calls and not found.content


def test_nothing_is_enforced_where_nothing_is_asked():
    tokenizer = FakeTokenizer(TEMPLATES["hermes"], {})
    dialect = dialect_of(tokenizer)
    assert shape_of(dialect, tokenizer, None, [], None, False) is None
    assert shape_of(dialect, tokenizer, Toolbox(TOOLS, "none"), [], None, False) is None
    schemas = [schema for _, schema in schemas_of(Toolbox(TOOLS))]
    assert shape_of(dialect, tokenizer, Toolbox(TOOLS), schemas, None, False, guided=False) is None
    assert shape_of(dialect, tokenizer, Toolbox(TOOLS, "required"), schemas, None, False, guided=False) is not None


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}},
        {"properties": {"a": {"type": "strin"}}},
        {"properties": {"a": {"type": "string", "pattern": "("}}},
        {"properties": {"a": {"enum": list(range(20_000))}}},
        {"type": "object", "properties": 5},
    ],
)
def test_a_schema_that_says_nothing_sound_is_refused_in_a_tool_too(parameters):
    [(param, schema)] = schemas_of(Toolbox((Tool("f", parameters=parameters),)))
    assert param == "tools[0].function.parameters"
    assert not judge(PLAIN_BYTES, Ask(schema.kind, schema.text, schema.strict)).taken


def test_patterns_that_no_automaton_keeps_are_passed_over_without_strict():
    schema = {"properties": {"pattern": {"type": "string", "pattern": "^(?!a).*$"}}, "required": ["pattern"]}
    verdict = judge(PLAIN_BYTES, Ask("json_schema", json.dumps(schema), False))
    assert verdict.taken and "pattern" in verdict.warnings[0] and "(?!" not in verdict.text
    assert json.loads(verdict.text)["required"] == ["pattern"]
    assert not judge(PLAIN_BYTES, Ask("json_schema", json.dumps(schema), True)).taken


def test_arguments_that_a_schema_does_not_name_are_not_made_up():
    inner = {"properties": {"x": {}}}
    schema = {"properties": {"a": inner, "properties": {"enum": [{"properties": {}}]}, "b": {"items": inner}}}
    shut = closed(schema)
    assert shut["additionalProperties"] is False and shut["properties"]["b"]["items"]["additionalProperties"] is False
    assert shut["properties"]["properties"] == schema["properties"]["properties"]
    for open_ in (
        {"type": "object"},
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "anyOf": [{}]},
    ):
        assert closed(open_) == open_
    assert closed({"$defs": {"n": inner}, "$ref": "#/$defs/n"})["$defs"]["n"]["additionalProperties"] is False


# -- which format, and the prompt


def test_the_format_is_found_by_the_template_or_named():
    for template, source in TEMPLATES.items():
        dialect = dialect_of(FakeTokenizer(source, SPECIALS))
        assert dialect.name == {"mistral-args": "mistral", "thinking": "hermes"}.get(template, template)
        assert dialect.native is (template != "plain") and (dialect.tags is not None) is (template == "thinking")
    named = dialect_of(FakeTokenizer(TEMPLATES["plain"], SPECIALS), calls="mistral", thinking="think")
    assert named.name == "mistral" and not named.native and named.tags is not None
    assert dialect_of(FakeTokenizer(TEMPLATES["thinking"], {}), thinking="none").tags is None
    with pytest.raises(BadRequest, match="reasoning_parser"):
        dialect_of(FakeTokenizer("", {}), thinking="loud")
    for name in registry.names("tools"):
        assert registry.card("tools", name).name == name


def test_control_tokens_of_calls_and_thinking_are_to_be_shown():
    tokenizer = FakeTokenizer(TEMPLATES["thinking"], SPECIALS)
    assert dialect_of(tokenizer).marks(tokenizer) == {SPECIALS[m].id for m in MARKS if "tool_call" in m or "think" in m}


def test_a_template_that_knows_tools_gets_them_and_ids_that_it_takes():
    call = {"id": "call_" + "0" * 32, "type": "function", "function": {"name": "now", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "noon"},
    ]
    dialect = dialect_of(FakeTokenizer(TEMPLATES["mistral"], SPECIALS))
    messages, tools = prepared(dialect, chat, Toolbox(TOOLS))
    assert [tool["function"]["name"] for tool in tools] == [tool.name for tool in TOOLS]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] and len(messages[2]["tool_call_id"]) == 9
    assert prepared(dialect, chat, Toolbox(TOOLS, "none"))[1] is None and prepared(dialect, chat, None)[1] is None


def test_a_template_that_knows_none_gets_them_in_words():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]  # fmt: skip
    told = in_words(chat, Toolbox(TOOLS))
    assert told[0]["content"].startswith("Be brief.\n\n") and '"get_weather"' in told[0]["content"]
    assert (
        json.loads(told[2]["content"]) == {"name": "now", "arguments": {"zone": "UTC"}} and "tool_calls" not in told[2]
    )
    assert told[3] == {"role": "user", "content": "Result of now:\nnoon"}
    alone = in_words([{"role": "user", "content": "x"}], Toolbox(TOOLS, "required", "now", many=False))
    assert (
        alone[0]["role"] == "system" and "list" not in alone[0]["content"] and "get_weather" not in alone[0]["content"]
    )
    assert in_words([{"role": "user", "content": "x"}], None) == [{"role": "user", "content": "x"}]
    parts = in_words([{"role": "system", "content": [{"type": "text", "text": "a"}]}], Toolbox(TOOLS))
    assert len(parts[0]["content"]) == 2
    for odd in (
        "x",
        {"role": "assistant", "tool_calls": [5]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "tool"},
    ):
        assert in_words([odd], None) == [odd]
