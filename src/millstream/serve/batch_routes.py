"""The routes of files and batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from millstream.core.errors import BadRequest, UnknownName
from millstream.serve.batches import Batches
from millstream.serve.files import MAX_PAGE, PURPOSES, Files, expiry
from millstream.serve.upload import read_upload

_PIECE_BYTES = 256 << 10


class BatchAsk(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


_decode = msgspec.json.Decoder(BatchAsk).decode


def routes(files: Files, batches: Batches, owner: Callable[[Request], str]) -> list[Route]:
    """For the API's app. `owner` names the tenant whose key a request came with.

    Handlers raise BadRequest, UnknownName, TooLarge (files.py), DiskTrouble (store.py) and msgspec's errors.
    """

    async def upload(request: Request) -> Response:
        content_type = request.headers.get("content-type", "")
        found = await read_upload(content_type, request.stream(), files.begin, files.limits.file_bytes)
        try:
            purpose = found.fields.get("purpose")
            if purpose not in PURPOSES:
                raise BadRequest("purpose", purpose, ", ".join(PURPOSES))
            anchor, seconds = (found.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
            after_s = expiry(anchor, seconds)
            return _json(await files.keep(found.draft, owner(request), purpose, found.filename or "", after_s))
        finally:
            found.draft.drop()

    async def list_files(request: Request) -> Response:
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise BadRequest("order", order, "asc or desc")
        page, more = await files.listed(
            owner(request),
            purpose=query.get("purpose"),
            after=query.get("after"),
            limit=_limit(query.get("limit"), MAX_PAGE, MAX_PAGE),
            desc=order == "desc",
        )
        return _listed(page, more)

    async def get_file(request: Request) -> Response:
        return _json(await _file(request))

    async def delete_file(request: Request) -> Response:
        file_id = request.path_params["file_id"]
        if not await files.delete(owner(request), file_id):
            raise UnknownName("file", file_id[:80], ())
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def content(request: Request) -> Response:
        found = await _file(request)
        return StreamingResponse(
            _pieces(files.path(found.id)),
            media_type="application/octet-stream",
            headers={"Content-Length": str(found.bytes), "X-Content-Type-Options": "nosniff"},
        )

    async def _file(request: Request) -> Any:
        file_id = request.path_params["file_id"]
        found = await files.get(owner(request), file_id)
        if found is None:
            raise UnknownName("file", file_id[:80], ())
        return found

    async def create_batch(request: Request) -> Response:
        ask = _decode(await request.body())
        made = await batches.create(
            owner(request), ask.input_file_id, ask.endpoint, ask.completion_window, ask.metadata
        )
        return _json(made)

    async def list_batches(request: Request) -> Response:
        query = request.query_params
        page, more = await batches.listed(owner(request), query.get("after"), _limit(query.get("limit"), 20, 100))
        return _listed(page, more)

    async def get_batch(request: Request) -> Response:
        return _batch(request, await batches.get(owner(request), request.path_params["batch_id"]))

    async def cancel_batch(request: Request) -> Response:
        return _batch(request, await batches.cancel(owner(request), request.path_params["batch_id"]))

    def _batch(request: Request, found: Any) -> Response:
        if found is None:
            raise UnknownName("batch", request.path_params["batch_id"][:80], ())
        return _json(found)

    return [
        Route("/v1/files", upload, methods=["POST"]),
        Route("/v1/files", list_files, methods=["GET"]),
        Route("/v1/files/{file_id}", get_file, methods=["GET"]),
        Route("/v1/files/{file_id}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", content, methods=["GET"]),
        Route("/v1/batches", create_batch, methods=["POST"]),
        Route("/v1/batches", list_batches, methods=["GET"]),
        Route("/v1/batches/{batch_id}", get_batch, methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", cancel_batch, methods=["POST"]),
    ]


async def _pieces(path: Any) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
    finally:
        file.close()


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSONResponse.media_type)


def _listed(page: list[Any], more: bool) -> Response:
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return _json({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


def _limit(given: str | None, default: int, most: int) -> int:
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 8 and 1 <= int(given) <= most):
        raise BadRequest("limit", given, f"an integer from 1 to {most}")
    return int(given)
