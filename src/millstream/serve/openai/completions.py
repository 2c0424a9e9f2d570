"""Text completions: `/v1/completions`, for one prompt or many, and the prompts that they come to."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest
from millstream.core.request import Kind
from millstream.serve.body import read, warn
from millstream.serve.caller import Rights, caller_of
from millstream.serve.openai.reading import Counts, Reading, TextLogprobs, prompt_logprobs
from millstream.serve.openai.shapes import IGNORED, CompletionAsk, params_of, structured_fields
from millstream.serve.service import Job, Part, Served, Service
from millstream.serve.sse import DONE, EventStream, Primed, guarded, while_there
from millstream.serve.structured import structured_of

ROUTE = "/v1/completions"
OPERATION = "text_completion"
# What OpenAI's API generates where nothing is said.
DEFAULT_TOKENS = 16

_encode = msgspec.json.encode


@dataclass(slots=True)
class Prepared:
    ask: CompletionAsk
    served: Served
    job: Job
    model: str
    logprobs: int | None


class _Output:
    """One output. What is echoed of its prompt comes first, with logprobs of its own."""

    __slots__ = ("_began", "_echo", "_logprobs", "_part", "_tokenizer", "reading")

    def __init__(self, prepared: Prepared, part: Part) -> None:
        tokenizer = self._tokenizer = prepared.served.tokenizer
        self._part, self._began = part, False
        self.reading = Reading(tokenizer, part.params)
        self._echo = part.text if prepared.ask.echo else None
        self._logprobs = None if prepared.logprobs is None else TextLogprobs(tokenizer, prepared.logprobs)

    def push(self, chunk: Chunk) -> tuple[str, dict[str, Any] | None]:
        """The text that became certain, and the logprobs of the tokens."""
        text = ""
        entries: list[Any] = []
        if self._echo is not None and (chunk.prompt_logprobs is not None or self._logprobs is None or chunk.tokens):
            text, self._echo = self._echo, None
            if self._logprobs is not None and chunk.prompt_logprobs is not None:
                entries += zip(self._part.ids, chunk.prompt_logprobs, strict=False)
        if self._part.kind is Kind.GENERATE:
            text += self.reading.push(chunk)
            entries += [(entry.chosen.token, entry) for entry in self.reading.logprobs(chunk)]
        elif chunk.finish is not None:
            # Nothing was to be generated.
            self.reading.finish = "length"
        found = self._logprobs.of(entries) if self._logprobs is not None and entries else None
        return text, found

    def begins(self) -> bool:
        """Whether this is asked for the first time: what a stream tells once comes then."""
        began, self._began = self._began, True
        return not began


class CompletionRoutes:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def prepare(self, request: Request, ask: CompletionAsk) -> Prepared:
        """Raises BadRequest and what `Service` raises."""
        service, config = self.service, self.service.config
        rights = caller_of(request).rights
        served = service.model(ask.model, rights)
        if ask.suffix:
            raise BadRequest("suffix", ask.suffix, "none: this model does not fill in between two texts")
        n = ask.n or 1
        if ask.best_of is not None and ask.best_of != n:
            raise BadRequest("best_of", ask.best_of, f"n ({n}): outputs are not ranked here")
        prompts = await self.prompts(ask, served, rights)
        structured = structured_of(structured_fields(ask))
        held = None
        if structured is not None:
            compiled = await served.compiler.check_async(structured[0], structured[1])
            held = compiled.structured
            for text in compiled.warnings:
                warn(request, text)
        most = DEFAULT_TOKENS if ask.max_tokens is None else ask.max_tokens
        scores = most == 0
        if scores and not ask.echo:
            raise BadRequest("max_tokens", 0, "an integer from 1, or 0 with echo: true")
        params = params_of(
            ask,
            served.defaults,
            max_tokens=1 if scores else most,
            logprobs=ask.logprobs,
            structured=held,
            max_n=config.n,
        )
        if params.prompt_logprobs is None and (scores or (ask.echo and ask.logprobs is not None)):
            params = replace(params, prompt_logprobs=ask.logprobs or 0)
        kind = Kind.SCORE if scores else Kind.GENERATE
        parts = [Part(ids, params, text, kind) for text, ids in prompts]
        if ask.echo:
            await self._spell(parts, served)
        if len(parts) * n > config.n and n > 1:
            raise BadRequest("n", n, f"at most {config.n} outputs in all: there are {len(parts)} prompts")
        job = service.job(request, ask, served, parts, most)
        return Prepared(ask, served, job, ask.model or served.name, ask.logprobs)

    async def prompts(self, ask: CompletionAsk, served: Served, rights: Rights) -> list[tuple[str | None, list[int]]]:
        """Text, where there is one, and tokens of every prompt. Raises BadRequest naming the one that is wrong."""
        given, most = ask.prompt, self.service.config.prompts
        add_bos = False if ask.add_special_tokens is False else None
        if isinstance(given, str):
            ids = (await self.service.encode(served, [given], "prompt", add_bos))[0]
            return [(given, _some(ids, given, "prompt"))]
        if not given:
            raise BadRequest("prompt", given, "a text, token ids, or a list of either")
        if all(type(one) is int for one in given):
            return [(None, self._ids(given, "prompt", served, rights))]
        if len(given) > most:
            raise BadRequest("prompt", f"{len(given)} prompts", f"at most {most}")
        encoded = iter(
            await self.service.encode(served, [one for one in given if isinstance(one, str)], "prompt", add_bos)
        )
        found: list[tuple[str | None, list[int]]] = []
        for place, one in enumerate(given):
            param = f"prompt[{place}]"
            if isinstance(one, str):
                found.append((one, _some(next(encoded), one, param)))
            else:
                found.append((None, self._ids(one, param, served, rights)))
        return found

    def _ids(self, given: Any, param: str, served: Served, rights: Rights) -> list[int]:
        ids = _ids(given, param)
        self.service.check_ids(ids, served, param, rights)
        return ids

    async def _spell(self, parts: Sequence[Part], served: Served) -> None:
        """Finds the text of prompts that came as tokens, once for all their outputs."""
        size = served.facts.limits.vocab_size
        for place, part in enumerate(parts):
            if part.text is None:
                param = "prompt" if len(parts) == 1 else f"prompt[{place}]"
                wrong = next((token for token in part.ids if not 0 <= token < size), None)
                if wrong is not None:
                    raise BadRequest(param, wrong, f"token ids from 0 to {size - 1}")
                part.text = await self.service.either(len(part.ids), served.tokenizer.decode, part.ids)

    async def create(self, request: Request) -> Response:
        ask = await read(request, CompletionAsk, strict=self.service.config.strict, ignored=IGNORED)
        prepared = await self.prepare(request, ask)
        self.service.admit(prepared.job)
        steps = Primed(self.service.run(prepared.job))
        if ask.stream:
            await while_there(request, steps.prime())
            return EventStream(guarded(request, self._stream(prepared, steps)), steps)
        return await while_there(request, self._whole(prepared, steps))

    async def _whole(self, prepared: Prepared, steps: Primed[tuple[int, Chunk]]) -> Response:
        parts, n = prepared.job.parts, prepared.job.parts[0].params.n
        outputs = [[_Output(prepared, part) for _ in range(n)] for part in parts]
        texts = [["" for _ in range(n)] for _ in parts]
        logprobs: list[list[dict[str, Any] | None]] = [[None for _ in range(n)] for _ in parts]
        positions: list[Any] = [None for _ in parts]
        counts = Counts()
        try:
            async for place, chunk in steps:
                counts.add(place, chunk)
                text, found = outputs[place][chunk.index].push(chunk)
                texts[place][chunk.index] += text
                if found is not None:
                    logprobs[place][chunk.index] = _joined(logprobs[place][chunk.index], found)
                if chunk.prompt_logprobs is not None:
                    positions[place] = chunk.prompt_logprobs
        finally:
            await steps.aclose()
        choices = []
        for place, part in enumerate(parts):
            for index in range(n):
                output = outputs[place][index]
                choice: dict[str, Any] = {
                    "index": place * n + index,
                    "text": texts[place][index],
                    "logprobs": logprobs[place][index],
                    "finish_reason": output.reading.finish,
                    "stop_reason": output.reading.stop_reason,
                }
                if part.params.prompt_logprobs is not None and positions[place] is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(prepared.served.tokenizer, part.ids, positions[place])
                if prepared.ask.return_token_ids:
                    choice["token_ids"] = output.reading.token_ids
                    choice["prompt_token_ids"] = list(part.ids)
                choices.append(choice)
        body = {**_head(prepared), "choices": choices, "usage": counts.usage()}
        return Response(_encode(body), media_type="application/json")

    async def _stream(self, prepared: Prepared, steps: Primed[tuple[int, Chunk]]) -> AsyncGenerator[bytes, None]:
        parts, n = prepared.job.parts, prepared.job.parts[0].params.n
        outputs = [[_Output(prepared, part) for _ in range(n)] for part in parts]
        ask, counts = prepared.ask, Counts()
        options = ask.stream_options
        each = options is not None and options.continuous_usage_stats
        opening = _encode(_head(prepared))[:-1] + b',"choices":'

        async for place, chunk in steps:
            counts.add(place, chunk)
            output = outputs[place][chunk.index]
            text, found = output.push(chunk)
            if not text and found is None and chunk.finish is None and not (ask.return_token_ids and chunk.tokens):
                continue
            choice: dict[str, Any] = {
                "index": place * n + chunk.index,
                "text": text,
                "logprobs": found,
                "finish_reason": output.reading.finish,
                "stop_reason": output.reading.stop_reason,
            }
            if ask.return_token_ids:
                choice["token_ids"] = list(chunk.tokens)
                if output.begins():
                    choice["prompt_token_ids"] = list(parts[place].ids)
            usage = b',"usage":' + _encode(counts.usage()) if each else b""
            yield b"data: " + opening + b"[" + _encode(choice) + b"]" + usage + b"}\n\n"
        if options is not None and options.include_usage:
            yield b"data: " + opening + b'[],"usage":' + _encode(counts.usage()) + b"}\n\n"
        yield DONE

    async def render(self, request: Request) -> Response:
        """The exact prompts of a completion: token ids and their text, control tokens spelled."""
        ask = await read(request, CompletionAsk, strict=self.service.config.strict, ignored=IGNORED)
        rights = caller_of(request).rights
        served = self.service.model(ask.model, rights)
        prompts = await self.prompts(ask, served, rights)

        def all_of_them() -> list[dict[str, Any]]:
            return [
                {"prompt": served.tokenizer.decode(ids, False), "token_ids": ids, "count": len(ids)}
                for _, ids in prompts
            ]

        found = await self.service.either(sum(len(ids) for _, ids in prompts), all_of_them)
        body = {
            "object": "prompts",
            "model": ask.model or served.name,
            "data": found,
            "max_model_len": served.facts.limits.max_context,
        }
        return Response(_encode(body), media_type="application/json")

    def routes(self) -> list[Route]:
        create = self.service.watch(OPERATION, ROUTE)(self.create)
        return [Route(ROUTE, create, methods=["POST"]), Route(f"{ROUTE}/render", self.render, methods=["POST"])]


def _ids(given: Any, param: str) -> list[int]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise BadRequest(param, given, "a text, or a list of at least one token id")
    for one in given:
        if type(one) is not int:
            raise BadRequest(param, one, "token ids, all integers")
    return list(given)


def _some(ids: list[int], text: str, param: str) -> list[int]:
    if not ids:
        raise BadRequest(param, text, "a text of at least one token")
    return ids


def _joined(so_far: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    return more if so_far is None else {name: [*so_far[name], *more[name]] for name in more}


def _head(prepared: Prepared) -> dict[str, Any]:
    return {
        "id": f"cmpl-{prepared.job.caller.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": prepared.model,
        "system_fingerprint": f"millstream-{prepared.served.facts.version}",
    }
