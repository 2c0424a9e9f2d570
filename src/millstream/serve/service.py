"""Requests on their way from a route to the engine and back: the one place where a parsed body becomes engine requests.

A `Job` is one request to the API: one or more requests to the engine, whose chunks it gives as they come. Whatever
becomes of it, it leaves its place in the queue, ends what the engine still computes for it, and is counted once.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from millstream.core.client import Chunk, EngineClient, ModelFacts
from millstream.core.errors import BadRequest, ConfigError, EngineAway, RequestFault, UnknownModel
from millstream.core.request import MAX_N, Kind, Program, SamplingParams, Slo, Tokens
from millstream.core.request import Request as Ask
from millstream.core.sequence import Finish
from millstream.engine.remote import load_tokenizer
from millstream.serve.caller import ALL_RIGHTS, LOOK, Caller, DeadlinePassed, Gate, Rights, Seat, caller_of
from millstream.serve.errors import CLIENT_GONE, ClientGone, Refused, telling
from millstream.serve.observatory import Call, Observatory
from millstream.serve.openai.shapes import (
    DEFAULTS,
    PROGRAM_HEADER,
    Sampling,
    affinity_of,
    program_of,
    salt_of,
    slo_of,
    told_id,
)
from millstream.serve.tools import Parsers
from millstream.text.grammar.compiler import GrammarCompiler
from millstream.text.tokenizer import Tokenizer

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

# Prompts of at most so many characters are cut into tokens where they are: a thread would cost more.
INLINE_CHARS = 4096
# Where a model is asked for what it does.
PATHS = {
    Kind.GENERATE: ("/v1/chat/completions", "/v1/completions"),
    Kind.EMBED: ("/v1/embeddings", "/v1/rerank", "/v1/score"),
}
# Whether the model's own sampling defaults are those of requests, in our words and in vLLM's.
GENERATION_CONFIGS = {"model": True, "none": False, "auto": True, "vllm": False}
# What traces tell of how a request is sampled.
TRACED = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
# Chunks that wait for whoever merges several requests; each request waits for its turn beyond them.
MERGED = 64


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """`[serve.api]`: what requests may ask for.

    `model_names` are what clients call the model, instead of its own name. `strict` refuses fields that are not known
    instead of telling them in a header. `chat_templates` lets clients bring a template of their own. With
    `generation_config` "none" (for vLLM "vllm") the model's own sampling defaults are left out, with "model" ("auto")
    they are those of requests. A prompt may have `prompt_bytes` of text before it is cut into tokens, a request
    `prompts` of them and `n` outputs of each. Deadlines in seconds: one for requests that bring none, and the longest
    (0: no such thing). `tool_parser` and `reasoning_parser` say how the model writes calls and thinking, "auto" goes by
    its template; without `guided_tools` nothing holds calls to their form.
    """

    model_names: tuple[str, ...] = ()
    strict: bool = False
    chat_templates: bool = False
    generation_config: str = "model"
    prompt_bytes: int = 4 << 20
    prompts: int = 256
    n: int = MAX_N
    deadline_s: float = 0.0
    max_deadline_s: float = 0.0
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    guided_tools: bool = True

    def __post_init__(self) -> None:
        if self.generation_config not in GENERATION_CONFIGS:
            allowed = ", ".join(GENERATION_CONFIGS)
            raise ConfigError(f"serve.api.generation_config: got {self.generation_config!r}, allowed is {allowed}")
        if not 1 <= self.n <= MAX_N:
            raise ConfigError(f"serve.api.n: got {self.n}, allowed is 1 to {MAX_N}")
        for name in ("prompt_bytes", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serve.api.{name}: got {getattr(self, name)}, allowed are integers from 1")
        for name in ("deadline_s", "max_deadline_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"serve.api.{name}: got {getattr(self, name)}, allowed are seconds from 0")


@dataclass(frozen=True)
class Served:
    """The model behind the API, once it is loaded."""

    facts: ModelFacts
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(slots=True)
class Part:
    """One request to the engine: its prompt, how it is sampled, and the text that it was made of."""

    ids: Sequence[int]
    params: SamplingParams
    text: str | None = None
    kind: Kind = Kind.GENERATE


@dataclass(slots=True)
class Job:
    """One request to the API, ready to be computed."""

    caller: Caller
    call: Call
    parts: Sequence[Part]
    slo: Slo = Slo()
    priority: int = 0
    salt: str = ""
    affinity: str = ""
    program: Program | None = None
    seats: list[Seat] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        """As the queue counts them. Vectors, which may be thousands, are one; how much they are, their tokens say."""
        return max(1, sum(part.params.n for part in self.parts if part.kind is not Kind.EMBED))


class Service:
    """Everything that routes stand on which generate."""

    # Those of other models, which clients may name too.
    beside: Sequence[Service] = ()

    def __init__(self, client: EngineClient, watched: Observatory, gate: Gate, config: ApiConfig = ApiConfig()) -> None:
        self.client, self.watched, self.gate, self.config = client, watched, gate, config
        self.served: Served | None = None
        self._threads = ThreadPoolExecutor(2, "millstream-text")
        self.parsers = Parsers(config.tool_parser, config.reasoning_parser, config.guided_tools)

    # -- the model

    async def load(self) -> Served:
        """Waits for the engine's model and reads its tokenizer. Raises EngineClosed, BadFile and Unsupported."""
        facts = await self.client.facts()
        tokenizer = await self.aside(load_tokenizer, facts)
        return self.take(facts, tokenizer)

    def take(self, facts: ModelFacts, tokenizer: Tokenizer) -> Served:
        """The model is there."""
        compiler = GrammarCompiler(tokenizer.vocabulary, facts.limits.vocab_size, tokenizer.stop_ids)
        own = facts.generation_config if GENERATION_CONFIGS[self.config.generation_config] else {}
        defaults = {name: own[name] for name in DEFAULTS if own.get(name) is not None}
        if own.get("do_sample") is False:
            defaults["temperature"] = 0.0
        names = tuple(dict.fromkeys(self.config.model_names)) or (shown_name(facts.model),)
        self.served = Served(facts, tokenizer, compiler, names, defaults)
        return self.served

    def served_model(self, name: str | None, rights: Rights = ALL_RIGHTS) -> Served:
        """The served model, where `name` is one of its names or not given, or the one beside it of that name.

        Raises EngineAway, and UnknownModel for one that is not there, or not for whoever has these rights.
        """
        found = [one.served for one in (self, *self.beside) if one.served is not None]
        allowed = [served for served in found if rights.may_use(served.names)]
        for served in allowed:
            if name in served.names:
                return served
        if self.served is None or (name is not None and len(found) <= len(self.beside)):
            raise EngineAway("the model is being loaded")
        if name is not None:
            raise UnknownModel(name[:200], [one for served in allowed for one in served.names])
        if self.served not in allowed:
            raise Refused(403, "forbidden", "this key may not use the model that answers where none is named", "model")
        return self.served

    def model(self, name: str | None, rights: Rights, kind: Kind = Kind.GENERATE) -> Served:
        """The same, for what not every model does, of those that are served from here. Raises BadRequest too."""
        served = self.served_model(name, rights)
        kinds = served.facts.limits.kinds
        if kind not in kinds or served is not self.served:
            paths = [path for one in Kind if one in kinds for path in PATHS.get(one, ())]
            raise BadRequest("model", served.name, f"a model that can {kind.value}; this one is for {', '.join(paths)}")
        return served

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.served is not None:
            self.served.compiler.close()

    # -- text

    async def aside(self, work: Callable[..., T], *given: Any, **named: Any) -> T:
        """Runs what takes long on a thread, so that streams go on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *given, **named))

    async def either(self, size: int, work: Callable[..., T], *given: Any, **named: Any) -> T:
        """What `work` gives for so much text, or so many tokens: at once, or of much on a thread."""
        return work(*given, **named) if size <= INLINE_CHARS else await self.aside(work, *given, **named)

    async def encode(self, served: Served, texts: Sequence[str], param: str, add_bos: bool | None) -> list[list[int]]:
        """The tokens of each text. Raises Refused, before it looks at them, where they are too long together."""
        size = size_of(texts)
        self.check_bytes(size, param)

        def all_of_them() -> list[list[int]]:
            return [served.tokenizer.encode(text, add_bos=add_bos) for text in texts]

        return await self.either(size, all_of_them)

    def check_ids(self, ids: list[int], served: Served, param: str, rights: Rights) -> None:
        """Raises BadRequest for a control token among token ids of a client that may send none.

        What stands before and behind every text is let pass: `/tokenize` gives it too.
        """
        if rights.control_tokens:
            return
        tokenizer = served.tokenizer
        inner = ids[int(ids[:1] == [tokenizer.bos_id]) :]
        inner = inner[:-1] if inner[-1:] == [tokenizer.last_id] else inner
        for token in inner:
            if token in tokenizer.special_ids:
                raise BadRequest(param, token, "ids of text: this key may not send control tokens")

    def check_bytes(self, count: int, param: str) -> None:
        if count > self.config.prompt_bytes:
            raise Refused(
                413,
                "too_large",
                f"{param}: got {count} bytes of text, at most {self.config.prompt_bytes} are taken",
                param,
            )

    # -- requests

    def watch(self, operation: str, route: str) -> Callable[[Handler], Handler]:
        """A handler whose requests are counted and logged once, however they end. Its job ends those that begin.

        It has a `look` for the door, which is there before the body is.
        """

        def look(caller: Caller) -> None:
            try:
                self.gate.look(caller)
            except Exception as error:
                end(self._call(caller, operation, route), error)
                raise

        def around(handler: Handler) -> Handler:
            @functools.wraps(handler)
            async def watched(request: Request) -> Response:
                call = self.begin(request, operation, route)
                try:
                    return await handler(request)
                except BaseException as error:
                    end(call, error)
                    raise

            setattr(watched, LOOK, look)
            return watched

        return around

    def begin(self, request: Request, operation: str, route: str) -> Call:
        """A request has arrived that is for the engine."""
        call = request.state.call = self._call(caller_of(request), operation, route)
        return call

    def _call(self, caller: Caller, operation: str, route: str) -> Call:
        call = self.watched.begin(caller.request_id, operation, route)
        call.tenant, call.label, call.traceparent = caller.tenant, caller.label, caller.traceparent
        return call

    def job(self, request: Request, ask: Sampling, served: Served, parts: Sequence[Part], most: int | None) -> Job:
        """What a request comes to, told to who watches. `most` are the tokens that it asks for. Raises BadRequest."""
        config, caller, params = self.config, caller_of(request), parts[0].params
        header = request.headers.get("x-request-timeout")
        slo = slo_of(ask, header, config.deadline_s or None, config.max_deadline_s or None)
        program = program_of(ask, request.headers.get(PROGRAM_HEADER), caller.tenant)
        call: Call = request.state.call
        call.model, call.stream, call.slo, call.max_tokens = served.name, bool(ask.stream), slo, most
        call.n = params.n * len(parts)
        if program is not None:
            # As the client wrote it: the tenant is told beside it.
            call.program, call.stage = told_id(program), program.stage
        call.sampling = {name: value for name in TRACED if (value := getattr(params, name)) is not None}
        salt, affinity = salt_of(ask, caller.salt), affinity_of(ask, caller.tenant)
        return Job(caller, call, parts, slo, ask.priority or 0, salt, affinity, program)

    def admit(self, job: Job) -> None:
        """Takes a place for all of a job. Raises BadRequest for what no engine could take, and Overloaded."""
        served = self.served_model(None)
        # The engine checks too; what it would refuse must not take a place, and is told before the first byte.
        for part in job.parts:
            self._engine_request(job, part, 0).check(served.facts.limits)
        tokens = sum(len(part.ids) for part in job.parts)
        job.seats.append(self.gate.enter(job.caller, tokens, job.num_outputs, job.slo))

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(place among the parts, chunk) of all outputs, as they come, after `admit`. Closing it ends the request.

        Raises DeadlinePassed before the first token, RequestFault, and what the client of the engine raises.
        """
        call, started = job.call, False
        chunks = self._one(job) if len(job.parts) == 1 else self._merged(job)
        try:
            async for place, chunk in chunks:
                call.heard(chunk)
                if chunk.tokens and not started:
                    started = True
                    for seat in job.seats:
                        seat.first_token()
                if chunk.finish is Finish.ERROR:
                    raise RequestFault(chunk.error or "the request failed in the engine")
                if chunk.finish is Finish.TIMEOUT and not started and not chunk.tokens:
                    raise DeadlinePassed(f"the deadline of {job.slo.deadline_s:g} s passed before the first token")
                yield place, chunk
            if not started:
                # What generates nothing has waited until its end.
                for seat in job.seats:
                    seat.first_token()
            call.end(200)
        except BaseException as error:
            end(call, error)
            raise
        finally:
            for seat in job.seats:
                seat.leave()
            await chunks.aclose()

    async def _one(self, job: Job) -> AsyncGenerator[tuple[int, Chunk], None]:
        chunks = self._submit(job, job.parts[0])
        try:
            async for chunk in chunks:
                yield 0, chunk
        finally:
            await _closed(chunks)

    async def _merged(self, job: Job) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Several requests at once; one that fails ends all of them."""
        ready: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue(MERGED)

        async def follow(place: int, part: Part) -> None:
            chunks = self._submit(job, part)
            try:
                async for chunk in chunks:
                    await ready.put((place, chunk))
                await ready.put((place, None))
            except Exception as error:
                await ready.put((place, error))
            finally:
                await _closed(chunks)

        tasks = [asyncio.create_task(follow(place, part)) for place, part in enumerate(job.parts)]
        left = len(tasks)
        try:
            while left:
                place, found = await ready.get()
                if found is None:
                    left -= 1
                elif isinstance(found, BaseException):
                    raise found
                else:
                    yield place, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _submit(self, job: Job, part: Part) -> AsyncIterator[Chunk]:
        number = self.client.new_id()
        job.call.inside(number)
        return self.client.submit(self._engine_request(job, part, number))

    def _engine_request(self, job: Job, part: Part, number: int) -> Ask:
        return Ask(
            number,
            (Tokens(tuple(part.ids)),),
            part.params,
            kind=part.kind,
            tenant=job.caller.tenant,
            program=job.program,
            slo=job.slo,
            priority=job.priority,
            background=job.caller.background,
            cache_salt=job.salt,
            affinity=job.affinity,
            label=job.caller.label,
        )


def size_of(value: Any) -> int:
    """Bytes of all texts in what a client sent: about the most that it can come to in a prompt."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return sum(map(size_of, value)) + sum(map(size_of, value.values()))
    if isinstance(value, Sequence):
        return sum(map(size_of, value))
    return 0


def shown_name(model: str) -> str:
    """What clients call a model: of a path, which is nobody's business, the last part."""
    return Path(model).name if os.sep in model and Path(model).exists() else model


def end(call: Call, error: BaseException) -> None:
    """Counts a request that an error has ended, once."""
    if isinstance(error, GeneratorExit | asyncio.CancelledError | ClientGone):
        call.end(CLIENT_GONE, "client_gone")
        return
    known = telling(error if isinstance(error, Exception) else RuntimeError(str(error)))
    call.end(known.status, known.code, known.shed)


async def _closed(chunks: AsyncIterator[Any]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()
