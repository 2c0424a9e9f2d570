"""Chats: `/v1/chat/completions`, the prompt that a chat comes to, and what other dialects of chat stand on."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest
from millstream.serve.body import read, warn
from millstream.serve.caller import caller_of
from millstream.serve.chats import Said
from millstream.serve.errors import Refused
from millstream.serve.openai.reading import Counts, Reading, chat_logprob, prompt_logprobs
from millstream.serve.openai.shapes import IGNORED, ChatAsk, params_of, structured_fields
from millstream.serve.service import INLINE_CHARS, Job, Part, Served, Service, end, size_of
from millstream.serve.sse import DONE, EventStream, Primed, guarded, while_there
from millstream.serve.structured import structured_of
from millstream.serve.tools import ChatPlan, Turn, plan_chat
from millstream.text.chat import ChatTemplate, template_of

ROUTE = "/v1/chat/completions"
OPERATION = "chat"

_encode = msgspec.json.encode


@dataclass(slots=True)
class Prepared:
    """A chat that may be submitted."""

    ask: ChatAsk
    served: Served
    plan: ChatPlan
    job: Job
    model: str


class _Output:
    """One output: its text, read as calls, thinking and content."""

    __slots__ = ("_call", "_tokenizer", "_top", "reading", "turn")

    def __init__(self, prepared: Prepared) -> None:
        params = prepared.job.parts[0].params
        self._call = prepared.job.call
        self._tokenizer = prepared.served.tokenizer
        self._top = prepared.ask.top_logprobs or 0
        self.reading = Reading(self._tokenizer, params, prepared.plan.shown)
        self.turn: Turn = prepared.plan.turn()

    def push(self, chunk: Chunk) -> tuple[list[Any], list[dict[str, Any]]]:
        """The pieces that became certain, and the logprobs of the tokens."""
        thought = self.turn.reasoning_tokens
        text = self.reading.push(chunk)
        pieces = self.turn.push(text, len(chunk.tokens)) if text or chunk.tokens else []
        if chunk.finish is not None:
            pieces = [*pieces, *self.turn.finish()]
        if self.turn.reasoning_tokens != thought:
            self._call.reasoning_tokens += self.turn.reasoning_tokens - thought
        entries = [chat_logprob(self._tokenizer, entry, self._top) for entry in self.reading.logprobs(chunk)]
        return pieces, entries

    @property
    def finish(self) -> str | None:
        reason = self.reading.finish
        return None if reason is None else self.turn.finish_reason(reason)


class ChatRoutes:
    """Implements `Chats` too."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # -- from a body to a job

    async def prepare(self, request: Request, ask: ChatAsk) -> Prepared:
        """Everything about a chat that can be wrong is found here. Raises BadRequest and what `Service` raises."""
        service, config = self.service, self.service.config
        served = service.model(ask.model, caller_of(request).rights)
        if ask.functions or ask.function_call is not None:
            raise BadRequest("functions", "the older form", "tools and tool_choice")
        if ask.logprobs is not True and ask.top_logprobs:
            raise BadRequest("top_logprobs", ask.top_logprobs, "0, or logprobs: true beside it")
        plan = await self.plan(ask, served)
        most = ask.max_completion_tokens if ask.max_completion_tokens is not None else ask.max_tokens
        if most is not None and most < 1:
            name = "max_tokens" if ask.max_completion_tokens is None else "max_completion_tokens"
            raise BadRequest(name, most, "an integer from 1")
        params = params_of(
            ask,
            served.defaults,
            max_tokens=most,
            logprobs=(ask.top_logprobs or 0) if ask.logprobs else None,
            structured=plan.structured,
            max_n=config.n,
            logprobs_field="top_logprobs",
        )
        for text in plan.warnings:
            warn(request, text)
        job = service.job(request, ask, served, [Part(plan.ids, params)], most)
        return Prepared(ask, served, plan, job, ask.model or served.name)

    async def plan(self, ask: ChatAsk, served: Served) -> ChatPlan:
        service = self.service
        size = 0
        # A template may write all of it into the prompt, and any part of it takes its time.
        for name in ("messages", "tools", "chat_template_kwargs", "chat_template"):
            size += size_of(getattr(ask, name))
            service.check_bytes(size, name)
        kwargs = dict(ask.chat_template_kwargs or {})
        if ask.reasoning_effort is not None:
            if ask.reasoning_effort not in ("none", "minimal", "low", "medium", "high", "xhigh"):
                raise BadRequest("reasoning_effort", ask.reasoning_effort, "none, minimal, low, medium, high or xhigh")
            kwargs.setdefault("reasoning_effort", ask.reasoning_effort)
            kwargs.setdefault("enable_thinking", ask.reasoning_effort != "none")
        add = True if ask.add_generation_prompt is None else ask.add_generation_prompt
        going_on = bool(ask.continue_final_message)
        if going_on and ask.add_generation_prompt is None:
            add = False
        return await plan_chat(
            served.tokenizer,
            served.compiler,
            ask.messages,
            tools=ask.tools,
            tool_choice=ask.tool_choice,
            parallel_tool_calls=ask.parallel_tool_calls,
            structured=structured_of(structured_fields(ask)),
            template=self._template(ask.chat_template, served),
            template_kwargs=kwargs,
            add_generation_prompt=add,
            continue_final_message=going_on,
            parsers=service.parsers,
            thinks=ask.include_reasoning is not False,
            # How long a client's template runs, its size does not tell.
            aside=service.aside if size > INLINE_CHARS or ask.chat_template is not None else None,
        )

    def _template(self, source: str | None, served: Served) -> ChatTemplate | None:
        if source is None:
            return None
        if not self.service.config.chat_templates:
            raise Refused(
                403, "not_allowed", "chat_template: this server takes no templates of clients", "chat_template"
            )  # fmt: skip
        own = template_of(served.tokenizer) if served.tokenizer.chat_template else None
        return ChatTemplate(source, own.bos_token if own else "", own.eos_token if own else "")

    # -- /v1/chat/completions

    async def create(self, request: Request) -> Response:
        ask = await read(request, ChatAsk, strict=self.service.config.strict, ignored=IGNORED)
        prepared = await self.prepare(request, ask)
        self.service.admit(prepared.job)
        steps = Primed(self.service.run(prepared.job))
        if ask.stream:
            await while_there(request, steps.prime())
            return EventStream(guarded(request, self._stream(prepared, steps)), steps)
        return await while_there(request, self._whole(prepared, steps))

    async def _whole(self, prepared: Prepared, steps: Primed[tuple[int, Chunk]]) -> Response:
        outputs = [_Output(prepared) for _ in range(prepared.job.num_outputs)]
        entries: list[list[dict[str, Any]]] = [[] for _ in outputs]
        counts, positions = Counts(), None
        try:
            async for place, chunk in steps:
                counts.add(place, chunk)
                entries[chunk.index] += outputs[chunk.index].push(chunk)[1]
                if chunk.prompt_logprobs is not None:
                    positions = chunk.prompt_logprobs
        finally:
            await steps.aclose()
        counts.reasoning = prepared.job.call.reasoning_tokens
        ask = prepared.ask
        choices = []
        for index, output in enumerate(outputs):
            choice: dict[str, Any] = {
                "index": index,
                "message": output.turn.whole(),
                "logprobs": {"content": entries[index], "refusal": None} if ask.logprobs else None,
                "finish_reason": output.finish,
                "stop_reason": output.reading.stop_reason,
            }
            if ask.return_token_ids:
                choice["token_ids"] = output.reading.token_ids
            choices.append(choice)
        body = {**_head(prepared, "chat.completion"), "choices": choices, "usage": counts.usage()}
        if positions is not None:
            body["prompt_logprobs"] = prompt_logprobs(prepared.served.tokenizer, prepared.plan.ids, positions)
        if ask.return_token_ids:
            body["prompt_token_ids"] = list(prepared.plan.ids)
        return Response(_encode(body), media_type="application/json")

    async def _stream(self, prepared: Prepared, steps: Primed[tuple[int, Chunk]]) -> AsyncGenerator[bytes, None]:
        outputs = [_Output(prepared) for _ in range(prepared.job.num_outputs)]
        ask, counts = prepared.ask, Counts()
        options = ask.stream_options
        each = options is not None and options.continuous_usage_stats
        head = _head(prepared, "chat.completion.chunk")
        # What all chunks begin with is written once.
        opening = _encode(head)[:-1] + b',"choices":'

        def chunk_of(choices: list[dict[str, Any]], with_usage: bool, more: bytes = b"") -> bytes:
            usage = b',"usage":' + _encode(counts.usage()) if with_usage else b""
            return b"data: " + opening + _encode(choices) + more + usage + b"}\n\n"

        role: dict[str, Any] = {"role": "assistant", "content": ""}
        # The prompt is all outputs' own, so it comes once.
        prompt = b',"prompt_token_ids":' + _encode(prepared.plan.ids) if ask.return_token_ids else b""
        yield b"".join(
            chunk_of(
                [{"index": i, "delta": role, "logprobs": None, "finish_reason": None}], False, b"" if i else prompt
            )
            for i in range(len(outputs))
        )
        async for place, chunk in steps:
            counts.add(place, chunk)
            output = outputs[chunk.index]
            pieces, entries = output.push(chunk)
            counts.reasoning = prepared.job.call.reasoning_tokens
            out: list[bytes] = []
            deltas = output.turn.deltas(pieces)
            if not deltas and (entries or (ask.return_token_ids and chunk.tokens)) and chunk.finish is None:
                deltas = [{"content": ""}]
            for number, delta in enumerate(deltas):
                choice: dict[str, Any] = {
                    "index": chunk.index,
                    "delta": delta,
                    # Logprobs are of tokens and not of pieces: they come with the first of a step.
                    "logprobs": {"content": entries, "refusal": None} if ask.logprobs and number == 0 else None,
                    "finish_reason": None,
                }
                if ask.return_token_ids and number == 0:
                    choice["token_ids"] = list(chunk.tokens)
                out.append(chunk_of([choice], each))
            if chunk.finish is not None:
                left = entries if ask.logprobs and not deltas else []
                last: dict[str, Any] = {
                    "index": chunk.index,
                    "delta": {},
                    "logprobs": {"content": left, "refusal": None} if left else None,
                    "finish_reason": output.finish,
                    "stop_reason": output.reading.stop_reason,
                }
                if ask.return_token_ids and not deltas:
                    last["token_ids"] = list(chunk.tokens)
                out.append(chunk_of([last], each))
            if out:
                yield b"".join(out)
        if options is not None and options.include_usage:
            yield chunk_of([], True)
        yield DONE

    # -- the prompt of a chat

    async def render(self, request: Request) -> Response:
        """The exact prompt that a chat comes to: token ids and their text, control tokens spelled."""
        ask = await read(request, ChatAsk, strict=self.service.config.strict, ignored=IGNORED)
        served = self.service.model(ask.model, caller_of(request).rights)
        plan = await self.plan(ask, served)
        text = await self.service.either(len(plan.ids), served.tokenizer.decode, plan.ids, False)
        body = {
            "object": "prompt",
            "model": ask.model or served.name,
            "prompt": text,
            "token_ids": list(plan.ids),
            "count": len(plan.ids),
            "max_model_len": served.facts.limits.max_context,
        }
        return Response(_encode(body), media_type="application/json")

    # -- Chats, for the other dialects

    async def answer(self, request: Request, body: Mapping[str, Any], operation: str) -> AsyncIterator[Said]:
        """See `serve/chats.py`."""
        call = self.service.begin(request, operation, request.url.path)
        try:
            self.service.gate.look(caller_of(request))
            ask = msgspec.convert(dict(body), ChatAsk)
            if (ask.n or 1) != 1:
                raise BadRequest("n", ask.n, "1: this dialect of chat has one answer")
            prepared = await self.prepare(request, ask)
            self.service.admit(prepared.job)
        except BaseException as error:
            end(call, error)
            raise
        output, counts = _Output(prepared), Counts()
        steps = self.service.run(prepared.job)
        try:
            async for place, chunk in steps:
                counts.add(place, chunk)
                pieces, entries = output.push(chunk)
                stop = output.reading.stop_reason
                yield Said(
                    pieces,
                    entries if ask.logprobs else (),
                    counts.prompt,
                    counts.cached,
                    counts.output,
                    output.turn.reasoning_tokens,
                    output.finish,
                    stop if isinstance(stop, str) else None,
                )
        finally:
            await steps.aclose()

    async def count(self, request: Request, body: Mapping[str, Any]) -> int:
        ask = msgspec.convert(dict(body), ChatAsk)
        served = self.service.model(ask.model, caller_of(request).rights)
        return len((await self.plan(ask, served)).ids)

    def routes(self) -> list[Route]:
        create = self.service.watch(OPERATION, ROUTE)(self.create)
        return [
            Route(ROUTE, create, methods=["POST"]),
            Route(f"{ROUTE}/render", self.render, methods=["POST"]),
        ]


def _head(prepared: Prepared, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{prepared.job.caller.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": prepared.model,
        "system_fingerprint": f"millstream-{prepared.served.facts.version}",
    }
