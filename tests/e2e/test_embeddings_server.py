"""Embeddings from whole servers: the openai SDK on the real MiniLM, and an encoder beside a model that chats."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tiny_encoder
from millstream.cli.main import main
from real import model_path
from serving import WholeServer, children_of, whole_server
from tiny_files import build_model

PAIRS = [
    ("The cat sat on the mat.", "A feline rested on a rug."),
    ("Interest rates rose by half a point.", "The central bank tightened monetary policy."),
    ("How do I reset my password?", "I forgot my login and cannot sign in."),
    ("Preheat the oven to 180 degrees.", "Bake the bread for forty minutes."),
]
TEXTS = [text for pair in PAIRS for text in pair]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Iterator[WholeServer]:
    words = ("--served-model-name", "minilm", "all-minilm-l6-v2")
    with whole_server(tmp_path_factory.mktemp("minilm"), *words, model=model_path("all-minilm-l6-v2")) as server:
        yield server


@pytest.fixture(scope="module")
def client(minilm) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none", max_retries=0)


def dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def test_the_openai_sdk_gets_the_same_vectors_as_numbers_and_packed(client):
    # Where nothing is said the SDK asks for base64 and unpacks it itself.
    packed = client.embeddings.create(model="minilm", input=TEXTS)
    plain = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert [one.index for one in plain.data] == list(range(len(TEXTS)))
    assert plain.model == "minilm" and plain.usage.prompt_tokens == plain.usage.total_tokens > 6 * len(TEXTS)
    assert all(len(one.embedding) == 384 for one in plain.data)
    vectors = [one.embedding for one in plain.data]
    for place in range(0, len(TEXTS), 2):
        for own, other in ((place, place + 1), (place + 1, place)):
            nearest = max((i for i in range(len(TEXTS)) if i != own), key=lambda i: dot(vectors[own], vectors[i]))
            assert nearest == other, f"{TEXTS[own]!r} is nearest to {TEXTS[nearest]!r}"
    for text, vector in zip(TEXTS, vectors, strict=True):
        alone = client.embeddings.create(model="minilm", input=text, encoding_format="float").data[0].embedding
        assert alone == vector, "to the bit"
    short = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=64).data[0].embedding
    assert len(short) == 64 and dot(short, short) == pytest.approx(1.0, abs=1e-5)


def test_texts_of_all_lengths_at_once_have_the_bits_that_they_have_alone(client):
    texts = [("word " * (1 + (37 * i) % 250)).strip() for i in range(40)]
    together = client.embeddings.create(model="minilm", input=texts)
    for place in range(0, 40, 9):
        alone = client.embeddings.create(model="minilm", input=texts[place])
        assert alone.data[0].embedding == together.data[place].embedding


def test_what_is_too_long_or_empty_is_told_by_name(client):
    import openai

    with pytest.raises(openai.BadRequestError, match=r"input\[1\].*302 tokens.*at most 256"):
        client.embeddings.create(model="minilm", input=["a", "word " * 300])
    with pytest.raises(openai.BadRequestError, match=r"input.*at least one token"):
        client.embeddings.create(model="minilm", input="")
    with pytest.raises(openai.NotFoundError, match="minilm"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    extra = {"truncate_prompt_tokens": -1}
    cut = client.embeddings.create(model="minilm", input=["a", "word " * 300], extra_body=extra)
    whole = client.embeddings.create(model="minilm", input="word " * 254)
    assert cut.model_extra["truncated"] == ["input[1]"] and cut.data[1].embedding == whole.data[0].embedding


def test_chats_are_refused_with_what_the_model_is_for(client, minilm):
    import openai

    with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
        client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])
    assert minilm.post("/v1/completions", {"prompt": "hi"}).error["param"] == "model"
    assert minilm.get("/health/deep").json["status"] == "computed"


def test_langchain_embeds(minilm):
    langchain_openai = pytest.importorskip("langchain_openai")
    embeddings = langchain_openai.OpenAIEmbeddings(
        base_url=f"{minilm.url}/v1", api_key="none", model="minilm", check_embedding_ctx_length=False
    )
    query, documents = embeddings.embed_query(TEXTS[0]), embeddings.embed_documents(TEXTS[:2])
    assert query == documents[0] and dot(*documents) > 0.4


def test_documents_are_ranked_as_people_would(minilm):
    documents = [second for _, second in PAIRS]
    for place, (query, _) in enumerate(PAIRS):
        best = minilm.post("/v1/rerank", {"query": query, "documents": documents, "top_n": 1}).json["results"]
        assert [one["index"] for one in best] == [place]


# -- beside a model that chats


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """Kernels are compiled once."""
    return {"MILLSTREAM_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def both(home, tmp_path_factory) -> Iterator[WholeServer]:
    folder = tmp_path_factory.mktemp("both")
    words = ("--served-model-name", "chatty", "--embedding-model", str(tiny_encoder.write(folder / "encoder")))
    with whole_server(folder, *words, environment=home) as server:
        yield server


def encoder_of(server: WholeServer) -> str:
    return next(one["id"] for one in server.get("/v1/models").json["data"] if one["kinds"] == ["embed"])


def test_each_route_finds_the_model_that_can_do_it(both):
    listed = {one["id"]: one["kinds"] for one in both.get("/v1/models").json["data"]}
    encoder = encoder_of(both)
    assert listed["chatty"] == ["generate", "score"] and both.get("/v1/models/chatty").status == 200
    assert both.chat().status == both.chat(model="chatty").status == 200
    vector = both.post("/v1/embeddings", {"input": "the cat"}).json["data"][0]["embedding"]
    named = both.post("/v1/embeddings", {"input": "the cat", "model": encoder}).json
    assert named["data"][0]["embedding"] == vector and named["model"] == encoder
    assert "/v1/chat/completions" in both.post("/v1/embeddings", {"input": "a", "model": "chatty"}).error["message"]
    assert "/v1/embeddings" in both.chat(model=encoder).error["message"]
    for answer in (both.chat(model="other"), both.post("/v1/score", {"text_1": "a", "text_2": "b", "model": "other"})):
        assert answer.status == 404 and "chatty" in answer.error["message"] and encoder in answer.error["message"]
    tokens = {name: both.post("/tokenize", {"prompt": "the cat", "model": name}).json for name in ("chatty", encoder)}
    assert tokens[encoder]["max_model_len"] == 96 and len(tokens[encoder]["tokens"]) == 4 < tokens["chatty"]["count"]


def test_both_are_asked_at_once(both):
    texts = ["the cat runs", "paris is the capital of france"] * 300
    found: dict[str, Any] = {}
    asks = {
        "vectors": lambda: both.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}),
        "chat": lambda: both.chat(max_tokens=40),
    }
    threads = [threading.Thread(target=lambda n=name, a=ask: found.update({n: a()})) for name, ask in asks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found["chat"].status == found["vectors"].status == 200
    assert len({one["embedding"] for one in found["vectors"].json["data"]}) == 2
    timeline = both.get(f"/v1/requests/{found['vectors'].headers['x-millstream-request-id']}/timeline")
    assert timeline.status == 200


def test_an_engine_that_is_lost_takes_nobody_else_along(both):
    def engines() -> dict[int, str]:
        return {pid: line for pid, line in children_of(both.process.pid).items() if "millstream.engine.process" in line}

    vector = both.post("/v1/embeddings", {"input": "the cat"}).json["data"]
    (second,) = [pid for pid, line in engines().items() if "embedding.sock" in line]
    os.kill(second, signal.SIGKILL)
    both.until(lambda: both.status("/ready") == 503, "the loss is noticed")
    assert both.chat().status == 200
    both.until(lambda: both.status("/ready") == 200, "the engine is back")
    both.pids()
    assert second not in engines() and both.post("/v1/embeddings", {"input": "the cat"}).json["data"] == vector


def test_both_engines_end_with_the_server(home, tmp_path):
    words = ("--embedding-model", str(tiny_encoder.write(tmp_path / "encoder")))
    with whole_server(tmp_path, *words, environment=home) as server:
        assert len(children_of(server.process.pid)) == 3
        found: list[Any] = []
        ask = {"input": ["the cat runs"] * 1500, "encoding_format": "base64"}
        thread = threading.Thread(target=lambda: found.append(server.post("/v1/embeddings", ask)))
        thread.start()
        server.until(lambda: server.get("/load").json["server_load"] > 100, "the texts are inside")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        thread.join(20)
        assert found[0].status == 200 and len(found[0].json["data"]) == 1500, "what was inside is finished first"


# -- without a server


def test_an_embedding_model_must_give_vectors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    encoder = tiny_encoder.write(tmp_path / "encoder")
    chatty = build_model(tmp_path / "chatty")
    assert main(["serve", str(chatty), "--port", "0", "--embedding-model", str(chatty)]) == 1
    assert "gives no vectors; all-minilm-l6-v2" in capsys.readouterr().err
    assert main(["serve", str(chatty), "--embedding-model", str(encoder), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["embedding"]["model"] == str(encoder)


def test_run_batch_embeds(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_HOME", home["MILLSTREAM_HOME"])
    encoder = tiny_encoder.write(tmp_path / "encoder")
    asks = [
        ("/v1/embeddings", {"input": ["the cat", "paris"]}),
        ("/v1/rerank", {"query": "the cat", "documents": ["paris", "the cat"]}),
        ("/v1/score", {"text_1": "cat", "text_2": ["the cat", "paris"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body})
        for i, (url, body) in enumerate(asks)
    ]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(lines))
    assert main(["run-batch", str(encoder), "-i", str(given), "-o", str(out)]) == 1
    answers = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    assert [one["status_code"] for one in answers] == [200, 200, 200, 400]
    assert len(answers[0]["body"]["data"][0]["embedding"]) == 48
    assert answers[1]["body"]["results"][0]["index"] == 1
