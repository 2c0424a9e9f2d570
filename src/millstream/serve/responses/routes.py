"""The routes of the Responses API."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from millstream.core.errors import BadRequest, MillstreamError, UnknownName
from millstream.serve.chats import Chats, Said
from millstream.serve.openai.shapes import PROGRAM_HEADER, ProgramAsk, told_program
from millstream.serve.responses.events import Event, ResponseEvents, new_response
from millstream.serve.responses.kept import Responses
from millstream.serve.responses.live import Live, LiveResponses
from millstream.serve.responses.shapes import Ask, Item, own_items, to_chat
from millstream.serve.store import DiskTrouble

_OPERATION = "responses"
_MAX_PAGE = 100

_decode = msgspec.json.Decoder(Ask).decode
_encode = msgspec.json.encode
_log = logging.getLogger("millstream.serve")


class _Run:
    """One response on its way: what was asked, what it has come to, and where it is kept."""

    def __init__(
        self,
        chats: Chats,
        kept: Responses,
        request: Request,
        owner: str,
        ask: Ask,
        items: list[Item],
        program_before: str | None,
        now: float,
    ) -> None:
        self._kept, self._owner, self._items = kept, owner, items
        self._stored = ask.store is not False
        response, chat = new_response(ask, now), to_chat(ask, items)
        program = told_program(ask.program, request.headers.get(PROGRAM_HEADER))
        if program is None and (program_before is not None or self._stored):
            # Responses that go on from each other are a program, whose name is the first one's id.
            program = ProgramAsk(program_before or response["id"])
        if program is not None:
            response["program"], chat["program"] = program.id, program
        self.events = ResponseEvents(response)
        self.answer = chats.answer(request, chat, _OPERATION)

    @property
    def response(self) -> dict[str, Any]:
        return self.events.response

    async def keep(self) -> None:
        if self._stored:
            await self._kept.put(self._owner, self.response, self._items)

    async def steps(self, first: Said | None) -> AsyncIterator[list[Event]]:
        """The events of the answer, a step at a time, to its end or its failure. It is kept before its end is told."""
        try:
            if first is not None:
                yield await self._told(first)
            if not self.events.ended:
                async for said in self.answer:
                    yield await self._told(said)
        except MillstreamError as error:
            yield await self._failed(str(error))
        except Exception:
            _log.exception("a response failed on the way")
            yield await self._failed("the server failed on this request")
        if not self.events.ended:
            yield await self._failed("the answer broke off")

    async def _told(self, said: Said) -> list[Event]:
        out = self.events.add(said.pieces, said.logprobs)
        if said.finish is not None:
            counts = (said.prompt_tokens, said.cached_tokens, said.output_tokens, said.reasoning_tokens)
            out += self.events.finish(said.finish, *counts)
            await self._keep_end()
        return out

    async def _failed(self, message: str) -> list[Event]:
        out = self.events.fail(message)
        await self._keep_end()
        return out

    async def _keep_end(self) -> None:
        """What was answered is not lost because it cannot be kept."""
        try:
            await self.keep()
        except DiskTrouble as trouble:
            _log.warning("response %s is not kept: %s", self.response["id"], trouble)

    async def leave(self) -> None:
        """Nobody waits for it any more."""
        await _closed(self.answer)
        if not self.events.ended:
            self.events.cancel()
            await self._keep_end()


def routes(
    chats: Chats,
    kept: Responses,
    live: LiveResponses,
    owner: Callable[[Request], str],
    clock: Callable[[], float] = time.time,
) -> list[Route]:
    """For the API's app. `owner` names the tenant whose key a request came with; `clock` gives wall-clock seconds.

    Handlers raise BadRequest, UnknownName, TooManyResponses, DiskTrouble, msgspec's errors, and what `chats` raises.
    """

    async def create(request: Request) -> Response:
        ask = _decode(await request.body())
        ask.check()
        who = owner(request)
        before, program = await _before(who, ask.previous_response_id)
        run = _Run(chats, kept, request, who, ask, [*before, *own_items(ask)], program, clock())
        if ask.background:
            return await _in_background(who, run, bool(ask.stream))
        # What is wrong with a request is told by the status, so the first step comes before the first byte.
        first = await anext(run.answer)
        if ask.stream:
            return _stream(_foreground(run, first))
        try:
            async for _ in run.steps(first):
                pass
        finally:
            await _closed(run.answer)
        return _json(run.response)

    async def _before(who: str, previous: str | None) -> tuple[list[Item], str | None]:
        """The conversation that led to an earlier response, with that response, and the program that it was of."""
        if previous is None:
            return [], None
        found = await kept.get(who, previous)
        if found is None:
            raise UnknownName("response", previous[:80], ())
        response, items = found
        if response["status"] in ("queued", "in_progress"):
            raise BadRequest("previous_response_id", f"a response that is {response['status']}", "one that has ended")
        return [*items, *response["output"]], response.get("program") or previous

    async def _foreground(run: _Run, first: Said) -> AsyncIterator[Event]:
        try:
            for event in run.events.start():
                yield event
            async for events in run.steps(first):
                for event in events:
                    yield event
        finally:
            # The client left, perhaps: that is no reason to lose what is to be kept.
            await asyncio.shield(run.leave())

    async def _in_background(who: str, run: _Run, stream: bool) -> Response:
        queued = dict(run.response)

        async def work(one: Live) -> None:
            try:
                one.add(run.events.start())
                await run.keep()
                async for events in run.steps(None):
                    one.add(events)
            except asyncio.CancelledError:
                await run.leave()
                raise

        await run.keep()
        one = live.start(who, queued["id"], work)
        return _stream(one.follow()) if stream else _json(queued)

    async def retrieve(request: Request) -> Response:
        response, _ = await _found(request)
        query = request.query_params
        if query.get("stream", "false") not in ("true", "1"):
            return _json(response)
        one = live.get(owner(request), response["id"])
        if one is None:
            raise BadRequest("stream", True, "false: this response is not under way; it is here as a whole")
        return _stream(one.follow(_number(query.get("starting_after"), "starting_after", -1, 10**9)))

    async def _found(request: Request) -> tuple[dict[str, Any], list[Item]]:
        response_id = request.path_params["response_id"]
        found = await kept.get(owner(request), response_id)
        if found is None:
            raise UnknownName("response", response_id[:80], ())
        return found

    async def delete(request: Request) -> Response:
        response, _ = await _found(request)
        one = live.get(owner(request), response["id"])
        if one is not None:
            await live.cancel(one)
        await kept.delete(owner(request), response["id"])
        return _json({"id": response["id"], "object": "response", "deleted": True})

    async def cancel(request: Request) -> Response:
        response, _ = await _found(request)
        if not response["background"]:
            raise BadRequest("response_id", response["id"], "a response that was created with background")
        one = live.get(owner(request), response["id"])
        if one is not None:
            await live.cancel(one)
            response, _ = await _found(request)
        return _json(response)

    async def input_items(request: Request) -> Response:
        _, items = await _found(request)
        query = request.query_params
        limit = _number(query.get("limit"), "limit", 20, _MAX_PAGE)
        order = query.get("order", "desc")
        if order not in ("asc", "desc") or limit < 1:
            raise BadRequest("order", order, "asc or desc, with a limit from 1")
        ordered = items if order == "asc" else items[::-1]
        if (after := query.get("after")) is not None:
            place = next((place for place, item in enumerate(ordered) if item["id"] == after), None)
            if place is None:
                raise BadRequest("after", after, "the id of the last item of the page before")
            ordered = ordered[place + 1 :]
        page = ordered[:limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        more = len(ordered) > limit
        return _json({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})

    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{response_id}", retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel, methods=["POST"]),
        Route("/v1/responses/{response_id}/input_items", input_items, methods=["GET"]),
    ]


def _stream(events: AsyncIterator[Event]) -> Response:
    async def text() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield b"event: %s\ndata: %s\n\n" % (event["type"].encode(), _encode(event))
        finally:
            await _closed(events)

    return StreamingResponse(text(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _closed(iterator: AsyncIterator[Any]) -> None:
    """Ends what an iterator does now, not when it is collected."""
    if (close := getattr(iterator, "aclose", None)) is not None:
        await close()


def _json(value: Any) -> Response:
    return Response(_encode(value), media_type="application/json")


def _number(given: str | None, param: str, default: int, most: int) -> int:
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 12 and int(given) <= most):
        raise BadRequest(param, given[:80], f"an integer from 0 to {most}")
    return int(given)
