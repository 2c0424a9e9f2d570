"""The routes of embeddings, rerank and score over a tiny encoder: what is answered, and what is refused by name."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

import tiny_encoder
from millstream.core.errors import BadRequest, MillstreamError
from millstream.core.request import Kind, Slo
from millstream.engine.llm import AsyncLLM
from millstream.engine.vectors import probability
from millstream.serve.caller import ALL_RIGHTS, Caller, Overloaded
from millstream.serve.errors import told
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Observatory
from millstream.serve.records import Record, log_line
from millstream.serve.service import ApiConfig, Service
from millstream.serve.vector_routes import MAX_INPUTS, routes

TEXTS = ["the cat runs", "paris is the capital of france", "a", "dog dog dog dog dog dog dog", "Berlin?"]


class Gate:
    """Counts, and can be shut."""

    def __init__(self) -> None:
        self.inside, self.served, self.shut = 0, 0, False

    def look(self, caller: Caller) -> None:
        if self.shut:
            raise Overloaded("queue_full", "there is no room", 3.0)

    def enter(self, caller: Caller, tokens: int, requests: int, slo: Slo) -> Seat:
        self.look(caller)
        assert requests == 1, "thousands of texts are one request, and as long as they are"
        self.inside += 1
        return Seat(self, tokens)


class Seat:
    def __init__(self, gate: Gate, tokens: int) -> None:
        self.gate, self.tokens, self.here = gate, tokens, True

    def first_token(self) -> None:
        assert self.here
        self.gate.served += self.tokens

    def leave(self) -> None:
        self.gate.inside -= self.here
        self.here = False


class Bench:
    """A service over an encoder of this process, and a client of its routes. `beside` are services beside it."""

    def __init__(self, folder: Path, beside: tuple[Service, ...] = (), **config: Any) -> None:
        self.gate, self.watched = Gate(), Observatory(Metrics("tiny", 96, process=False))
        self.records: list[Record] = []
        ended = self.watched.ended
        self.watched.ended = lambda record: (self.records.append(record), ended(record))[1]  # type: ignore[method-assign]
        self.llm = AsyncLLM(str(folder))
        self.service = Service(self.llm.client, self.watched, self.gate, ApiConfig(model_names=("tiny",), **config))
        self.service.take(asyncio.run(self.llm.client.facts()), self.llm.tokenizer)
        self.service.beside = beside
        self.caller: dict[str, Any] = {}
        self.number = 0
        paths = routes((*beside, self.service))
        inner = Starlette(routes=paths, exception_handlers=dict.fromkeys((MillstreamError, msgspec.MsgspecError), told))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.number += 1
            scope.setdefault("state", {})["caller"] = Caller(f"{self.number:032x}", **self.caller)
            await inner(scope, receive, send)

        self.app = app

    def ask(self, path: str, **body: Any) -> Any:
        """The answer, which has the status 200."""
        status, answer = asyncio.run(self.post(path, body))
        assert status == 200, answer
        return answer

    def refused(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        got, answer = asyncio.run(self.post(path, body))
        assert got == status, answer
        assert self.gate.inside == 0
        error: dict[str, Any] = answer["error"]
        return error

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            given = {"content-type": "application/json", **headers}
            # As json.dumps writes it, lone surrogates are escaped.
            answer = await client.post(path, content=json.dumps(body), headers=given)
            return answer.status_code, answer.json()

    def vectors(self, texts: Any, **body: Any) -> list[list[float]]:
        return [one["embedding"] for one in self.ask("/v1/embeddings", input=texts, **body)["data"]]

    def close(self) -> None:
        self.service.close()
        asyncio.run(self.llm.close())


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Bench]:
    bench = Bench(tiny_encoder.write(tmp_path_factory.mktemp("encoder")))
    yield bench
    bench.close()


@pytest.fixture
def bench(shared) -> Iterator[Bench]:
    shared.caller, shared.gate.shut = {}, False
    shared.records.clear()
    yield shared
    assert shared.gate.inside == 0, "a place was not given back"


# -- embeddings


def test_vectors_are_those_of_the_model_alone_and_in_company(bench):
    answer = bench.ask("/v1/embeddings", input=TEXTS, model="tiny")
    ids = [bench.llm.tokenizer.encode(text) for text in TEXTS]
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    together = [one["embedding"] for one in answer["data"]]
    for text, tokens, vector in zip(TEXTS, ids, together, strict=True):
        assert len(vector) == 48 and math.fsum(x * x for x in vector) == pytest.approx(1.0, abs=1e-5)
        assert bench.vectors(text) == bench.vectors([text]) == bench.vectors(tokens) == [vector], "to the bit"
    assert bench.vectors(ids) == bench.vectors(TEXTS * 40)[-len(TEXTS) :] == together
    assert len({tuple(vector) for vector in together}) == len(TEXTS)


def test_base64_is_the_same_vector_in_float32(bench):
    packed = bench.vectors(TEXTS, encoding_format="base64")
    assert [list(struct.unpack("<48f", base64.b64decode(one))) for one in packed] == bench.vectors(TEXTS)


def test_fewer_dimensions_have_length_one_again(bench):
    whole, short = bench.vectors(TEXTS), bench.vectors(TEXTS, dimensions=7)
    for one, other in zip(whole, short, strict=True):
        length = math.sqrt(math.fsum(x * x for x in one[:7]))
        assert other == pytest.approx([x / length for x in one[:7]], abs=1e-6)
    assert bench.vectors(TEXTS, dimensions=48) == whole


def test_what_is_longer_than_the_model_takes_is_refused_or_cut_where_that_is_asked_for(bench):
    long = "the cat " * 60
    error = bench.refused("/v1/embeddings", input=["a", long])
    assert error["param"] == "input[1]" and "122 tokens" in error["message"]
    assert "at most 96" in error["message"] and "truncate_prompt_tokens" in error["message"]
    ids = bench.llm.tokenizer.encode(long)
    cut = [*ids[:95], ids[-1]]
    answer = bench.ask("/v1/embeddings", input=["a", long], truncate_prompt_tokens=-1)
    assert answer["truncated"] == ["input[1]"] and answer["usage"]["prompt_tokens"] == 3 + 96
    assert answer["data"][1]["embedding"] == bench.vectors(cut)[0]
    answer = bench.ask("/v1/embeddings", input=["a", "the cat runs"], truncate_prompt_tokens=4)
    assert answer["truncated"] == ["input[1]"]
    assert answer["data"][1]["embedding"] == bench.vectors("the cat")[0]
    # Token ids that do not end as texts end are cut where they are.
    assert bench.vectors([2, 5, 6, 7], truncate_prompt_tokens=3) == bench.vectors([2, 5, 6])
    for wrong in (0, 2, 97, -2):
        told_of = bench.refused("/v1/embeddings", input="a", truncate_prompt_tokens=wrong)
        assert told_of["param"] == "truncate_prompt_tokens" and "3 to 96" in told_of["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "input"),
        ({"input": ""}, "input", "at least one token"),
        ({"input": " \t\n"}, "input", "at least one token"),
        ({"input": ["a", ""]}, "input[1]", "at least one token"),
        ({"input": []}, "input", "list of 0"),
        ({"input": [[]]}, "input[0]", "at least one token"),
        ({"input": ["a", [5]]}, "input[1]", "texts only"),
        ({"input": ["a", 5]}, "input[1]", "texts only"),
        ({"input": [5, "a"]}, "input[0]", "texts only"),
        ({"input": [[5], "a"]}, "input[1]", "texts only"),
        ({"input": [5, 10**6]}, "input", "token ids from 0"),
        ({"input": [[5], [-1]]}, "input[1]", "token ids from 0"),
        ({"input": [True]}, "input[0]", None),
        ({"input": [1.5]}, "input[0]", None),
        ({"input": {"text": "a"}}, "input", None),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "list of 2049"),
        ({"input": [5] * 97}, "input", "97 tokens"),
        ({"input": "a", "dimensions": 0}, "dimensions", "1 to 48"),
        ({"input": "a", "dimensions": 49}, "dimensions", "1 to 48"),
        ({"input": "a", "dimensions": "7"}, "dimensions", None),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64"),
        ({"input": "a", "priority": 1.5}, "priority", None),
        ({"input": "a", "deadline_s": -1}, "deadline_s", None),
    ],
)
def test_embeddings_refuse_by_name(bench, body, param, said):
    error = bench.refused("/v1/embeddings", **body)
    assert error["param"] == param and (said is None or said in error["message"])
    assert error["type"] == "invalid_request_error"


def test_the_most_texts_that_a_request_may_have(bench):
    texts = [f"the cat runs {i % 7}" for i in range(MAX_INPUTS)]
    served = bench.gate.served
    answer = bench.ask("/v1/embeddings", input=texts, encoding_format="base64")
    assert bench.gate.served - served == answer["usage"]["prompt_tokens"]
    found = [one["embedding"] for one in answer["data"]]
    assert len(found) == MAX_INPUTS and found[:7] == found[7:14] and len(set(found)) == 7
    (record,) = bench.records
    assert (record.status, record.n, record.prompt_tokens) == (200, MAX_INPUTS, answer["usage"]["prompt_tokens"])
    assert log_line(record)["finish"] == f"{MAX_INPUTS}*stop"


# -- rerank and score

DOCUMENTS = ["a red house", "the cat runs", "the dog runs", "paris"]


def cosine(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_by_the_cosine_to_the_query(bench, path):
    answer = bench.ask(path, query="the cat runs", documents=DOCUMENTS, model="tiny")
    query, *others = bench.vectors(["the cat runs", *DOCUMENTS])
    want = [cosine(query, other) for other in others]
    order = sorted(range(4), key=lambda place: -want[place])
    assert answer["id"].startswith("rerank-") and len(answer["id"]) == len("rerank-") + 32
    assert [one["index"] for one in answer["results"]] == order and order[0] == 1
    assert [one["relevance_score"] for one in answer["results"]] == pytest.approx([want[i] for i in order], abs=1e-6)
    assert [one["document"] for one in answer["results"]] == [{"text": DOCUMENTS[i]} for i in order]
    # The query is one of the documents, and is computed once.
    assert answer["usage"]["total_tokens"] == sum(len(bench.llm.tokenizer.encode(text)) for text in DOCUMENTS)


def test_a_ranking_can_be_short_and_without_its_documents(bench):
    given = [{"text": DOCUMENTS[0], "title": "x"}, *DOCUMENTS[1:]]
    results = bench.ask("/v1/rerank", query="dog", documents=given, top_n=2, return_documents=False)["results"]
    whole = bench.ask("/v1/rerank", query="dog", documents=DOCUMENTS, top_n=100)["results"]
    assert [set(one) for one in results] == [{"index", "relevance_score"}] * 2 and len(whole) == 4
    assert [one["index"] for one in results] == [one["index"] for one in whole[:2]]


def test_scores_are_of_one_against_many_or_of_pairs(bench):
    answer = bench.ask("/v1/score", text_1="the cat runs", text_2=DOCUMENTS)
    assert answer["object"] == "list" and [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    ranked = {
        one["index"]: one["relevance_score"]
        for one in bench.ask("/v1/rerank", query="the cat runs", documents=DOCUMENTS)["results"]
    }
    assert [one["score"] for one in answer["data"]] == [ranked[i] for i in range(4)]
    assert answer["data"][1]["score"] == pytest.approx(1.0)
    pairs = bench.ask("/score", text_1=DOCUMENTS, text_2=DOCUMENTS[::-1])["data"]
    assert [one["score"] for one in pairs] == pytest.approx([one["score"] for one in pairs[::-1]])
    (one,) = bench.ask("/score", text_1="a", text_2="a")["data"]
    assert one == {"object": "score", "index": 0, "score": pytest.approx(1.0)}
    # Many are scored aside from the event loop, with the same result.
    many = bench.ask("/v1/score", text_1="the cat runs", text_2=DOCUMENTS * 60)["data"]
    assert [one["score"] for one in many[:4]] == [one["score"] for one in many[-4:]] == [ranked[i] for i in range(4)]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a", ""]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": ["a", {"title": "b"}]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": 5}]}, "documents[0]"),
        ("/v1/rerank", {"query": "a", "documents": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 100_000}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["the cat " * 60]}, "documents[0]"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_2"),
        ("/v1/score", {"text_1": [], "text_2": []}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", " "]}, "text_2[1]"),
    ],
)
def test_rankings_and_scores_refuse_by_name(bench, path, body, param):
    assert bench.refused(path, **body)["param"] == param


def test_a_cross_encoder_scores_each_pair(tmp_path):
    bench = Bench(tiny_encoder.write(tmp_path, labels=1))
    try:
        answer = bench.ask("/v1/score", text_1="the cat", text_2=["the dog", "paris"])
        tokenizer = bench.llm.tokenizer
        pairs = [tokenizer.encode_pair("the cat", text) for text in ("the dog", "paris")]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, pairs))
        want = [probability(logit) for (logit,) in bench.vectors(pairs)]
        assert [one["score"] for one in answer["data"]] == want and want[0] != want[1]
        assert bench.refused("/v1/score", text_1="the cat", text_2=["dog", " "])["param"] == "text_2[1]"
        # Of a pair the second text is cut, never the first.
        ranked = bench.ask("/rerank", query="the cat", documents=["dog runs"], truncate_prompt_tokens=6)
        assert ranked["truncated"] == ["documents[0]"]
        (logit,) = bench.vectors([tokenizer.encode_pair("the cat", "dog")])[0]
        assert ranked["results"][0]["relevance_score"] == probability(logit)
        assert "room" in bench.refused("/rerank", query="the cat", documents=["a"], truncate_prompt_tokens=5)["message"]
    finally:
        bench.close()


# -- who asks, and of what


def test_one_record_a_request_whatever_becomes_of_it(bench):
    bench.caller = {"tenant": "acme", "label": "mine"}
    bench.ask("/v1/embeddings", input=TEXTS)
    bench.refused("/v1/embeddings", input="")
    bench.refused("/v1/rerank", query="a", documents=[])
    bench.gate.shut = True
    bench.refused("/v2/rerank", 429, query="a", documents=["b"])
    said = [(one.operation, one.route, one.status, one.tenant, one.label, one.shed) for one in bench.records]
    assert said == [
        ("embeddings", "/v1/embeddings", 200, "acme", "mine", ""),
        ("embeddings", "/v1/embeddings", 400, "acme", "mine", ""),
        ("rerank", "/v1/rerank", 400, "acme", "mine", ""),
        ("rerank", "/v2/rerank", 429, "acme", "mine", "queue_full"),
    ]
    assert bench.records[0].model == "tiny" and bench.records[0].n == len(TEXTS)


def test_the_same_label_from_two_clients_mixes_nothing_up(bench):
    async def both() -> list[Any]:
        asks = [{"query": query, "documents": [query, *DOCUMENTS]} for query in ("the cat runs", "paris is blue")]
        return await asyncio.gather(*(bench.post("/v1/rerank", ask) for ask in asks for _ in range(8)))

    bench.caller = {"label": "the same"}
    answers = [answer for _, answer in asyncio.run(both())]
    best = [answer["results"][0]["document"]["text"] for answer in answers]
    assert best == ["the cat runs"] * 8 + ["paris is blue"] * 8


WORDS = st.sampled_from(
    ["", " ", "a", "the cat", "\ud800", "\x00", "[SEP]", "é" * 40, "dog " * 200, 5, 10**9, -1, None, True, 1.5]
)
LISTS = st.lists(WORDS | st.lists(WORDS, max_size=3), max_size=4)
ANY = WORDS | LISTS | st.dictionaries(st.sampled_from(["text", "x"]), WORDS, max_size=2)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("input", "query", "documents", "text_1", "text_2"), ANY),
        **dict.fromkeys(("encoding_format", "dimensions", "top_n", "return_documents", "priority", "model"), WORDS),
        "truncate_prompt_tokens": st.sampled_from([None, -1, 0, 3, 96, 97, "x"]),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/v1/embeddings", "/v1/rerank", "/v1/score"]), BODIES)
def test_no_body_fails_on_the_side_of_the_server(bench, path, body):
    status, answer = asyncio.run(bench.post(path, body))
    assert status in (200, 400, 404), answer
    assert bench.gate.inside == 0 and ("error" in answer) == (status != 200)


def test_a_deadline_that_passed_is_told(bench):
    error = bench.refused("/v1/embeddings", 504, input=TEXTS * 20, deadline_s=1e-9)
    assert error["code"] == "deadline_passed"


def test_a_failure_in_the_engine_is_told_and_ends_the_rest(bench, monkeypatch):
    encoder = bench.llm.assembled.built.runner.encoder
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "vectors", lambda rows, start: 1 / 0)
        error = bench.refused("/v1/embeddings", 500, input=TEXTS * 50)
    assert error["code"] == "request_failed"
    assert len(bench.vectors(TEXTS)) == len(TEXTS)


def test_who_leaves_ends_what_is_computed_for_it(bench):
    texts = [TEXTS[3] * 2] * MAX_INPUTS

    async def leave() -> None:
        body = msgspec.json.encode({"input": texts})
        told_of = asyncio.Queue[dict[str, Any]]()
        told_of.put_nowait({"type": "http.request", "body": body, "more_body": False})
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers, "query_string": b""}

        async def send(message: Any) -> None:
            pass

        running = asyncio.ensure_future(bench.app(scope, told_of.get, send))
        while not bench.gate.inside:
            await asyncio.sleep(0.001)
        told_of.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(running, 20)

    asyncio.run(leave())
    assert [one.status for one in bench.records] == [499]
    assert len(bench.vectors("a")) == 1


def test_a_model_is_named_or_found(bench, tmp_path):
    assert "tiny" in bench.refused("/v1/embeddings", 404, input="a", model="other")["message"]
    facts = asyncio.run(bench.llm.client.facts())
    chatty = Service(bench.llm.client, bench.watched, bench.gate, ApiConfig(model_names=("chatty",)))
    both = Bench(tiny_encoder.write(tmp_path), (chatty,))
    try:
        # Nobody knows yet whether the other one has this name.
        assert both.refused("/v1/embeddings", 503, input="a", model="other")["code"] == "engine_away"
        limits = replace(facts.limits, kinds=frozenset({Kind.GENERATE, Kind.SCORE}))
        chatty.take(replace(facts, model="chatty", limits=limits, vectors={}), bench.llm.tokenizer)
        for given in ({}, {"model": "tiny"}):
            assert both.vectors("a", **given) == bench.vectors("a")
        error = both.refused("/v1/embeddings", input="a", model="chatty")
        assert error["param"] == "model" and "/v1/chat/completions" in error["message"]
        told_of = both.refused("/v1/score", 404, text_1="a", text_2="b", model="other")["message"]
        assert "chatty" in told_of and "tiny" in told_of
    finally:
        both.close()
        chatty.close()


def test_an_encoder_says_what_it_is_for(bench):
    with pytest.raises(BadRequest, match="/v1/embeddings, /v1/rerank, /v1/score"):
        bench.service.model("tiny", ALL_RIGHTS)


def test_fields_that_nobody_knows_are_told_or_refused(bench, tmp_path):
    bench.ask("/v1/embeddings", input="a", user="somebody", nonsense=1)
    strict = Bench(tiny_encoder.write(tmp_path), strict=True)
    try:
        strict.ask("/v1/embeddings", input="a", user="somebody")
        assert strict.refused("/v1/embeddings", input="a", dimension=3)["param"] == "dimension"
    finally:
        strict.close()
