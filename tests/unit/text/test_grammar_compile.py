"""Grammars of clients: what is taken, what is refused and why; a process that dies of one takes nobody along."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time

import pytest

from millstream.core.errors import BadRequest, EngineClosed, RequestFault
from millstream.core.lru import Lru
from millstream.core.request import MAX_STRUCTURED_CHARS, Structured
from millstream.text.grammar.build import build, make_tokenizer
from millstream.text.grammar.check import Refused, checked
from millstream.text.grammar.compiler import CompileLimits, GrammarCompiler
from millstream.text.vocabulary import Vocabulary

pytest.importorskip("llguidance")

BYTES = Vocabulary.from_bytes([*(bytes([i]) for i in range(256)), b"<eos>"], (256,))
EOS = 256

# A worker whose judge is another: what it does is up to the text.
ODD_WORKER = """
import os, sys, time
from millstream.text.grammar import worker
real = worker.judge
def judge(tokenizer, ask):
    if ask.text == "abort": os.abort()
    if ask.text == "hang":
        while True: pass
    if ask.text == "sleep": time.sleep(0.3)
    if ask.text == "raise": raise KeyError("what no worker should raise")
    if ask.text == "memory": return real(tokenizer, ask) if bytearray(1 << 30) else None
    return real(tokenizer, ask)
worker.judge = judge
worker.main(float(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def compiler():
    made = GrammarCompiler(BYTES, 257, {EOS})
    yield made
    made.close()


@pytest.fixture
def odd():
    made = GrammarCompiler(BYTES, 257, {EOS}, CompileLimits(time_s=0.7, waiting=4), (sys.executable, "-c", ODD_WORKER))
    yield made
    made.close()


def schema_of(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


REFUSED = {
    "look-around": (Structured.regex("(?=a)b"), "regex"),
    "a back-reference": (Structured.regex(r"(a)\1"), "regex"),
    "an open group": (Structured.regex("("), "regex"),
    "a regex of 5000 groups": (Structured.regex("(" * 5000 + "a" + ")" * 5000), "regex"),
    "a long regex": (Structured.regex("a" * 20_000), "20000 characters"),
    "60 000 groups in Lark": (Structured.grammar("start: " + "(" * 60_000 + '"a"' + ")" * 60_000), "nested"),
    "60 000 groups in GBNF": (Structured.grammar("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000), "nested"),
    "no start": (Structured.grammar('foo: "a"'), "start"),
    "an unknown rule": (Structured.grammar("start: foo"), "foo"),
    "a grammar without a sentence": (Structured.grammar("start: a\na: b\nb: a"), "no output"),
    "a reference to elsewhere": (Structured.json({"$ref": "http://127.0.0.1:9/x.json"}), r"\$ref"),
    "a reference to a file": (Structured.json({"$ref": "file:///etc/passwd"}), r"\$ref"),
    "a reference to nothing": (Structured.json({"$ref": "#/$defs/none"}), r"\$ref"),
    "a circle of references": (
        Structured.json({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "no output",
    ),
    "a bomb of allOf": (
        Structured.json(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}
        ),
        "too large",
    ),
    "depth 1000": (Structured("json_schema", schema_of(1000)), "nesting"),
    "depth 100": (Structured("json_schema", schema_of(100)), "nesting"),
    "an enum of 20 000": (Structured.json({"enum": list(range(20_000))}), "enum"),
    "a bad pattern": (Structured.json({"type": "string", "pattern": "("}), "pattern"),
    "no number is that": (Structured.json({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "no string is that": (Structured.json({"type": "string", "minLength": 5, "maxLength": 3}), "minLength"),
    "nothing is that": (Structured.json({"allOf": [{"type": "string"}, {"type": "integer"}]}), "nsatisfiable"),
    "false": (Structured("json_schema", "false"), "false"),
    "a wrong type": (Structured.json({"type": "strin"}), "type"),
    "a type that is a number": (Structured.json({"type": 5}), "type"),
    "a schema that is a list": (Structured("json_schema", "[]"), "list"),
    "minItems 1e9": (Structured.json({"type": "array", "minItems": 10**9}), "minItems"),
    "minLength 1e9": (Structured.json({"type": "string", "minLength": 10**9}), "minLength"),
    "3000 properties": (Structured.json({"properties": {f"p{i}": {} for i in range(3000)}}), "properties"),
    "NaN": (Structured("json_schema", '{"const": NaN}'), "NaN"),
    "no JSON": (Structured("json_schema", "{"), "not JSON"),
    "an integer of 5000 digits": (Structured("json_schema", '{"minItems": ' + "9" * 5000 + "}"), "minItems"),
    "not": (Structured.json({"not": {"type": "string"}}), "not"),
    "uniqueItems": (Structured.json({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "no choices": (Structured("choice", "[]"), "choices"),
    "an empty choice": (Structured.choice(["a", ""]), "empty"),
    "choices that are no list": (Structured("choice", "5"), "choices"),
    "a choice that is a number": (Structured("choice", "[1]"), "1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name_and_in_time(compiler, case):
    structured, told = REFUSED[case]
    start = time.monotonic()
    with pytest.raises(BadRequest, match=told) as caught:
        compiler.check(structured, "response_format")
    assert caught.value.param == "response_format" and time.monotonic() - start < 5
    assert "/home" not in str(caught.value) and "0x" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# These are famous for killing other engines. Ours takes time linear in the text, so they are taken.
@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        (Structured.regex("(a+)+b"), "aaab", "aaa"),
        (Structured.regex("(a|a)*b"), "aab", "ab b"),
        (Structured.regex("a{1,100000}"), "aaaa", "b"),
        (Structured.regex("((a{1,100}){1,100}){1,100}"), "aa", ""),
        (Structured.regex("^[a-z]+$"), "abc", "a1"),
        (Structured.grammar('start: start "a" | "a"'), "aaa", "b"),
        (Structured.grammar('start: (""*)* "x"'), "x", "y"),
        (Structured.grammar('root ::= "a" x | "b"\nx ::= [0-9]+ "."'), "a12.", "a."),
        (Structured.choice(['a.b*[]{}^$#&-~/\\"\n é|', "c"]), 'a.b*[]{}^$#&-~/\\"\n é|', "axb*"),
        (Structured.json({"type": "object"}), '{"a": [1, {"b": null}]}', "[1]"),
        (Structured.json(), '{"a": -1.5e3}', '"a"'),
        (Structured.json({"anyOf": [{"type": "null"}, {"const": "é\n"}]}), '"é\\n"', '"é'),
        (Structured.json({"properties": {"a": {"$ref": "#"}}}), '{"a": {"a": {}}}', '{"a": 1'),
        (Structured.json({"not": {"type": "string"}, "type": "integer"}, strict=False), "12", "x"),
    ],
)
def test_what_is_taken_matches_what_it_says(compiler, structured, good, bad):
    ready = compiler.check(structured).structured
    matcher = build(make_tokenizer(BYTES, 257, {EOS}), ready)

    def fits(text: str) -> bool:
        walk = matcher.deep_copy()
        return all(walk.consume_token(byte) for byte in text.encode()) and walk.is_accepting()

    assert fits(good) and not fits(bad) and not matcher.is_error()


def test_keywords_that_are_passed_over_without_strict_are_told(compiler):
    found = compiler.check(Structured.json({"type": "array", "uniqueItems": True}, strict=False))
    assert any("uniqueItems" in warning for warning in found.warnings)


def test_a_reference_to_elsewhere_is_not_followed(compiler):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for schema in (
            {"$ref": url},
            {"$schema": url, "type": "object"},
            {"$id": url, "properties": {"a": {"$ref": "b"}}},
        ):
            try:
                compiler.check(Structured.json(schema))
            except BadRequest as error:
                assert "$ref" in str(error) or "schema" in str(error)
        with pytest.raises(TimeoutError):
            server.accept()


def test_values_are_bounded_before_anything_is_compiled():
    for make in (
        lambda: Structured("json_schema", ""),
        lambda: Structured("yaml", "x"),
        lambda: Structured("regex", "a" * (MAX_STRUCTURED_CHARS + 1)),
        lambda: Structured("regex", 5),  # type: ignore[arg-type]
        lambda: Structured("regex", "a", strict=1),  # type: ignore[arg-type]
        lambda: Structured.json({"a": float("nan")}),
        lambda: Structured.json({"a": {1, 2}}),  # type: ignore[dict-item]
    ):
        with pytest.raises(BadRequest, match="structured"):
            make()


def test_names_of_properties_are_no_keywords():
    names = {name: {"type": "integer"} for name in ("minItems", "enum", "$ref", "not", "properties")}
    checked(Structured.json({"properties": names, "const": {"minItems": 10**9}}))
    with pytest.raises(Refused, match=r"\$\.properties\.properties\.minItems"):
        checked(Structured.json({"properties": {"properties": {"minItems": 10**9}}}))


# -- the process


@pytest.mark.parametrize("how", ["abort", "hang", "raise", "memory"])
def test_a_grammar_that_kills_its_compiler_is_refused_and_the_next_one_compiled(odd, how):
    assert odd.check(Structured.regex("a+"))
    before = odd._worker._process.pid
    with pytest.raises(BadRequest, match="regex"):
        odd.check(Structured.regex(how))
    counters = odd.counters()
    assert counters["grammar_worker_crashes"] + counters["grammar_worker_timeouts"] == 1
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert odd.check(Structured.regex("b+")).structured.text == "b+"
    # It is remembered, and kills no second one.
    with pytest.raises(BadRequest, match="regex"):
        odd.check(Structured.regex(how))
    after = odd.counters()
    assert after["grammar_worker_crashes"] + after["grammar_worker_timeouts"] == 1


def test_a_hang_costs_its_time_and_the_event_loop_goes_on(odd):
    async def both() -> tuple[float, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        await odd.check_async(Structured.regex("warm"))
        beside, start = asyncio.create_task(tick()), time.monotonic()
        with pytest.raises(BadRequest, match=r"0\.7 s"):
            await odd.check_async(Structured.regex("hang"))
        beside.cancel()
        return time.monotonic() - start, ticks

    seconds, ticks = asyncio.run(both())
    assert 0.6 < seconds < 5 and ticks > 20


def test_equal_grammars_are_compiled_once_and_too_many_waiting_are_refused(odd):
    odd.check(Structured.regex("warm"))

    async def many() -> list[object]:
        same = [odd.check_async(Structured.regex("sleep")) for _ in range(20)]
        others = [odd.check_async(Structured.regex(f"a{n}")) for n in range(8)]
        return await asyncio.gather(*same, *others, return_exceptions=True)

    found = asyncio.run(many())
    assert all(not isinstance(one, Exception) for one in found[:20]) and odd.counters()["grammar_compiled"] <= 5
    assert sum(isinstance(one, RequestFault) for one in found[20:]) >= 5


def test_one_who_gives_up_waiting_takes_nothing_from_the_others(odd):
    odd.check(Structured.regex("warm"))

    async def both() -> str:
        first = asyncio.create_task(odd.check_async(Structured.regex("sleep")))
        second = asyncio.create_task(odd.check_async(Structured.regex("sleep")))
        await asyncio.sleep(0.05)
        first.cancel()
        return (await second).structured.text

    assert asyncio.run(both()) == "sleep"


def test_a_closed_compiler_leaves_no_process_and_fails_who_waits(odd):
    odd.check(Structured.regex("warm"))
    pid, failed = odd._worker._process.pid, []

    def wait() -> None:
        try:
            odd.check(Structured.regex("hang"))
        except EngineClosed as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    odd.close()
    thread.join(5)
    assert failed and not thread.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineClosed):
        odd.check(Structured.regex("a"))


def test_a_worker_that_cannot_be_started_is_an_error_of_the_server():
    made = GrammarCompiler(BYTES, 257, {EOS}, command=("/no/such/program",))
    with pytest.raises(RequestFault, match="cannot be started"):
        made.check(Structured.regex("a"))
    made.close()


def test_the_cache_stays_within_its_bounds_and_tells_its_hits():
    limits = CompileLimits(cache_items=50, cache_bytes=64 << 10)
    made = GrammarCompiler(BYTES, 257, {EOS}, limits)
    try:
        for n in range(300):
            made.check(Structured.json({"type": "object", "properties": {f"p{n}": {"type": "string"}}}))
        assert made.check(Structured.json({"type": "object", "properties": {"p299": {"type": "string"}}}))
        counters = made.counters()
        assert counters["grammar_cache_items"] <= 50 and counters["grammar_cache_bytes"] <= 64 << 10
        assert (counters["grammar_cache_hits"], counters["grammar_cache_misses"]) == (1, 300)
    finally:
        made.close()


def test_the_longest_unused_goes_first_by_count_and_by_bytes():
    cache: Lru[str, int] = Lru(3, 100)
    for key in "abc":
        cache.put(key, 1, 10)
    assert cache.get("a") == 1
    cache.put("d", 1, 10)
    assert cache.get("b") is None and cache.get("a") == 1
    cache.put("e", 1, 95)
    assert len(cache) == 1 and cache.bytes == 95 and cache.get("e") == 1
    cache.put("f", 1, 101)
    assert cache.get("f") is None and cache.get("e") == 1
    cache.put("e", 2, 5)
    assert cache.bytes == 5 and cache.get("e") == 2 and (cache.hits, cache.misses) == (5, 2)


def test_a_vocabulary_cuts_text_that_goes_on_after_others():
    tokens = [b"ab", b"a", b"b", b"abc", b" ", b"<eos>"]
    vocabulary = Vocabulary.from_bytes(tokens, (5,))
    assert vocabulary.cut("abcab a") == [3, 0, 4, 1]
    assert vocabulary.cut("ab?ab") == [0] and vocabulary.cut("<eos>") == []
    assert json.loads('"x"') == "x"
