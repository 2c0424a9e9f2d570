"""Chat templates: as transformers renders them, safe from the template and safe from the user."""

from __future__ import annotations

import gc
import time
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, CORPUS, SPELLED, metadata_of, small_bpe, small_tokenizer, tokenizer_of
from millstream.core.errors import BadRequest
from millstream.text.chat import ChatTemplate, Limits, encode_chat, template_of

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = "
    "messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in "
    "loop_messages %}{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}{{- '[INST] ' + "
    "system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{% generation %}{{- ' ' + message['content'] + eos_token }}"
    "{% endgeneration %}{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}"
    "{%- if loop.index > 99 %}{% break %}{% endif %}{%- endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What is 2+2? \n"}],
    [
        {"role": "user", "content": "Grüß dich 👋 {{ x }} {% raw %}"},
        {"role": "assistant", "content": "Hallo!"},
        {"role": "user", "content": "<b>\"quotes\" & 'more'</b>"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Ort> & 'Zeit'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def reference(source: str, messages: Any, **kwargs: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=source, bos_token="<s>", eos_token="</s>", **kwargs
    )
    return str(rendered[0])


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL], ids=["chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_does(source: str, chat: list[dict[str, Any]], prompt: bool) -> None:
    ours = ChatTemplate(source, "<s>", "</s>").render(chat, add_generation_prompt=prompt)
    assert ours == reference(source, chat, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", ["smollm2-135m", pytest.param("qwen2.5-coder-1.5b", marks=pytest.mark.large)])
def test_real_templates_render_as_transformers_does(name: str) -> None:
    source = metadata_of(name)["tokenizer.chat_template"]
    tokenizer = tokenizer_of(name)
    template = template_of(tokenizer)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}]
    parsed = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
    tail = [{"role": "tool", "content": "12°"}, {"role": "assistant", "content": "Cold."}]
    for chat in CHATS:
        assert template.render(chat) == reference(source, chat, add_generation_prompt=True)
        ids = encode_chat(tokenizer, template, chat)
        assert ids == tokenizer.encode(template.render(chat), add_bos=False, parse_special=True)
    if name.startswith("qwen"):
        ours = template.render(
            [*CHATS[0], {"role": "assistant", "content": "", "tool_calls": calls}, *tail], tools=TOOLS
        )
        theirs = [*CHATS[0], {"role": "assistant", "content": "", "tool_calls": parsed}, *tail]
        assert ours == reference(source, theirs, tools=TOOLS, add_generation_prompt=True)


def test_the_final_message_can_be_continued() -> None:
    chat = [*CHATS[0], {"role": "assistant", "content": "Sure, "}]
    for source in (CHATML, LLAMA3, MISTRAL):
        text = ChatTemplate(source).render(chat, continue_final_message=True)
        assert text.endswith("Sure, ")
    parts = [*CHATS[0], {"role": "assistant", "content": [{"type": "text", "text": "Su"}]}]
    assert ChatTemplate(GEMMA).render(parts, continue_final_message=True).endswith("model\nSu")
    with pytest.raises(BadRequest, match="continue_final_message"):
        ChatTemplate("nothing").render(chat, continue_final_message=True)
    with pytest.raises(BadRequest, match="continue_final_message"):
        ChatTemplate(CHATML).render(CHATS[0], continue_final_message=True)


def test_text_parts_are_joined_unless_the_template_takes_them() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in ChatTemplate(CHATML).render(chat)
    assert "user\nab<end_of_turn>" in ChatTemplate(GEMMA).render(chat)


# ------------------------------------------------------------------------------------------------- forged turns

PIECES = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|", ">", "\n", " ", "a", "system", "<|endoftext|>", "é"]
USER = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=20)


CHATML_TEMPLATE = ChatTemplate(CHATML)
HALVES = [
    ChatTemplate("<|{{ messages[0].content }}|>"),
    ChatTemplate("<|im_{{ messages[0].content | trim }}"),
    ChatTemplate("{{ messages[0].content }}end|>"),
    ChatTemplate("<{{ messages[0]['content'] | trim }}>"),
]
AS_JSON = [
    ChatTemplate("{{ messages | tojson }}"),
    ChatTemplate("{{ messages | tojson(ensure_ascii=true) }}<|im_end|>"),
]


def control(ids: list[int]) -> list[int]:
    special = small_tokenizer("bpe").special_ids
    return [i for i in ids if i in special]


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(USER, min_size=1, max_size=4))
def test_users_cannot_write_control_tokens(texts: list[str]) -> None:
    tokenizer = small_tokenizer("bpe")
    template = CHATML_TEMPLATE
    chat = [{"role": "user", "content": text} for text in texts]
    harmless = [{"role": "user", "content": "x"} for _ in texts]
    ids = encode_chat(tokenizer, template, chat)
    assert control(ids) == control(encode_chat(tokenizer, template, harmless))
    assert tokenizer.decode(ids, skip_special=False) == template.render(chat)


@settings(max_examples=150, deadline=None)
@given(text=USER)
def test_users_cannot_complete_what_a_template_begins(text: str) -> None:
    tokenizer = small_tokenizer("bpe")
    for template in HALVES:
        chat = [{"role": "user", "content": text}]
        ids = encode_chat(tokenizer, template, chat)
        assert control(ids) == []
        assert tokenizer.decode(ids, skip_special=False) == template.render(chat)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="\ufdd0\ufdd1\ufdd2a\\u", max_size=12))
def test_harmless_texts_give_the_ids_of_the_rendered_text(text: str) -> None:
    tokenizer = small_tokenizer("bpe")
    for template in (CHATML_TEMPLATE, *AS_JSON):
        chat = [{"role": "user", "content": text}]
        rendered = template.render(chat)
        assert encode_chat(tokenizer, template, chat) == tokenizer.encode(rendered, parse_special=True, add_bos=False)


def test_tools_and_tool_calls_cannot_write_control_tokens() -> None:
    tokenizer = small_tokenizer("bpe")
    template = ChatTemplate("{{ tools | tojson }}{{ messages | tojson(ensure_ascii=true) }}<|im_end|>")
    evil = "<|im_end|>"
    chat = [
        {"role": "assistant", "content": None, "name": evil, "tool_calls": [{"name": evil, "arguments": {evil: evil}}]}
    ]
    tools = [{"type": evil, "function": {"name": evil, "parameters": {evil: [evil]}}}]
    ids = encode_chat(tokenizer, template, chat, tools=tools)
    assert control(ids) == [tokenizer.id_of("<|im_end|>")]
    assert tokenizer.decode(ids, skip_special=False) == template.render(chat, tools=tools)


def test_spelled_tokens_survive_as_text_in_real_models() -> None:
    tokenizer = tokenizer_of("smollm2-135m")
    template = template_of(tokenizer)
    for text in [*SPELLED, *CORPUS[:5]]:
        ids = encode_chat(tokenizer, template, [{"role": "user", "content": text}])
        assert len([i for i in ids if i in tokenizer.special_ids]) == 5
        assert text in tokenizer.decode(ids, skip_special=False)


# ------------------------------------------------------------------------------------------------- hostile templates

HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "multiply": "{{ 'a' * 10**10 }}",
    "multiply list": "{{ [1] * 10**10 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set ns = namespace(s='aaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling sum": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "capture": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% endfor %}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join(range(999) | map('string') | list) }}",
    "power": "{{ 10 ** 10 ** 10 * 0 ** (-1) }}{{ 7 ** 10000000 }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "append": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "nesting": "{{ " + "(" * 20000 + ")" * 20000 + " }}",
    "syntax": "{% if %}",
    "undefined": "{{ x.y.z }}",
    "surrogate": "{{ '\\ud800' }}",
    "indent": "{{ messages | tojson(indent=100000) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_at_once(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    gc.collect()  # what other tests left behind is not this template's time
    began = time.process_time()
    with pytest.raises(BadRequest, match="chat_template"):
        template.render(CHATS[0])
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n-1) if n else '' }}{{ f(n-1) if n else '' }}{% endmacro %}{{ f(50) }}",
        "{% set x = range(100000) | list %}{% for i in x %}{% if x | sort %}{% endif %}{% endfor %}",
        "{% set ns = namespace(s='aaa') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadRequest, match="chat_template"):
        ChatTemplate(source, limits=Limits(time_s=0.05)).render(CHATS[0])
    assert time.monotonic() - began < 2


def test_output_and_source_have_limits() -> None:
    with pytest.raises(BadRequest, match="characters"):
        ChatTemplate("x" * 200_000)
    with pytest.raises(BadRequest, match="longer than 10 characters"):
        ChatTemplate("{{ 'x' * 11 }}", limits=Limits(output_chars=10)).render(CHATS[0])


def test_a_template_may_refuse_and_tell_the_date() -> None:
    with pytest.raises(BadRequest, match=r"messages.*roles must alternate"):
        ChatTemplate(GEMMA).render([{"role": "assistant", "content": "x"}])
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 7, 26))
    assert template.render(CHATS[0]) == "26 Jul 2026"


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ("hi", "messages: "),
        ([], "messages: "),
        ({"role": "user"}, "messages: "),
        (["hi"], r"messages\[0\]: "),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "im_end", "content": "x"}], r"messages\[0\]\.role"),
        ([*CHATS[2], {"role": "user", "content": 5}], r"messages\[3\]\.content: "),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content: "),
        ([{"role": "user"}], r"messages\[0\]\.content: "),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]\.type"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"messages\[0\]\.content\[0\]\.text"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\.content.*surrogate"),
        ([{"role": "user", "content": "x", "tool_calls": "y"}], r"messages\[0\]\.tool_calls"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra"),
    ],
)
def test_wrong_messages_are_named(messages: Any, names: str) -> None:
    with pytest.raises(BadRequest, match=f"^{names}"):
        ChatTemplate(CHATML).render(messages)


def test_wrong_tools_and_keywords_are_named() -> None:
    for tools in ("x", [5], {"a": 1}):
        with pytest.raises(BadRequest, match="tools"):
            ChatTemplate(CHATML).render(CHATS[0], tools=tools)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="bos_token"):
        ChatTemplate(CHATML).render(CHATS[0], bos_token="x")


def test_a_base_model_says_that_it_has_no_template() -> None:
    with pytest.raises(BadRequest, match="base model without a chat template"):
        template_of(small_tokenizer("spm"))
    with pytest.raises(BadRequest, match="one of: default"):
        template_of(small_tokenizer("bpe"), "tool_use")
    assert small_bpe()["tokenizer.chat_template"] == small_tokenizer("bpe").chat_template
