"""The routes of embeddings, rerank and score."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.errors import BadRequest, Told
from millstream.engine.vectors import best, check_dimensions, check_pairs, in_base64, shortened
from millstream.serve.body import read
from millstream.serve.caller import caller_of
from millstream.serve.openai.shapes import IGNORED, Timed, slo_of
from millstream.serve.service import Job, Served, Service
from millstream.serve.sse import while_there
from millstream.serve.vectors import Prompt, Text, parts_of, pick, prompts_of, scores_of, vectors_of

MAX_INPUTS = 2048
FORMATS = ("float", "base64")

_encode = msgspec.json.encode


class VectorAsk(Timed, kw_only=True):
    """What every body here may have. Of texts with more than `truncate_prompt_tokens` the first so many are taken."""

    truncate_prompt_tokens: int | None = None


class EmbeddingAsk(VectorAsk, kw_only=True):
    """The body of `POST /v1/embeddings`, as OpenAI has it."""

    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None


class RerankAsk(VectorAsk, kw_only=True):
    """The body of `POST /v1/rerank`, as Jina and Cohere have it; a document may be an object with a `text`."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | None = None


class ScoreAsk(VectorAsk, kw_only=True):
    """The body of `POST /v1/score`, as vLLM has it: one text against each of several, or several pairs."""

    text_1: str | list[str]
    text_2: str | list[str]


A = TypeVar("A", bound=VectorAsk)


def routes(services: Sequence[Service]) -> list[Route]:
    """For the API's app. `services` are those of all models, the last one the likeliest to give vectors.

    Handlers raise errors of the tree and msgspec's.
    """
    last = services[-1]

    async def embeddings(request: Request) -> Response:
        ask = await taken(request, EmbeddingAsk)
        kind = ask.encoding_format or "float"
        if kind not in FORMATS:
            raise BadRequest("encoding_format", kind, " or ".join(FORMATS))
        texts = _inputs(ask.input)
        service, served = pick(services, ask.model, caller_of(request).rights)
        for text in texts:
            if not isinstance(text.value, str):
                service.check_ids(list(text.value), served, text.param, caller_of(request).rights)
        check_dimensions(ask.dimensions, served.facts.vectors)
        prompts = await prompts_of(service, served, texts, ask.truncate_prompt_tokens)
        found = await compute(request, service, served, ask, prompts)
        pack: Callable[[array[float]], Any] = in_base64 if kind == "base64" else list
        data = [
            {"object": "embedding", "index": place, "embedding": pack(shortened(vector, ask.dimensions))}
            for place, vector in enumerate(found)
        ]
        return _json({"object": "list", "data": data, "model": ask.model or served.name, **_told(ask, prompts)})

    async def rerank(request: Request) -> Response:
        ask = await taken(request, RerankAsk)
        if ask.top_n is not None and ask.top_n < 1:
            raise BadRequest("top_n", ask.top_n, "an integer from 1")
        _check_count("documents", ask.documents)
        texts = [_document(f"documents[{place}]", one) for place, one in enumerate(ask.documents)]
        service, served = pick(services, ask.model, caller_of(request).rights)
        scores, prompts = await compare(request, service, served, ask, [Text("query", ask.query)], texts)
        results: list[dict[str, Any]] = []
        for place, score in best(scores, ask.top_n):
            results.append({"index": place, "relevance_score": score})
            if ask.return_documents is not False:
                results[-1]["document"] = {"text": texts[place].value}
        return _json(
            {"id": _new_id("rerank"), "model": ask.model or served.name, "results": results, **_told(ask, prompts)}
        )

    async def score(request: Request) -> Response:
        ask = await taken(request, ScoreAsk)
        firsts, seconds = _texts("text_1", ask.text_1), _texts("text_2", ask.text_2)
        if len(firsts) not in (1, len(seconds)):
            raise BadRequest("text_2", Told(f"{len(seconds)} texts"), f"as many as text_1 has ({len(firsts)})")
        service, served = pick(services, ask.model, caller_of(request).rights)
        scores, prompts = await compare(request, service, served, ask, firsts, seconds)
        data = [{"object": "score", "index": place, "score": score} for place, score in enumerate(scores)]
        made = {
            "id": _new_id("score"),
            "object": "list",
            "created": int(time.time()),
            "model": ask.model or served.name,
        }
        return _json({**made, "data": data, **_told(ask, prompts)})

    async def taken(request: Request, kind: type[A]) -> A:
        return await read(request, kind, strict=last.config.strict, ignored=IGNORED)

    async def compare(
        request: Request,
        service: Service,
        served: Served,
        ask: VectorAsk,
        firsts: Sequence[Text],
        seconds: Sequence[Text],
    ) -> tuple[list[float], list[Prompt]]:
        """The scores of pairs, and what was computed for them: each text once, or by a cross-encoder each pair."""
        if len(firsts) == 1:
            firsts = [firsts[0]] * len(seconds)
        pairs = list(zip(firsts, seconds, strict=True))
        if check_pairs(served.facts.vectors):
            texts = [Text(second.param, first.value, str(second.value)) for first, second in pairs]
            places = None
        else:
            once: dict[str, Text] = {}
            for text in (text for pair in pairs for text in pair):
                once.setdefault(str(text.value), text)
            texts = list(once.values())
            at = {text: place for place, text in enumerate(once)}
            places = [(at[str(one.value)], at[str(other.value)]) for one, other in pairs]
        prompts = await prompts_of(service, served, texts, ask.truncate_prompt_tokens)
        found = await compute(request, service, served, ask, prompts)
        return await scores_of(service, found, places), prompts

    async def compute(
        request: Request, service: Service, served: Served, ask: VectorAsk, prompts: Sequence[Prompt]
    ) -> list[array[float]]:
        parts = parts_of(prompts, served.facts.limits.vocab_size)
        config, header = service.config, request.headers.get("x-request-timeout")
        slo = slo_of(ask, header, config.deadline_s or None, config.max_deadline_s or None)
        job = Job(caller_of(request), request.state.call, parts, slo, ask.priority or 0)
        job.call.model, job.call.n, job.call.slo = served.name, len(parts), slo
        found: list[array[float]] = await while_there(request, vectors_of(service, job))
        return found

    return [
        Route(path, last.watch(operation, path)(handler), methods=["POST"])
        for operation, handler, paths in (
            ("embeddings", embeddings, ("/v1/embeddings",)),
            ("rerank", rerank, ("/v1/rerank", "/v2/rerank", "/rerank")),
            ("score", score, ("/v1/score", "/score")),
        )
        for path in paths
    ]


def _inputs(given: str | list[str | int | list[int]]) -> list[Text]:
    """One text, several, the token ids of one, or those of several."""
    if isinstance(given, str):
        return [Text("input", given)]
    if given and all(isinstance(one, int) for one in given):
        return [Text("input", given)]  # type: ignore[arg-type]
    _check_count("input", given)
    kind = type(given[0])
    texts = []
    for place, one in enumerate(given):
        if type(one) is not kind or isinstance(one, int):
            raise BadRequest(f"input[{place}]", one, "texts only, token ids only, or lists of token ids only")
        texts.append(Text(f"input[{place}]", one))
    return texts


def _texts(param: str, given: str | list[str]) -> list[Text]:
    if isinstance(given, str):
        return [Text(param, given)]
    _check_count(param, given)
    return [Text(f"{param}[{place}]", one) for place, one in enumerate(given)]


def _document(param: str, given: str | dict[str, Any]) -> Text:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise BadRequest(param, given, "a text, or an object with a text")
    return Text(param, text)


def _check_count(param: str, given: Sequence[Any]) -> None:
    if not 1 <= len(given) <= MAX_INPUTS:
        raise BadRequest(param, Told(f"a list of {len(given)}"), f"a list of 1 to {MAX_INPUTS}")


def _told(ask: VectorAsk, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What every answer says at its end: what was computed, and which texts were cut where cutting was asked for."""
    tokens = sum(len(prompt.ids) for prompt in prompts)
    told: dict[str, Any] = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    if ask.truncate_prompt_tokens is not None:
        told["truncated"] = [prompt.param for prompt in prompts if prompt.cut]
    return told


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}"


def _json(value: Any) -> Response:
    return Response(_encode(value), media_type="application/json")
