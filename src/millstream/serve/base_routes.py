"""What a server says of itself: whether it lives, is ready and computes, its version, its load and its model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import millstream
from millstream.core.client import EngineClient, ModelFacts
from millstream.core.errors import EngineClosed, UnknownModel
from millstream.core.request import Kind, SamplingParams, Slo, Tokens
from millstream.core.request import Request as Ask
from millstream.core.sequence import Finish
from millstream.serve.caller import caller_of
from millstream.serve.policy import ModelCard, ModelList

DEEP_S = 10.0
NO_STORE = {"Cache-Control": "no-store"}
RETRY = {"Retry-After": "1"}

Names = Callable[[], Awaitable[Sequence[tuple[ModelFacts, Sequence[str]]]]]
"""The facts of each model and all of its names, that of `client` first. Raises EngineAway while that is not there."""


def routes(
    client: EngineClient,
    names: Names,
    ready: Callable[[], Awaitable[bool]],
    draining: Callable[[], bool],
    load: Callable[[], Awaitable[dict[str, Any]]],
) -> list[Route]:
    """For the API's app. `ready`: whether a request sent now would be served. `load`: numbers of requests."""
    started = int(time.time())

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def get_ready(request: Request) -> Response:
        if await ready():
            return _json({"status": "ready"})
        status = "draining" if draining() else "the engine is not there"
        return _json({"status": status}, 503, RETRY)

    async def deep(request: Request) -> Response:
        began = time.monotonic()
        status = await compute(request)
        took_s = round(time.monotonic() - began, 4)
        good = status in ("computed", "busy")
        return _json({"status": status, "seconds": took_s}, 200 if good else 503, {} if good else RETRY)

    async def compute(request: Request) -> str:
        """Asks for one token, in steps that nobody else needs: "computed", "busy" with others, or what is wrong."""
        try:
            before = await _steps(client)
            facts = (await names())[0][0]
            kind = Kind.GENERATE if Kind.GENERATE in facts.limits.kinds else Kind.EMBED
            ask = Ask(
                client.new_id(),
                (Tokens((0,)),),
                SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
                kind=kind,
                slo=Slo(deadline_s=DEEP_S),
                background=True,
                cache_salt=caller_of(request).request_id,
            )
            async with asyncio.timeout(DEEP_S):
                async for chunk in client.submit(ask):
                    if chunk.finish is Finish.ERROR:
                        return "failed"
                    if chunk.finish not in (None, Finish.TIMEOUT, Finish.ABORT):
                        return "computed"
        except TimeoutError:
            pass
        except EngineClosed:
            return "the engine is not there"
        # Others may have had all of its steps.
        try:
            return "busy" if await _steps(client) > before else "stuck"
        except EngineClosed:
            return "the engine is not there"

    async def version(request: Request) -> Response:
        return _json({"version": millstream.__version__})

    async def get_load(request: Request) -> Response:
        return _json(await load())

    async def models(request: Request) -> Response:
        return _json(ModelList(data=[card(facts, name) for facts, own in await allowed(request) for name in own]))

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        found = {one: facts for facts, own in await allowed(request) for one in own}
        if name not in found:
            raise UnknownModel(name[:200], found)
        return _json(card(found[name], name))

    async def allowed(request: Request) -> Sequence[tuple[ModelFacts, Sequence[str]]]:
        rights = caller_of(request).rights
        return [(facts, own) for facts, own in await names() if rights.may_use(own)]

    def card(facts: ModelFacts, name: str) -> ModelCard:
        kinds = sorted(kind.value for kind in facts.limits.kinds)
        return ModelCard(
            id=name, created=started, root=facts.model, max_model_len=facts.limits.max_context, kinds=kinds
        )

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", get_ready, methods=["GET"]),
        Route("/health/deep", deep, methods=["GET"]),
        Route("/version", version, methods=["GET"]),
        Route("/load", get_load, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        # Names of models may have slashes.
        Route("/v1/models/{model:path}", model, methods=["GET"]),
    ]


async def _steps(client: EngineClient) -> float:
    """How many steps the engine has made. Raises EngineClosed."""
    async with asyncio.timeout(DEEP_S):
        found = await client.call("stats")
    return float(found.get("steps", 0))


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, {**NO_STORE, **(headers or {})}, "application/json")
