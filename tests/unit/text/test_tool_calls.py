"""Tool calls in a stream: what is said of a text does not depend on where it is cut, and no text is too odd."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core import registry
from millstream.core.errors import BadRequest
from millstream.text.reasoning import KNOWN, Tags, Thinking, opened_by, tags_of
from millstream.text.tools.output import OutputReader
from millstream.text.tools.protocol import CallStart, CallText, Content, Tool, Toolbox, Whole
from millstream.text.tools.scan import JsonScanner, Step

NAMES = frozenset({"f", "weather.get", "add_2", "code_interpreter"})
FORMATS = registry.names("tools")
THINK = KNOWN["think"]


def reader(name: str, certain: bool = False, many: bool = True, thinking: Thinking | None = None) -> OutputReader:
    return OutputReader(thinking, registry.get("tools", name)().reader(NAMES, certain, many))


def whole(read: OutputReader, *texts: str) -> Whole:
    out = Whole()
    for text in texts:
        out.add(read.push(text))
    out.add(read.finish())
    return out


def told(name: str, text: str, **given) -> tuple[str, list[tuple[str, str]]]:
    found = whole(reader(name, **given), text)
    return found.content, [(call.name, call.arguments) for call in found.calls]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# What each format's calls look like in the wild, and what is to be read out of it: (format, text, content, calls).
READ = [
    ("hermes", hermes("f", '{"a": 0.8}'), "", [("f", '{"a": 0.8}')]),
    ("hermes", f"Let me see.\n\n{hermes('f', '{}')}\n", "Let me see.", [("f", "{}")]),
    ("hermes", hermes("f", "{}") + hermes("add_2", '{"x": [1, {"y": null}]}'), "",
     [("f", "{}"), ("add_2", '{"x": [1, {"y": null}]}')]),
    ("hermes", hermes("f", "{}") + "\n" + hermes("f", "{}") + " done", "done", [("f", "{}")] * 2),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "id": 7, "parameters": {"a": "\\u00e9\\"}"}}', "",
     [("f", '{"a": "\\u00e9\\"}"}')]),
    ("hermes", '<tool_call>{"name": "f"}<tool_call>{"name": "f", "arguments": null}', "", [("f", "{}")] * 2),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, {"name": "add_2", "arguments": {}}]</tool_call>', "",
     [("f", "{}"), ("add_2", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", "a < b <tool> <tool_cal", "a < b <tool> <tool_cal", []),
    ("hermes", "  two \n lines  ", "  two \n lines  ", []),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("hermes", "<<tool_call>" + '{"name": "f"}', "<", [("f", "{}")]),
    ("hermes", hermes("f", "{}") + "</tool_call>", "</tool_call>", [("f", "{}")]),
    ("plain", '{"name": "f", "arguments": {"a": "b"}}', "", [("f", '{"a": "b"}')]),
    ("plain", ' [{"name": "f", "arguments": {}},\n {"name": "add_2", "arguments": {"x": 1e5}}]\n', "",
     [("f", "{}"), ("add_2", '{"x": 1e5}')]),
    ("plain", '{"name": "f"}\n{"name": "f"}', "", [("f", "{}")] * 2),
    ("plain", '{"city": "Paris", "n": [1, 2]}', '{"city": "Paris", "n": [1, 2]}', []),
    ("plain", "[1, 2, 3]", "[1, 2, 3]", []),
    ("plain", 'It is {"name": "f"}', 'It is {"name": "f"}', []),
    ("plain", '{"name": "Bob", "arguments": {}}', '{"name": "Bob", "arguments": {}}', []),
    ("llama", '{"name": "f", "parameters": {"a": true}}', "", [("f", '{"a": true}')]),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "add_2", "parameters": {}}', "",
     [("f", "{}"), ("add_2", "{}")]),
    ("llama", '<|python_tag|>weather.get.call(city="Par)is", days=[1, 2], exact=True)', "", []),
    ("llama", '<|python_tag|>f.call(query="a \\"b\\" (c", n=-2, x=None)', "",
     [("f", '{"query": "a \\"b\\" (c", "n": -2, "x": null}')]),
    ("llama", "<|python_tag|>import os\nprint(os.name)", "",
     [("code_interpreter", '{"code": "import os\\nprint(os.name)"}')]),
    ("llama", 'Hello <|python_tag|>{"name": "f", "parameters": {}}', "Hello", [("f", "{}")]),
    ("llama", '{"a": 1}', '{"a": 1}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "add_2", "arguments": {}}]', "",
     [("f", '{"a": 1}'), ("add_2", "{}")]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]add_2[CALL_ID]a1b2[ARGS]{}', "",
     [("f", '{"a": [1]}'), ("add_2", "{}")]),
    ("mistral", 'Well. [TOOL_CALLS]f{"a": 1}', "Well.", [("f", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ("mistral", '[TOOL_CALLS]g[ARGS]{"a": 1}', '[TOOL_CALLS]g[ARGS]{"a": 1}', []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), READ)
def test_calls_are_read_as_their_families_write_them(name, text, content, calls):
    if "weather.get.call" in text:
        calls = [("weather.get", '{"city": "Par)is", "days": [1, 2], "exact": true}')]
    for certain in (False, True):
        assert told(name, text, certain=certain) == (content, calls)


BROKEN = [
    "<tool_call>",
    "<tool_call>\n",
    "<tool_call>\nnot json\n</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": 0.8.1}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "new\nline"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}',
    '<tool_call>{"name": "f", "arguments": {"a": "b',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": True}}</tool_call>',
    '<tool_call>{name: "f"}</tool_call>',
    '<tool_call>{"name": "f", }</tool_call>',
    '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 300 + "1" + "}" * 300 + "}</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call>[1]</tool_call>",
    "<|python_tag|>f.call(1)",
    "<|python_tag|>f.call(a=b)",
    "<|python_tag|>f.call(**{'a': 1})",
    "<|python_tag|>f.call(a=" + "(" * 5000 + ")" * 5000 + ")",
    "<|python_tag|>f.call(a=__import__('os').abort())",
    "[TOOL_CALLS]",
    "[TOOL_CALLS]f[ARGS]5",
    "[TOOL_CALLS]f[ARGS]",
    "[TOOL_CALLS]f[AR{}",
    '[TOOL_CALLS]f[ARGS]{"a": }',
    '[TOOL_CALLS][{"name": "f", "arguments": }]',
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_valid_call_is_content_to_the_letter(name, text):
    names = NAMES - {"code_interpreter"}
    read = OutputReader(None, registry.get("tools", name)().reader(names, False, True))
    found = whole(read, text)
    assert not found.calls and found.content == text


@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_call_takes_no_good_one_along(name):
    good = {"hermes": hermes("f", "{}"), "mistral": "[TOOL_CALLS]f[ARGS]{}", "llama": '<|python_tag|>{"name": "f"}'}
    bad = {"hermes": '<tool_call>{"name": 5}', "mistral": "[TOOL_CALLS]f[ARGS]no", "llama": "<|python_tag|>{oh}"}
    if name in good:
        assert told(name, bad[name] + " " + good[name]) == (bad[name], [("f", "{}")])


def test_where_one_call_is_wanted_the_rest_is_content():
    two = hermes("f", "{}") + "\n" + hermes("f", "{}")
    assert told("hermes", two, many=False) == (hermes("f", "{}"), [("f", "{}")])
    assert told("plain", '{"name": "f"} {"name": "f"}', many=False) == ('{"name": "f"}', [("f", "{}")])


def test_arguments_are_told_as_they_come_where_a_grammar_makes_them_certain():
    read, steps = reader("hermes", certain=True), []
    for char in hermes("f", '{"city": "Paris"}'):
        steps += read.push(char)
    assert steps[0] == CallStart(0, "f") and "".join(s.text for s in steps[1:]) == '{"city": "Paris"}'
    assert len(steps) == 1 + len('{"city": "Paris"}')
    # Cut short, what was told stays: the output ended by its length, and says so.
    cut = whole(reader("hermes", certain=True), '<tool_call>{"name": "f", "arguments": {"city": "Pa')
    assert [(call.name, call.arguments, call.valid) for call in cut.calls] == [("f", '{"city": "Pa', False)]
    assert cut.content == ""


def test_a_call_within_thinking_is_none():
    text = f"<think>\nI could {hermes('f', '{}')} or not\n</think>\n\nAnswer: {hermes('add_2', '{}')}"
    found = whole(reader("hermes", thinking=Thinking(THINK)), text)
    assert found.reasoning == f"I could {hermes('f', '{}')} or not" and found.content == "Answer:"
    assert [call.name for call in found.calls] == ["add_2"]


# -- every cut

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>",
    '{"name": "f"', ', "arguments": ', ', "parameters": ', '{"a": 0.8}', '{"a": {"b": [1, -2e3, "\\u00e9\\n"]}}',
    "}", "]", "[", "{", '"', ",", ";", ":", "\n", " ", "f", ".call(", "x=1", ")", "'", "\\", "text", "é", "😀", "\x00",
    "<", "[T", '{"name": "weather.get", "arguments": {}}', "null", "true", "0.8", "01", "-", "{}", "unknown",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=14).map("".join)


@st.composite
def near_calls(draw) -> str:
    """A good text with something taken out, put in or cut off."""
    text = draw(st.sampled_from([text for _, text, _, _ in READ] + BROKEN[:20]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", "", *FRAGMENTS])) + text[at + draw(st.integers(0, 3)) :]
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.one_of(texts, near_calls()),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "before", "inside"]),
    st.data(),
)
def test_pieces_put_together_are_the_same_for_every_cut(name, text, certain, many, thinks, data):
    def made() -> OutputReader:
        thinking = None if thinks is None else Thinking(THINK, thinks == "inside")
        return reader(name, certain, many, thinking)

    want = whole(made(), text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert whole(made(), *pieces) == want
    assert whole(made(), *text) == want
    # No call is told that is not whole, where nothing makes it certain; and none of an unknown name.
    assert all(call.name in NAMES and (certain or call.valid) for call in want.calls)
    assert not many or certain or len(want.calls) == len({id(call) for call in want.calls})
    if not want.calls and thinks is None:
        assert want.content == text


@pytest.mark.parametrize(("name", "text", "content", "calls"), READ)
def test_every_cut_in_two_of_every_known_text(name, text, content, calls):
    for certain in (False, True):
        want = whole(reader(name, certain), text)
        for cut in range(len(text) + 1):
            assert whole(reader(name, certain), text[:cut], text[cut:]) == want


# An independent reading of well-formed output, by regular expressions over the whole of it.


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(NAMES)),
            st.dictionaries(
                st.text(max_size=6),
                st.recursive(
                    st.one_of(
                        st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
                    ),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
                    ),
                    max_leaves=6,
                ),
                max_size=4,
            ),
        ),
        max_size=4,
    ),
    st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"]), max_size=12),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_well_formed_calls_are_read_as_a_plain_parser_reads_them(calls, before, ascii_only, indent):
    written = [json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only, indent=indent) for n, a in calls]
    text = before + "".join(f"<tool_call>\n{one}\n</tool_call>\n" for one in written)
    naive = [json.loads(found) for found in re.findall(r"<tool_call>\n(.*?)\n</tool_call>\n", text, re.S)]
    found = whole(reader("hermes"), text)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
        (c["name"], c["arguments"]) for c in naive
    ]
    assert found.content == (before.rstrip(" \n\r\t") if calls else before)
    listed = whole(reader("mistral"), f"[TOOL_CALLS] [{', '.join(written)}]")
    assert [(call.name, json.loads(call.arguments)) for call in listed.calls] == calls
    if calls:
        plain = whole(reader("plain"), "\n".join(written))
        assert [(call.name, json.loads(call.arguments)) for call in plain.calls] == calls and not plain.content


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    json_values,
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(0, 40),
    st.sampled_from([*'{}[]",:01.-eE+\\utx \n']),
)
def test_the_scanner_agrees_with_a_json_parser(value, ascii_only, indent, at, char):
    good = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    at = min(at, len(good))
    for text in (good, good[:at] + char + good[at:], good[:at] + good[at + 1 :]):
        scanner, end = JsonScanner(), None
        for place, each in enumerate(text):
            step = scanner.push(each)
            if step is not Step.MORE:
                end = place + (step is Step.DONE) if step is not Step.BAD else -1
                break
        if end is None:
            end = len(text) if scanner.whole else -1
        try:
            want = json.JSONDecoder().raw_decode(text)[1] if text[:1] not in " \n" else -1
        except ValueError:
            want = -1
        # The parser takes the longest number that is one ("1" of "1." and "1e"); the scanner waits for the rest.
        if (
            end == -1
            and want > 0
            and re.match(r"-?\d+(\.\d+)?([eE][+-]?\d+)?$", text[:want])
            and text[want : want + 1] in "0123456789.eE"
        ):
            continue
        if text[:1] in "NI" or text[:2] == "-I":
            continue  # NaN and Infinity, which Python reads
        if "NaN" in text or "Infinity" in text:
            continue
        assert end == want, text


# -- thinking


def test_thinking_is_told_from_the_answer():
    def split(text: str, inside: bool = False, tags: Tags = THINK) -> tuple[str, str]:
        found = whole(OutputReader(Thinking(tags, inside)), text)
        return found.reasoning, found.content

    assert split("<think>\nhm </th \n</think>\n\nYes.\n") == ("hm </th", "Yes.\n")
    assert split("\n<think></think>Yes") == ("", "Yes")
    assert split("Yes <think>no</think>") == ("", "Yes <think>no</think>")
    assert split("hm</think> Yes", inside=True) == ("hm", "Yes")
    assert split("hm", inside=True) == ("hm", "") and split("<think>hm\n") == ("hm", "")
    assert split("<thin") == ("", "<thin") and split(" \n ") == ("", " \n ") and split("") == ("", "")
    assert split("[THINK]a[/THINK]b", tags=KNOWN["mistral"]) == ("a", "b")
    assert tags_of("{{ '<think>' }}") is THINK and tags_of("plain") is None
    assert opened_by("<|assistant|><think>\n", THINK) and not opened_by("<think></think>\n", THINK)


def test_tokens_of_thinking_can_be_counted():
    read, count = OutputReader(Thinking(THINK)), 0
    for token in ["<think>", "a", "b", "</think>", "c"]:
        before = read.thinks
        read.push(token)
        count += before or read.thinks
    assert count == 4


# -- what may be asked for


def test_tools_and_the_choice_among_them_are_bounded():
    f = Tool("f", parameters={"properties": {"a": {"type": "integer"}}})
    assert f.schema["type"] == "object" and Tool("g").schema == {"type": "object", "properties": {}}
    for bad in ("", 'a"b', "a\nb", "a b", "x" * 129, "x" * 10_240, ".a", 5, None):
        with pytest.raises(BadRequest, match="name"):
            Tool(bad)
    with pytest.raises(BadRequest, match=r"tools\[1\]"):
        Toolbox((f, f))
    with pytest.raises(BadRequest, match="at most 128"):
        Toolbox(tuple(Tool(f"f{i}") for i in range(5000)))
    with pytest.raises(BadRequest, match="tool_choice"):
        Toolbox((f,), mode="required", only="g")
    with pytest.raises(BadRequest, match="tool_choice"):
        Toolbox((), mode="required")
    with pytest.raises(BadRequest, match="tool_choice"):
        Toolbox((f,), mode="some")
    assert Toolbox((f,), mode="none").callable == () and Toolbox((f, Tool("g")), "required", "g").callable == (
        Tool("g"),
    )
    assert isinstance(whole(OutputReader(), "x"), Whole) and Content("x") != CallText(0, "x")


def test_ids_of_calls_are_as_the_family_takes_them():
    mistral, hermes_format = (registry.get("tools", name)() for name in ("mistral", "hermes"))
    assert re.fullmatch(r"[A-Za-z0-9]{9}", mistral.call_id("call_" + "a" * 32))
    assert mistral.call_id("x") == mistral.call_id("x") != mistral.call_id("y") and hermes_format.call_id("x") == "x"
