"""Grammars in the engine: what is allowed next, where an output ends, and that nothing of the schedule shows in it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

import pytest
from harness import EOS, VOCAB, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core.errors import BadRequest
from millstream.core.plan import SampleAsk
from millstream.core.registry import Choice
from millstream.core.request import Prior, Request, SamplingParams, Structured
from millstream.core.sequence import Finish
from millstream.decode.logits.grammar.host import Grammar
from millstream.engine.thread import EngineThread
from millstream.runner.null_runner import choose, prefix_hash
from millstream.text.grammar.build import build, make_tokenizer
from millstream.text.vocabulary import Vocabulary

pytest.importorskip("llguidance")

# Every character that a grammar below may force, a few longer tokens, one control token besides the end.
TOKENS = [
    *(char.encode() for char in '{}[]":, \n0123456789.-+E\\abctruflsnxe'),
    *(b'{"', b'":', b'",', b'"a"', b"abc", b"true", b"12", b"ab", b"]}", b"yyy", b"zz"),
]
TOKENS += [*(b"~%d" % n for n in range(VOCAB - 2 - len(TOKENS))), b"<ctl>", b"<eos>"]
VOCABULARY = Vocabulary.from_bytes(TOKENS, (VOCAB - 2, EOS))

JSON_AB = Structured.json(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


def bench(**given) -> Bench:
    guides = Grammar(VOCABULARY, VOCAB, {EOS})
    return Bench(stop_ids=frozenset({EOS}), guides=[guides], **given)


def run(made: Bench) -> None:
    """Steps to the end; waits for grammars that are being built aside."""
    until = time.monotonic() + 30
    while made.engine.busy:
        if not made.step() and made.engine.busy:
            assert any(seq.gates for seq in made.engine.scheduler.live.values()), "there is work, none can be launched"
            assert time.monotonic() < until
            time.sleep(0.001)


def text(tokens: Sequence[int]) -> str:
    return b"".join(TOKENS[token] for token in tokens if token != EOS).decode()


def truth(prompt: Sequence[int], structured: Structured, params: SamplingParams, index: int = 0) -> list[int]:
    """Alone, token by token, with a matcher of its own."""
    matcher = build(make_tokenizer(VOCABULARY, VOCAB, {EOS}), structured)
    tokens, out = list(prompt), []
    while len(out) < (params.max_tokens or 0) and not matcher.is_stopped():
        ask = SampleAsk(params, params.seed or 0, index, len(tokens), len(prompt), allowed=matcher.compute_bitmask())
        token = choose(ask, prefix_hash(tokens), VOCAB)
        tokens.append(token)
        out.append(token)
        if token == EOS:
            break
        assert matcher.consume_token(token)
    return out


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize(
    "structured",
    [JSON_AB, Structured.json(), Structured.regex("[ab]{3}c?"), Structured.choice(["ab", "abc", "x"])],
    ids=lambda s: s.kind,
)
def test_every_output_is_in_its_grammar_and_the_one_that_a_lone_walk_gives(structured, plans):
    made = bench(plans=plans)
    requests = [
        made.add([n, 2, 3], 40, params={"structured": structured, "seed": n, "temperature": n % 2}) for n in range(6)
    ]
    free = made.add([1, 2, 3], 12)
    run(made)
    for request in requests:
        assert made.output(request) == truth(request.prompt_ids, structured, request.params)
        if made.finish(request) is Finish.STOP and structured.kind.startswith("json"):
            assert isinstance(json.loads(text(made.output(request))), dict)
    assert made.output(free) == made.truth(free)
    made.clean()


def test_it_ends_with_the_token_that_completes_it_and_needs_no_end_token():
    made = bench()
    ends = made.add([5], 40, params={"structured": Structured.choice(["abc"])})
    ignores = made.add([6], 40, params={"structured": Structured.choice(["abc"]), "ignore_eos": True})
    run(made)
    for request in (ends, ignores):
        chunk = made.chunks[(request.id, 0)][-1]
        assert text(made.output(request)) == "abc" and EOS not in made.output(request)
        assert (chunk.finish, chunk.stop_reason, chunk.stop_token) == (Finish.STOP, None, False)


def test_an_end_token_is_allowed_only_where_the_grammar_may_end():
    made = bench()
    requests = [made.add([n], 30, params={"structured": Structured.regex("(ab|12)+")}) for n in range(12)]
    run(made)
    for request in requests:
        out = made.output(request)
        if made.finish(request) is Finish.STOP:
            assert out[-1] == EOS and made.chunks[(request.id, 0)][-1].stop_token and len(text(out)) % 2 == 0
        assert EOS not in out[:-1] and VOCAB - 2 not in out, "a control token matches no text"


def test_min_tokens_yields_to_a_grammar_that_is_complete():
    made = bench()
    short = made.add([3], 30, params={"structured": Structured.regex("ab"), "min_tokens": 20})
    empty = made.add([3], 30, params={"structured": Structured.grammar('start: ""'), "min_tokens": 20})
    long = made.add([3], 30, params={"structured": Structured.regex("(ab)*"), "min_tokens": 7})
    run(made)
    assert text(made.output(short)) == "ab" and text(made.output(empty)) == ""
    assert len(made.output(long)) > 7 and made.finish(short) is made.finish(empty) is Finish.STOP


@pytest.mark.parametrize("plans", [1, 2])
def test_a_bias_against_all_that_may_come_ends_the_request_and_no_other(plans):
    # The null runner knows no bias: a ban stands for it. Rows without a choice end in `_check_choice` on the device.
    made = bench(plans=plans)
    stuck = made.add([3], 30, params={"structured": Structured.grammar("start: a\na: b\nb: a")})
    fine = made.add([4], 8)
    run(made)
    chunk = made.chunks[(stuck.id, 0)][-1]
    assert chunk.finish is Finish.ERROR and "grammar" in (chunk.error or "")
    assert made.output(fine) == made.truth(fine)
    made.clean()


def test_a_grammar_that_was_not_checked_and_is_bad_ends_its_request():
    made = bench()
    bad = made.add([3], 30, params={"structured": Structured.regex("(")})
    fine = made.add([4], 8, params={"structured": Structured.choice(["abc"])})
    run(made)
    chunk = made.chunks[(bad.id, 0)][-1]
    assert chunk.finish is Finish.ERROR and "regex" in (chunk.error or "")
    assert text(made.output(fine)) == "abc"
    made.clean()


def test_a_grammar_that_takes_too_much_of_the_engine_ends_its_request_alone(monkeypatch):
    monkeypatch.setattr("millstream.decode.logits.grammar.host.GRANT_S", 0.0)
    monkeypatch.setattr("millstream.decode.logits.grammar.host.MASK_S", 0.0)
    made = bench()
    slow = made.add([3], 30, params={"structured": JSON_AB})
    fine = made.add([4], 8)
    run(made)
    chunk = made.chunks[(slow.id, 0)][-1]
    assert chunk.finish is Finish.ERROR and "too slow" in (chunk.error or "")
    assert made.output(fine) == made.truth(fine)
    made.clean()


def test_several_outputs_walk_apart():
    made = bench()
    request = made.add([3, 4], 30, params={"structured": JSON_AB, "n": 5, "seed": 9, "temperature": 1.0})
    run(made)
    outputs = [made.output(request, index) for index in range(5)]
    assert len({tuple(output) for output in outputs}) > 1
    for index, output in enumerate(outputs):
        assert output == truth(request.prompt_ids, JSON_AB, request.params, index)


def test_an_output_taken_up_where_it_stopped_goes_on_in_its_grammar():
    whole = bench()
    request = whole.add([3, 4], 40, params={"structured": JSON_AB, "seed": 2, "temperature": 1.0})
    run(whole)
    output = whole.output(request)
    for cut in range(1, len(output)):
        made = bench()
        again = made.add(
            [3, 4],
            40,
            params={"structured": JSON_AB, "seed": 2, "temperature": 1.0},
            prior=(Prior(0, tuple(output[:cut])),),
        )
        run(made)
        assert output[:cut] + made.output(again) == output


def test_a_beam_search_takes_no_grammar():
    made = bench()
    with pytest.raises(BadRequest, match="structured"):
        made.add([3], 8, params={"structured": JSON_AB}, decode=Choice("beam", {"width": 2}))


def test_one_grammar_is_built_once_for_all_requests_and_only_so_many_are_kept():
    guides = Grammar(VOCABULARY, VOCAB, {EOS})
    made = Bench(stop_ids=frozenset({EOS}), guides=[guides])
    for n in range(5):
        made.add([n], 4, params={"structured": Structured.choice(["abc"])})
    run(made)
    counters = guides.counters()
    assert (counters["guide_cache_hits"], counters["guide_cache_misses"]) == (4, 1)
    for n in range(100):
        made.add([3], 2, params={"structured": Structured.regex(f"a{{{n + 1}}}")})
    run(made)
    assert len(guides._kept) <= 64 and made.engine.load().counters["guide_masks"] > 100


def test_a_request_that_leaves_before_its_grammar_is_built_leaves_nothing():
    made = bench()
    request = made.add([3], 8, params={"structured": JSON_AB})
    made.engine.abort(request.id)
    run(made)
    made.clean()


def test_the_engines_thread_goes_on_as_soon_as_a_grammar_is_built():
    made = bench()
    thread, ended = EngineThread(made.engine), threading.Event()
    try:
        from millstream.core.request import Tokens

        params = SamplingParams(max_tokens=20, temperature=0.0, structured=JSON_AB)
        thread.submit(
            Request(thread.new_id(), (Tokens((3,)),), params), lambda chunk: chunk.finish is not None and ended.set()
        )
        assert ended.wait(20)
    finally:
        thread.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_of_the_schedule_shows_in_a_structured_output(data):
    made = bench(
        plans=data.draw(st.sampled_from([1, 2])),
        num_blocks=data.draw(st.integers(14, 30)),
        host_blocks=data.draw(st.sampled_from([0, 16])),
        preemption=data.draw(st.sampled_from(["recompute", "swap"])),
        meters=(Choice("splitfuse", {"budget": data.draw(st.integers(2, 12))}), "seats", "kv-blocks"),
    )
    asked = []
    for n in range(data.draw(st.integers(1, 6))):
        structured = data.draw(
            st.sampled_from(
                [JSON_AB, Structured.json(), Structured.regex("(a|b|12)+x"), Structured.choice(["abc"]), None]
            )
        )
        params = {"structured": structured, "seed": n, "temperature": data.draw(st.sampled_from([0.0, 1.0]))}
        prompt = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
        asked.append((made.add(prompt, data.draw(st.integers(1, 30)), params=params), structured))
        for _ in range(data.draw(st.integers(0, 3))):
            made.step()
    run(made)
    for request, structured in asked:
        if structured is None:
            expected = made.truth(request)
            stop = expected.index(EOS) + 1 if EOS in expected else len(expected)
            assert made.output(request) == expected[:stop]
        else:
            assert made.output(request) == truth(request.prompt_ids, structured, request.params)
    made.clean()
