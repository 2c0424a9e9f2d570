"""The routes of what watches: metrics, timelines, and the playground with the numbers that it shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.client import EngineClient
from millstream.core.errors import BadRequest, UnknownName
from millstream.serve.metrics import CONTENT_TYPE
from millstream.serve.observatory import Observatory, playground_state
from millstream.serve.playground import HEADERS, pages

# Paths that hold no data and so need no key: the page asks for one itself.
OPEN_PATHS = ("/", "/playground/{name}")
NO_STORE = {"Cache-Control": "no-store"}


def routes(watched: Observatory, client: EngineClient, owner: Callable[[Request], str]) -> list[Route]:
    """For the API's app. `owner` names the tenant whose key a request came with.

    Handlers raise BadRequest and UnknownName.
    """
    files = pages()

    def file_of(request: Request, name: str) -> Response:
        page = files.get(name)
        if page is None:
            raise UnknownName("page of the playground", name[:80], ())
        if request.headers.get("If-None-Match") == page.etag:
            return Response(status_code=304, headers={**HEADERS, "ETag": page.etag})
        return Response(page.body, media_type=page.content_type, headers={**HEADERS, "ETag": page.etag})

    async def index(request: Request) -> Response:
        return file_of(request, "index.html")

    async def file(request: Request) -> Response:
        return file_of(request, request.path_params["name"])

    async def state(request: Request) -> Response:
        text = request.query_params.get("since", "0")
        if not text.isascii() or not text.isdecimal() or len(text) > 18:
            raise BadRequest("since", text, "the number of a step")
        load = await watched.look(client)
        return _json(playground_state(watched, load, await client.ready(), int(text)))

    async def metrics(request: Request) -> Response:
        await watched.look(client)
        # Some milliseconds of formatting, off the loop on which tokens are streamed.
        families = list(watched.metrics.collect())
        body = await asyncio.to_thread(watched.metrics.text, families)
        return Response(body, headers={"Content-Type": CONTENT_TYPE, **NO_STORE})

    async def timeline(request: Request) -> Response:
        return _timeline(watched, request.path_params["id"], owner(request))

    return [
        Route("/", index, methods=["GET"]),
        Route("/playground/state", state, methods=["GET"]),
        Route("/playground/{name}", file, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/requests/{id}/timeline", timeline, methods=["GET"]),
    ]


def admin_routes(watched: Observatory) -> list[Route]:
    """For the admin listener: the timelines of all tenants."""

    async def timeline(request: Request) -> Response:
        return _timeline(watched, request.path_params["id"], None)

    return [Route("/admin/requests/{id}/timeline", timeline, methods=["GET"])]


def _timeline(watched: Observatory, given: str, owner: str | None) -> Response:
    # An answer's id holds that of its request: chatcmpl-req_...
    request_id = given[given.rfind("req_") :] if "req_" in given else given
    found = watched.timelines.get(request_id, owner)
    if found is None:
        # Another tenant's is no different from one that never was.
        raise UnknownName("timeline of a request", given[:80], (), "Those of the last few thousand are kept")
    return _json(found.as_dict())


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=NO_STORE)
