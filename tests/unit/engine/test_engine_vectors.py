"""Vectors through a whole engine: texts of one step, what is refused, what is not finite, other processes, offline."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import subprocess
import sys

import pytest
from engine_process import EngineProcess, eventually

import tiny_encoder
from millstream.config.load import build
from millstream.config.schema import EngineConfig
from millstream.core.client import Chunk
from millstream.core.errors import BadRequest, ConfigError, EngineClosed, RequestFault
from millstream.core.events import Admitted, Prefilled, Stepped
from millstream.core.plan import Settled, StepResult
from millstream.core.request import Kind, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.decode.protocol import NOT_FINITE
from millstream.engine import vectors
from millstream.engine.assemble import assemble, facts_of
from millstream.engine.llm import LLM
from millstream.engine.remote import RemoteEngine

TEXTS = [
    "the cat runs",
    "paris is the capital of france",
    "a",
    "dog dog dog dog dog dog dog",
    "the cat runs",
    "Berlin?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


def made(folder, **tree):
    return assemble(str(folder), build(EngineConfig, tree))


def run(engine, prompts, **given):
    """The last chunk of each request, and the events of the run."""
    ends: dict[int, Chunk] = {}
    events = []
    engine.listeners.append(events.append)
    for place, ids in enumerate(prompts):
        request = Request(place, (Tokens(tuple(ids)),), SamplingParams(max_tokens=1), Kind.EMBED, **given)
        engine.submit(request, lambda chunk: ends.__setitem__(chunk.request_id, chunk))
    while engine.busy:
        assert engine.step()
    engine.listeners.remove(events.append)
    assert engine.scheduler.ledger.free() == engine.scheduler.ledger.total()
    return [ends[place] for place in range(len(prompts))], events


def test_texts_are_computed_whole_and_together_up_to_the_size_of_a_step(folder):
    assembled = made(folder, sched={"step_tokens": 40})
    engine, tokenizer = assembled.engine, assembled.tokenizer
    prompts = [tokenizer.encode(text) for text in TEXTS] * 4
    ends, events = run(engine, prompts)
    chunks = [event for event in events if isinstance(event, Prefilled)]
    # A short text may fill up a step that a long one before it does not fit in.
    computed = {event.seq.request_id: (event.start, event.tokens) for event in chunks}
    assert len(chunks) == len(prompts) and computed == {i: (0, len(ids)) for i, ids in enumerate(prompts)}
    steps = [event for event in events if isinstance(event, Stepped)]
    assert len(steps) > 1 and all(step.tokens <= 40 for step in steps)
    assert all(event.cached == 0 for event in events if isinstance(event, Admitted))
    for ids, end in zip(prompts, ends, strict=True):
        assert (end.finish, end.error, end.tokens) == (Finish.STOP, None, ())
        assert (end.usage.prompt_tokens, end.usage.output_tokens) == (len(ids), 0)
        assert len(end.vector) == 4 * 48
    assert ends[0].vector == ends[4].vector == ends[6].vector and ends[0].vector != ends[1].vector
    # Alone, and two plans at a time, to the bit.
    alone = [run(engine, [ids])[0][0].vector for ids in prompts[:6]]
    ahead, _ = run(made(folder, runner={"plans": 2}).engine, prompts[:6])
    assert [end.vector for end in ends[:6]] == alone == [end.vector for end in ahead]


def test_a_text_that_fills_the_context_is_taken_and_one_token_more_is_not(folder):
    assembled = made(folder, model={"max_context": 24})
    (end,), _ = run(assembled.engine, [[2, *[5] * 22, 3]])
    assert end.finish is Finish.STOP
    for ids, told in (([2, *[5] * 23, 3], "25 tokens.*at most 24"), ([], "empty"), ([2, 10**6, 3], "token ids from 0")):
        with pytest.raises(BadRequest, match=told):
            run(assembled.engine, [ids])


def test_what_an_encoder_cannot_do_is_refused(folder):
    engine = made(folder).engine
    for kind in (Kind.GENERATE, Kind.SCORE):
        with pytest.raises(BadRequest, match="allowed is embed"):
            engine.submit(Request(1, (Tokens((2, 5, 3)),), kind=kind), lambda chunk: None)
    for tree, told in (
        ({"model": {"weights": "blocks"}}, "kept dense"),
        ({"model": {"max_context": 97}}, "1 to 96"),
        ({"sched": {"max_rows": 0}}, "max_rows"),
        ({"runner": {"plans": 3}}, "plans"),
    ):
        with pytest.raises(ConfigError, match=told):
            made(folder, **tree)


def test_it_says_what_it_is(folder):
    assembled = made(folder)
    facts = facts_of(assembled, "tiny")
    assert facts.vectors == {"width": 48, "pooling": "mean", "normalize": True}
    assert facts.limits.kinds == {Kind.EMBED} and facts.limits.max_context == 96
    assert (facts.family, facts.kv_bytes, facts.num_parameters) == ("bert", 0, assembled.spec.num_parameters)
    assert {one.name for one in assembled.resolved.decisions} >= {"model.max_context", "sched.step_tokens"}


class Damaged:
    """Rows of these steps are not finite."""

    def __init__(self, runner, steps):
        self._runner, self.at = runner, steps

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def collect(self, ticket):
        step = self._runner.counters.steps
        result = self._runner.collect(ticket)
        if step not in self.at:
            return result
        rows = tuple(Settled(row.seq, 0, fault=NOT_FINITE) for row in result.settled)
        return StepResult(result.plan, result.seconds, rows)


def test_a_vector_that_is_not_finite_is_computed_again_and_a_damaged_model_is_found_out(folder):
    assembled = made(folder)
    engine, ids = assembled.engine, assembled.tokenizer.encode("the cat")
    good = run(engine, [ids])[0][0].vector
    engine.runner = Damaged(engine.runner, {1})
    (end,), _ = run(engine, [ids])
    assert end.vector == good and engine.counters["cold_retries"] == 1
    # Twice: the request fails, and the model, asked for a vector of its own, is found sound.
    engine.runner.at = {3, 4}
    (end,), _ = run(engine, [ids])
    assert end.finish is Finish.ERROR and end.vector is None
    assert (engine.counters["self_tests"], engine.counters["corrupted_requests"]) == (1, 1)
    engine.runner.at = set(range(100))
    with pytest.raises(EngineClosed, match="self-test"):
        run(engine, [ids])


def test_a_row_that_fails_fails_alone(folder):
    engine = made(folder).engine
    encoder = engine.runner.encoder
    forward = encoder.forward

    def picky(tokens, query_start, types=None):
        if 7 in tokens.tolist():
            raise ValueError("seven")
        return forward(tokens, query_start, types)

    encoder.forward = picky
    ends, _ = run(engine, [[2, 5, 3], [2, 7, 3], [2, 6, 3]])
    assert [end.finish for end in ends] == [Finish.STOP, Finish.ERROR, Finish.STOP]
    assert "seven" in ends[1].error


def test_an_engine_process_sends_vectors(folder, tmp_path_factory):
    process = EngineProcess(tmp_path_factory.mktemp("e"))

    async def ask():
        remote = RemoteEngine(process.socket)
        await remote.start()
        try:
            facts = await asyncio.wait_for(remote.facts(), 60)
            ids = assemble(str(folder)).tokenizer.encode("the cat runs")
            request = Request(remote.new_id(), (Tokens(tuple(ids)),), SamplingParams(max_tokens=1), Kind.EMBED)
            return facts, [chunk async for chunk in remote.submit(request)], ids
        finally:
            await remote.close()

    config = process.folder / "engine.json"
    config.write_text(f'{{"model": "{folder}"}}')
    command = [
        sys.executable,
        "-m",
        "millstream.engine.process",
        "--socket",
        str(process.socket),
        "--config",
        str(config),
    ]
    process.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        eventually(process.socket.exists, "the socket")
        facts, chunks, ids = asyncio.run(ask())
    finally:
        process.end()
    assert facts.vectors["width"] == 48
    assert len(chunks) == 1 and chunks[0].vector == run(made(folder).engine, [ids])[0][0].vector


# -- offline


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder)) as opened:
        yield opened


def test_embed_gives_a_vector_of_length_one_for_each_text(llm):
    outputs = llm.embed(TEXTS)
    assert [out.prompt for out in outputs] == TEXTS
    for out in outputs:
        assert out.prompt_token_ids == llm.tokenizer.encode(out.prompt)
        assert len(out.embedding) == 48 and math.isclose(math.fsum(x * x for x in out.embedding), 1.0, rel_tol=1e-5)
    assert llm.embed("the cat runs")[0].embedding == outputs[0].embedding
    assert llm.embed(outputs[0].prompt_token_ids)[0].embedding == outputs[0].embedding
    short = llm.embed("the cat runs", dimensions=7)[0].embedding
    length = math.sqrt(math.fsum(x * x for x in outputs[0].embedding[:7]))
    assert short == pytest.approx([x / length for x in outputs[0].embedding[:7]], abs=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda llm: llm.embed(["the cat", ""]), r"texts\[1\]"),
        (lambda llm: llm.embed(["   "]), r"texts\[0\].*at least one token"),
        (lambda llm: llm.embed(["the cat " * 60]), r"texts\[0\].*122 tokens.*at most 96"),
        (lambda llm: llm.embed([[5, 10**6]]), "token ids"),
        (lambda llm: llm.embed("a", dimensions=0), "dimensions.*1 to 48"),
        (lambda llm: llm.embed("a", dimensions=49), "dimensions"),
        (lambda llm: llm.embed("a", dimensions=True), "dimensions"),
        (lambda llm: llm.similarity(["a", "b"], ["a", "b", "c"]), "3 texts"),
        (lambda llm: llm.rerank("a", []), "documents"),
        (lambda llm: llm.rerank("a", "b"), "documents"),
        (lambda llm: llm.rerank("a", ["b"], top_n=0), "top_n"),
        (lambda llm: llm.generate("a"), "allowed is embed"),
        (lambda llm: llm.score("a"), "allowed is embed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(llm, call, told):
    with pytest.raises(BadRequest, match=told):
        call(llm)


def test_texts_are_compared_by_the_cosine_of_their_vectors(llm):
    first, *others = (out.embedding for out in llm.embed(TEXTS))
    want = [math.fsum(a * b for a, b in zip(first, other, strict=True)) for other in others]
    got = llm.similarity(TEXTS[0], TEXTS[1:])
    assert got == pytest.approx(want, abs=1e-6) and got[3] == pytest.approx(1.0)
    assert llm.similarity(TEXTS[:2], TEXTS[:2]) == pytest.approx([1.0, 1.0])
    ranked = llm.rerank(TEXTS[0], TEXTS[1:], top_n=3)
    assert [one.index for one in ranked] == sorted(range(5), key=lambda place: -got[place])[:3]
    assert ranked[0].document == TEXTS[0] and ranked[0].score == got[3]


def test_a_cross_encoder_scores_pairs(tmp_path):
    with LLM(str(tiny_encoder.write(tmp_path, labels=1))) as llm:
        scores = llm.similarity("the cat", ["the dog", "paris"])
        assert all(0 < score < 1 for score in scores) and scores[0] != scores[1]
        pair = llm.tokenizer.encode_pair("the cat", "paris")
        assert pair == [*llm.tokenizer.encode("the cat"), *llm.tokenizer.encode("paris")[1:]]
        # The second text is of the second type: it makes a difference.
        (logit,) = llm.embed([pair])[0].embedding
        assert vectors.probability(logit) == scores[1]
        llm.assembled.built.runner.pair_id = None
        assert llm.embed([pair])[0].embedding != [logit]
    with (
        LLM(str(tiny_encoder.write(tmp_path / "three", labels=3))) as llm,
        pytest.raises(BadRequest, match="3 labels"),
    ):
        llm.similarity("a", "b")


def test_a_text_that_fails_raises(llm, monkeypatch):
    runner = llm.assembled.built.runner
    monkeypatch.setattr(runner.encoder, "vectors", lambda rows, start: 1 / 0)
    with pytest.raises(RequestFault, match="ZeroDivisionError"):
        llm.embed(["the cat", "a dog"])


# -- what is done with vectors


def test_vectors_are_packed_as_they_are_sent():
    data = struct.pack("<3f", 1.0, -2.5, 3.25)
    vector = vectors.floats(data)
    assert list(vector) == [1.0, -2.5, 3.25]
    assert base64.b64decode(vectors.in_base64(vector)) == data


def test_cosines_stay_in_bounds_and_nothing_is_like_nothing():
    one, none = vectors.floats(struct.pack("<2f", 3.0, 4.0)), vectors.floats(struct.pack("<2f", 0.0, 0.0))
    assert vectors.similarity(one, one) == 1.0 and vectors.similarity(one, none) == 0.0
    assert list(vectors.shortened(none, 1)) == [0.0]
    assert [vectors.probability(x) for x in (0.0, 800.0, -800.0)] == [0.5, 1.0, 0.0]
    assert vectors.best([0.1, 0.9, 0.9, 0.5], 3) == [(1, 0.9), (2, 0.9), (3, 0.5)]
