"""Tokens as they are: `/tokenize`, `/detokenize`, and `/generate`, token ids in and token ids out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest
from millstream.serve.body import check_known, read, warn
from millstream.serve.caller import caller_of
from millstream.serve.openai.chat import ChatRoutes
from millstream.serve.openai.reading import SERVER_FINISHES, Counts
from millstream.serve.openai.shapes import (
    ChatAsk,
    DetokenizeAsk,
    Sampling,
    TokenizeAsk,
    TokensAsk,
    params_of,
    structured_fields,
)
from millstream.serve.service import Job, Part, Served, Service
from millstream.serve.sse import DONE, EventStream, Primed, event, guarded, while_there
from millstream.serve.structured import structured_of

GENERATE = "/generate"
OPERATION = "generate"

# Fields that may lie in `sampling_params`.
INSIDE = frozenset(Sampling.__struct_fields__) - {"model", "stream", "stream_options"} | {"logprobs"}

_encode = msgspec.json.encode


class TokenRoutes:
    def __init__(self, service: Service, chats: ChatRoutes) -> None:
        self.service, self.chats = service, chats

    async def tokenize(self, request: Request) -> Response:
        ask = await read(request, TokenizeAsk, strict=self.service.config.strict)
        served = self.service.served_model(ask.model, caller_of(request).rights)
        if (ask.prompt is None) == (ask.messages is None):
            raise BadRequest("prompt", ask.prompt, "either prompt or messages")
        if ask.prompt is not None:
            add_bos = None if ask.add_special_tokens else False
            ids = (await self.service.encode(served, [ask.prompt], "prompt", add_bos))[0]
        else:
            assert ask.messages is not None
            chat = ChatAsk(
                messages=ask.messages,
                tools=ask.tools,
                add_generation_prompt=ask.add_generation_prompt,
                continue_final_message=ask.continue_final_message,
                chat_template=ask.chat_template,
                chat_template_kwargs=ask.chat_template_kwargs,
            )
            ids = (await self.chats.plan(chat, served)).ids
        body = {
            "count": len(ids),
            "max_model_len": served.facts.limits.max_context,
            "tokens": ids,
            "token_strs": None,
        }
        if ask.return_token_strs:
            body["token_strs"] = await self.service.either(len(ids), _spellings, served, ids)
        return Response(_encode(body), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        ask = await read(request, DetokenizeAsk, strict=self.service.config.strict)
        served = self.service.served_model(ask.model, caller_of(request).rights)
        _check_ids(ask.tokens, served, "tokens")
        text = await self.service.either(len(ask.tokens), served.tokenizer.decode, ask.tokens, ask.skip_special_tokens)
        return Response(_encode({"prompt": text}), media_type="application/json")

    async def generate(self, request: Request) -> Response:
        ask = await read(request, TokensAsk, strict=self.service.config.strict)
        job, served = await self._prepare(request, ask)
        self.service.admit(job)
        steps = Primed(self.service.run(job))
        if ask.stream:
            await while_there(request, steps.prime())
            return EventStream(guarded(request, self._stream(job, served, steps)), steps)
        return await while_there(request, self._whole(job, served, steps))

    async def _prepare(self, request: Request, ask: TokensAsk) -> tuple[Job, Served]:
        service, config = self.service, self.service.config
        if ask.sampling_params is not None:
            ask = _unfolded(request, ask, config.strict)
        rights = caller_of(request).rights
        served = service.model(ask.model, rights)
        found = [(name, ids) for name in ("token_ids", "prompt_token_ids", "input_ids") if (ids := getattr(ask, name))]
        if len(found) != 1:
            raise BadRequest(
                "token_ids", None if not found else "more than one list", "one list of at least one token id"
            )
        name, ids = found[0]
        _check_ids(ids, served, name)
        service.check_ids(ids, served, name, rights)
        held, structured = None, structured_of(structured_fields(ask))
        if structured is not None:
            compiled = await served.compiler.check_async(structured[0], structured[1])
            held = compiled.structured
            for text in compiled.warnings:
                warn(request, text)
        most = ask.max_tokens
        if most is not None and most < 1:
            raise BadRequest("max_tokens", most, "an integer from 1")
        params = params_of(
            ask, served.defaults, max_tokens=most, logprobs=ask.logprobs, structured=held, max_n=config.n
        )
        return service.job(request, ask, served, [Part(ids, params)], most), served

    async def _whole(self, job: Job, served: Served, steps: Primed[tuple[int, Chunk]]) -> Response:
        counts = Counts()
        choices = [_choice(index) for index in range(job.num_outputs)]
        positions = None
        try:
            async for place, chunk in steps:
                counts.add(place, chunk)
                _fold(choices[chunk.index], chunk)
                if chunk.prompt_logprobs is not None:
                    positions = [None if entry is None else _logprob(entry) for entry in chunk.prompt_logprobs]
        finally:
            await steps.aclose()
        body = {**_head(job, served), "choices": choices, "usage": counts.usage()}
        if positions is not None:
            body["prompt_logprobs"] = positions
        return Response(_encode(body), media_type="application/json")

    async def _stream(self, job: Job, served: Served, steps: Primed[tuple[int, Chunk]]) -> AsyncGenerator[bytes, None]:
        counts, head = Counts(), _head(job, served)
        async for place, chunk in steps:
            counts.add(place, chunk)
            choice = _choice(chunk.index)
            _fold(choice, chunk)
            yield event({**head, "choices": [choice]})
        yield event({**head, "choices": [], "usage": counts.usage()})
        yield DONE

    def routes(self) -> list[Route]:
        generate = [
            Route(path, self.service.watch(OPERATION, path)(self.generate), methods=["POST"])
            for path in (GENERATE, "/inference/v1/generate")
        ]
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            *generate,
        ]


def _check_ids(ids: list[int], served: Served, param: str) -> None:
    size = served.facts.limits.vocab_size
    for token in ids:
        if not 0 <= token < size:
            raise BadRequest(param, token, f"token ids from 0 to {size - 1}")


def _spellings(served: Served, ids: list[int]) -> list[str]:
    return [served.tokenizer.spelling_of(token) for token in ids]


def _unfolded(request: Request, ask: TokensAsk, strict: bool) -> TokensAsk:
    """The same with the fields of `sampling_params`, where vLLM and SGLang have them, beside the others.

    Raises BadRequest, for a field that is given in both places too: one of them would be lost.
    """
    inside = dict(ask.sampling_params or {})
    if "max_new_tokens" in inside and "max_tokens" not in inside:
        inside["max_tokens"] = inside.pop("max_new_tokens")
    check_known(request, inside, INSIDE, strict=strict, within="sampling_params.")
    beside = {name: value for name, value in msgspec.structs.asdict(ask).items() if value is not None}
    del beside["sampling_params"]
    for name in inside.keys() & beside.keys() & INSIDE:
        raise BadRequest(f"sampling_params.{name}", inside[name], f"{name} in one place, in there or beside it")
    known = {name: value for name, value in inside.items() if name in INSIDE}
    try:
        return msgspec.convert({**beside, **known}, TokensAsk)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(str(error).replace("`$.", "`$.sampling_params.")) from None


def _choice(index: int) -> dict[str, Any]:
    return {"index": index, "token_ids": [], "finish_reason": None, "stop_reason": None}


def _fold(choice: dict[str, Any], chunk: Chunk) -> None:
    if chunk.replaced is not None:
        choice["token_ids"] = list(chunk.replaced)
    choice["token_ids"] += chunk.tokens
    if chunk.logprobs:
        choice.setdefault("logprobs", []).extend(map(_logprob, chunk.logprobs))
    if chunk.finish is not None:
        choice["finish_reason"] = SERVER_FINISHES.get(chunk.finish, chunk.finish.value)
        choice["stop_reason"] = chunk.stop_reason


def _logprob(entry: Any) -> dict[str, Any]:
    return {
        "token_id": entry.chosen.token,
        "logprob": max(entry.chosen.logprob, -9999.0),
        "rank": entry.chosen.rank,
        "top": [{"token_id": one.token, "logprob": max(one.logprob, -9999.0), "rank": one.rank} for one in entry.top],
    }


def _head(job: Job, served: Served) -> dict[str, Any]:
    return {"request_id": f"gen-{job.caller.request_id}", "object": "generate", "model": served.name}
