"""The routes of Anthropic's Messages API, with errors in its own shape."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from millstream.core.errors import MillstreamError
from millstream.serve.anthropic.events import Event, MessageEvents, WholeMessage, error_body, error_kind
from millstream.serve.anthropic.shapes import Ask, Counted, to_chat
from millstream.serve.chats import Chats, Said

_OPERATION = "messages"

_decode = msgspec.json.Decoder(Ask).decode
_decode_counted = msgspec.json.Decoder(Counted).decode
_encode = msgspec.json.encode
_log = logging.getLogger("millstream.serve")

Told = Callable[[Request, Exception], Response]
Handler = Callable[[Request], Awaitable[Response]]


def routes(chats: Chats, told: Told) -> list[Route]:
    """For the API's app. `told` is the answer that another route would give to an error: its status and its message."""

    async def create(request: Request) -> Response:
        ask = _decode(await request.body())
        events = MessageEvents(ask.model)
        answer = chats.answer(request, to_chat(ask), _OPERATION)
        # What is wrong with a request is told by the status, so the first step comes before the first byte.
        first = await anext(answer)
        if ask.stream:
            return StreamingResponse(
                _stream(events, first, answer), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        whole = WholeMessage()
        async for told_now in _steps(events, first, answer):
            whole.add(told_now)
        return Response(_encode(whole.message), media_type="application/json")

    async def count(request: Request) -> Response:
        tokens = await chats.count(request, to_chat(_decode_counted(await request.body())))
        return Response(_encode({"input_tokens": tokens}), media_type="application/json")

    return [
        Route("/v1/messages", _shaped(create, told), methods=["POST"]),
        Route("/v1/messages/count_tokens", _shaped(count, told), methods=["POST"]),
    ]


async def _steps(events: MessageEvents, first: Said, answer: AsyncIterator[Said]) -> AsyncIterator[list[Event]]:
    """The events of an answer, a step at a time. Raises what the answer raises."""
    try:
        yield [*events.start(first.prompt_tokens, first.cached_tokens), *_of(events, first)]
        if first.finish is None:
            async for said in answer:
                yield _of(events, said)
    finally:
        if (close := getattr(answer, "aclose", None)) is not None:
            await close()


def _of(events: MessageEvents, said: Said) -> list[Event]:
    out = events.add(said.pieces)
    if said.finish is not None:
        out += events.finish(said.finish, said.stop, said.prompt_tokens, said.cached_tokens, said.output_tokens)
    return out


async def _stream(events: MessageEvents, first: Said, answer: AsyncIterator[Said]) -> AsyncIterator[bytes]:
    steps = _steps(events, first, answer)
    try:
        async for told in steps:
            yield b"".join(map(_line, told))
    except MillstreamError as error:
        yield _line(error_body("api_error", str(error)))
    except Exception:
        _log.exception("a message failed on the way")
        yield _line(error_body("api_error", "the server failed on this request"))
    finally:
        await steps.aclose()  # type: ignore[attr-defined]


def _line(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), _encode(event))


def _shaped(handler: Handler, told: Told) -> Handler:
    """A handler whose errors have Anthropic's shape, and the status and headers that they have everywhere."""

    @functools.wraps(handler)
    async def shaped(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            answer = told(request, error)
            message = msgspec.json.decode(bytes(answer.body))["error"]["message"]
            headers = {name: value for name, value in answer.headers.items() if name not in ("content-length",)}
            body = error_body(error_kind(answer.status_code), message, headers.get("x-request-id"))
            return Response(_encode(body), answer.status_code, headers)

    return shaped
