"""A chat's tools, format and thinking as one plan; deltas that come to the message; what is refused by its field."""

from __future__ import annotations

import asyncio
import json

import pytest

from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.serve.tools import Parsers, Turn, check_calls, plan_chat
from millstream.text.chat import ChatTemplate
from millstream.text.grammar.compiler import GrammarCompiler
from millstream.text.reasoning import KNOWN, Thinking
from millstream.text.tokenizer import Facts, Special
from millstream.text.tokenizer import Tokenizer as RealTokenizer
from millstream.text.tools.output import OutputReader
from millstream.text.tools.plan import dialect_of, reader_of
from millstream.text.tools.protocol import CallStart, Tool, Toolbox

pytest.importorskip("llguidance")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" + CHATML + "{# <tool_call> #}"
THINKS = HERMES + "{# </think> #}{% if add_generation_prompt and open %}<think>\n{% endif %}"
SPECIALS = {
    "<|im_start|>": Special(256),
    "<|im_end|>": Special(257),
    "<tool_call>": Special(258),
    "<think>": Special(259),
}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "Weather in Paris?"}]


class Bytes:
    """A library tokenizer whose tokens are bytes."""

    def encode(self, text: str, add_special_tokens: bool = False):
        class Encoding:
            ids = list(text.encode())

        return Encoding()

    def id_to_token(self, token: int) -> str | None:
        from millstream.text.tokenizer import byte_alphabet

        return next((char for char, byte in byte_alphabet().items() if byte == token), None)

    def token_to_id(self, text: str) -> int | None:
        return None

    def get_added_tokens_decoder(self) -> dict:
        return {}


def tokenizer(template: str) -> RealTokenizer:
    facts = Facts(
        260, "byte-level", SPECIALS, eos_id=257, stop_ids=frozenset({257}), chat_templates={"default": template}
    )
    return RealTokenizer(Bytes(), facts)


@pytest.fixture(scope="module")
def compiler():
    made = GrammarCompiler(tokenizer(CHATML).vocabulary, 260, {257})
    yield made
    made.close()


def planned(compiler, own: str = CHATML, messages=ASK, **given):
    return asyncio.run(plan_chat(tokenizer(own), compiler, messages, **given))


def text_of(plan, template: str = CHATML) -> str:
    return tokenizer(template).decode(plan.ids, False)


def test_a_plain_chat_is_plain(compiler):
    plan = planned(compiler)
    assert (
        plan.plain and plan.structured is None and not plan.shown and text_of(plan).endswith("<|im_start|>assistant\n")
    )
    assert planned(compiler, tools=[TOOL], tool_choice="none").plain


def test_tools_go_to_the_template_that_knows_them_and_into_words_for_the_one_that_does_not(compiler):
    native, words = planned(compiler, HERMES, tools=[TOOL]), planned(compiler, CHATML, tools=[TOOL])
    assert text_of(native, HERMES).startswith("<tools>[") and "You can call functions" not in text_of(native, HERMES)
    assert "You can call functions" in text_of(words) and '"get_weather"' in text_of(words)
    assert native.dialect.name == "hermes" and words.dialect.name == "plain" and native.certain and words.certain
    assert native.shown == {258} and not native.plain and native.structured.kind == "grammar"
    assert "get_weather" not in text_of(planned(compiler, CHATML, tools=[TOOL], tool_choice="none"))
    free = planned(compiler, HERMES, tools=[TOOL], parsers=Parsers(guided=False))
    assert free.structured is None and not free.certain
    must = planned(compiler, HERMES, tools=[TOOL], tool_choice="required", parsers=Parsers(guided=False))
    assert must.structured is not None and must.certain


def test_a_response_format_is_checked_and_may_follow_thinking(compiler):
    asked = (Structured.json({"type": "integer"}), "response_format.json_schema.schema")
    assert planned(compiler, structured=asked).structured == asked[0]
    assert planned(compiler, THINKS, structured=asked).structured.lead
    opened = planned(compiler, THINKS, structured=asked, template_kwargs={"open": True})
    assert opened.opened and opened.structured.lead != planned(compiler, THINKS, structured=asked).structured.lead
    assert not planned(compiler, THINKS, structured=asked, parsers=Parsers(reasoning="none")).structured.lead
    both = planned(compiler, HERMES, structured=asked, tools=[TOOL])
    assert both.structured.kind == "grammar" and "content" in both.structured.text
    loose = planned(compiler, structured=(Structured.json({"not": {}, "type": "integer"}, strict=False), "guided_json"))
    assert any("guided_json" in warning and "not" in warning for warning in loose.warnings)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, r"tools\[0\].type"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].name"),
        ({"tools": [{"type": "function", "function": 5}]}, r"tools\[0\].function"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name"),
        ({"tools": [{"type": "function", "function": {"name": 'a"\n'}}]}, r"tools\[0\].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 10_240}}]}, r"tools\[0\].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, r"tools\[0\].function.desc"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, r"tools\[0\].function.param"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, r"tools\[0\].function.strict"),
        ({"tools": [TOOL, TOOL]}, r"tools\[1\].function.name"),
        ({"tools": [TOOL] * 5000}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]},
         r"tools\[0\].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
         r"tools\[0\].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://127.0.0.1:9/"}}}]},
         r"tools\[0\].function.parameters"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"structured": (Structured.regex("("), "guided_regex")}, "guided_regex"),
        ({"structured": (Structured.grammar('start: "a"'), "guided_grammar"), "tools": [TOOL]}, "grammar"),
        ({"parsers": Parsers(reasoning="loud")}, "reasoning_parser"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(compiler, given, param):
    with pytest.raises(BadRequest, match=param):
        planned(compiler, **given)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, r"messages\[1\].tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, r"messages\[1\].tool_call_id"),
        ({"role": "assistant", "tool_calls": [5]}, r"messages\[1\].tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, r"messages\[1\].tool_calls\[0\].id"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, r"messages\[1\].tool_calls\[0\].function"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": 5}}]},
         r"messages\[1\].tool_calls\[0\].function.arguments"),
    ],
)  # fmt: skip
def test_calls_in_a_chat_are_whole(compiler, message, param):
    with pytest.raises(BadRequest, match=param):
        planned(compiler, messages=[*ASK, message])
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(BadRequest, match="before it"):
        check_calls([{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "b", "content": ""}])
    planned(compiler, messages=[*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
                                {"role": "tool", "tool_call_id": "a", "content": "x"}])  # fmt: skip


# -- turns

TEXT = '<think>hm\n</think>\n\nOne moment.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def turn(certain: bool = True) -> Turn:
    box = Toolbox((Tool("f"),))
    dialect = dialect_of(tokenizer(THINKS))
    return Turn(reader_of(dialect, box, False, certain))


def fold(deltas: list[dict]) -> dict:
    """As clients of the SDK do it."""
    message: dict = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}})
            for name, value in call["function"].items():
                calls[call["index"]]["function"][name] += value
    return message


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("certain", [True, False])
def test_deltas_come_to_the_message(size, certain):
    made, deltas = turn(certain), []
    for at in range(0, len(TEXT), size):
        deltas += made.deltas(made.push(TEXT[at : at + size], 1))
    deltas += made.deltas(made.finish())
    whole = made.whole()
    assert fold(deltas) == {name: whole[name] for name in ("content", "reasoning_content", "tool_calls")}
    assert (whole["content"], whole["reasoning_content"]) == ("One moment.", "hm")
    [call] = whole["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'} and len(call["id"]) == 37
    assert made.finish_reason("stop") == "tool_calls" and made.finish_reason("length") == "length"
    if certain and size == 1:
        assert sum("tool_calls" in delta for delta in deltas) == 1 + len('{"a": 1}')


def test_tokens_of_thinking_are_counted():
    made = turn()
    for token in ("<think>", "a", " b", "\n", "</think>", "\n\n", "Yes", "."):
        made.push(token, 1)
    made.finish()
    assert made.reasoning_tokens == 5 and made.whole()["content"] == "Yes."
    assert Turn(OutputReader(Thinking(KNOWN["think"]))).whole()["content"] == ""


def test_a_message_without_calls_has_text_and_its_own_reason():
    made = Turn(OutputReader())
    made.push("Hello", 1)
    assert made.whole() == {"role": "assistant", "content": "Hello", "refusal": None}
    assert made.finish_reason("stop") == "stop" and not any(isinstance(p, CallStart) for p in made.finish())


def test_a_template_of_the_request_says_what_it_knows(compiler):
    own = planned(compiler, CHATML, tools=[TOOL], template=ChatTemplate(HERMES))
    assert (
        own.dialect.name == "hermes"
        and own.dialect.native
        and json.loads(text_of(own)[7 : text_of(own).index("</tools>")])
    )
