"""The offline API: a model in this process, its engine on a background thread.

llm = LLM("smollm2-135m")
for out in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
    print(out.outputs[0].text)
"""

from __future__ import annotations

import math
import queue
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from millstream.config.load import blamed_on, build, merge, read_file
from millstream.config.schema import EngineConfig
from millstream.core.client import Chunk
from millstream.core.errors import BadRequest, RequestFault
from millstream.core.events import Event
from millstream.core.registry import Choice
from millstream.core.request import Kind, Request, SamplingParams, Tokens
from millstream.engine.assemble import Assembled, assemble, facts_of
from millstream.engine.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    OutputBuilder,
    RankedDocument,
    RequestOutput,
    ScoreOutput,
)
from millstream.engine.thread import AsyncEngine, EngineThread
from millstream.engine.vectors import best, check_dimensions, check_pairs, floats, probability, shortened, similarity
from millstream.text.chat import ChatTemplate, encode_chat, template_of
from millstream.text.grammar.compiler import GrammarCompiler
from millstream.text.reasoning import opened_by
from millstream.text.tokenizer import Tokenizer
from millstream.text.tools import plan
from millstream.text.tools.asked import toolbox_of
from millstream.text.tools.output import OutputReader
from millstream.text.tools.plan import Ask, Dialect, Guided, dialect_of
from millstream.text.tools.protocol import Toolbox, Whole

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
Progress = Callable[[RequestOutput], None]


def engine_config(config: EngineConfig | Mapping[str, Any] | str | Path | None, **options: Any) -> EngineConfig:
    """A config from a file, a tree or nothing, with options over it.

    `dtype`, `weights` and `max_context` are the model's. Raises ConfigError for keys that do not exist, naming the
    nearest.
    """
    if isinstance(config, EngineConfig):
        if not options:
            return config
        from millstream.config.load import tree_of

        tree: Mapping[str, Any] = tree_of(config)
    elif isinstance(config, str | Path):
        tree = read_file(config)
    else:
        tree = config or {}
    file = config if isinstance(config, str | Path) else None
    short = {key: options.pop(key) for key in ("dtype", "weights", "max_context") if key in options}
    with blamed_on(file):
        return build(EngineConfig, merge(tree, options, {"model": short} if short else {}))


class _Front:
    """What the offline and the async API share: prompts in, requests out."""

    def __init__(
        self,
        model: str,
        config: EngineConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        listeners: Sequence[Callable[[Event], None]] = (),
        progress: Any = None,
        notice: Any = None,
        **options: Any,
    ) -> None:
        self.assembled: Assembled = assemble(
            model, engine_config(config, **options), listeners=listeners, progress=progress, notice=notice, tune=True
        )
        self.model = model
        self.thread = EngineThread(self.assembled.engine)
        self._grammars: GrammarCompiler | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.assembled.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def get_default_sampling_params(self, **over: Any) -> SamplingParams:
        """What the model's generation_config asks for, with `over` put over it."""
        given = self.assembled.source.generation_config
        known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        defaults = {name: given[name] for name in known if given.get(name) is not None}
        if given.get("do_sample") is False:
            defaults["temperature"] = 0.0
        return SamplingParams(**{**defaults, **over})

    def prompt_ids(self, prompt: Prompt, param: str = "prompt") -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and its ids. Raises BadRequest naming `param`."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                raise BadRequest(param, prompt, "a text of at least one token")
            return prompt, ids
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.prompt_ids(prompt["prompt_token_ids"], param)[1]
            if isinstance(prompt.get("prompt"), str):
                return self.prompt_ids(prompt["prompt"], param)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | str):
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
                raise BadRequest(param, prompt, "token ids, all integers")
            return None, [int(token) for token in prompt]
        raise BadRequest(param, prompt, "a text, a list of token ids, or {'prompt_token_ids': [...]}")

    def chat_ids(
        self, messages: Messages, chat_template: str | None = None, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """The ids of a chat by the model's own template, or by `chat_template`."""
        tokenizer = self.tokenizer
        template = template_of(tokenizer) if chat_template is None else ChatTemplate(chat_template)
        return encode_chat(tokenizer, template, messages, add_generation_prompt=add_generation_prompt, **kwargs)

    def request(self, ids: Sequence[int], params: SamplingParams, **given: Any) -> Request:
        return Request(
            self.thread.new_id(),
            (Tokens(tuple(ids)),),
            params,
            arrival=self.assembled.engine.clock.now(),
            **given,
        )

    @property
    def grammars(self) -> GrammarCompiler:
        """Says whether a grammar can be taken; its process starts with the first one."""
        if self._grammars is None:
            tokenizer = self.tokenizer
            self._grammars = GrammarCompiler(tokenizer.vocabulary, self.assembled.spec.vocab_size, tokenizer.stop_ids)
        return self._grammars

    def checked(self, params: SamplingParams) -> SamplingParams:
        """`params` with a grammar that the engine can take. Raises BadRequest naming what is wrong with it."""
        if params.structured is None:
            return params
        return replace(params, structured=self.grammars.check(params.structured).structured)

    def _close_grammars(self) -> None:
        if self._grammars is not None:
            self._grammars.close()

    @property
    def metrics(self) -> dict[str, float]:
        """Of the whole run so far: most sequences at once, forward passes, prefix hits and what the runner counted."""
        engine = self.assembled.engine
        counters = self.assembled.built.runner.counters
        return {
            "max_running": engine.max_running,
            "steps": engine.num_steps,
            "forward_passes": counters.forwards,
            "computed_tokens": counters.tokens,
            "forward_s": counters.busy_s,
            **{name: float(value) for name, value in engine.scheduler.ledger.stats().items()},
        }


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the outputs of one chat are read."""

    dialect: Dialect
    toolbox: Toolbox
    opened: bool
    certain: bool

    def tell_apart(self, out: CompletionOutput) -> None:
        found, reader = Whole(), self.reader()
        found.add(reader.push(out.text))
        found.add(reader.finish())
        out.text, out.reasoning, out.tool_calls = found.content, found.reasoning, found.calls

    def reader(self) -> OutputReader:
        return plan.reader_of(self.dialect, self.toolbox, self.opened, self.certain)


class LLM(_Front):
    """A model to call from ordinary code. Options are those of the config tree, for example
    `LLM("smollm2-135m", max_context=2048, cache={"bytes": "1GiB"}, sched={"policies": ["fcfs"]})`.

    Raises UnknownModel, ModelError, ConfigError or DownloadError.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        **given: Any,
    ) -> list[RequestOutput]:
        """Outputs in the order of the prompts, which run together. One prompt or many; one SamplingParams or one each.

        `given` are fields of all of the requests, such as `priority`, `slo` or `program`.
        `progress` is called with each request as it finishes. Raises BadRequest, naming the prompt, before anything
        runs. A request that fails in the engine has finish_reason "error" and says why in `error`.
        """
        many = self._many(prompts)
        prepared = [self.prompt_ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(many)]
        return self._run(prepared, self._params(sampling_params, len(many)), progress, given)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
        progress: Progress | None = None,
        **given: Any,
    ) -> list[RequestOutput]:
        """Answers to one chat (a list of messages) or several. Raises BadRequest, also for a model without template.

        `tools` are functions as in OpenAI's API, for all chats or a list for each; with them an output has
        `tool_calls`. A structured answer of a model that thinks may have its thinking before it.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise BadRequest("messages", messages, "a list of messages such as {'role': 'user', 'content': 'Hello'}")
        chats: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        each = bool(tools) and tools is not None and not isinstance(tools[0], Mapping)
        boxes = [toolbox_of(own, tool_choice, parallel_tool_calls) for own in (tools or [] if each else [tools])]
        boxes = boxes if each else boxes * len(chats)
        if len(boxes) != len(chats):
            raise BadRequest(
                "tools", f"{len(boxes)} lists", f"one list of tools, or one for each of {len(chats)} chats"
            )
        dialect = dialect_of(self.tokenizer, template=chat_template)
        prepared: list[tuple[str | None, list[int]]] = []
        params: list[SamplingParams] = []
        readings: list[_Reading | None] = []
        for chat, own, box in zip(chats, self._params(sampling_params, len(chats)), boxes, strict=True):
            messages, told = plan.prepared(dialect, chat, box)
            ids = self.chat_ids(messages, chat_template, add_generation_prompt, tools=told)
            opened = dialect.tags is not None and opened_by(self.tokenizer.decode(ids[-16:], False), dialect.tags)
            held = Guided(None, False)
            if box is not None or own.structured is not None:
                held = plan.guide(self.grammars, Ask(dialect, self.tokenizer, box, own.structured, opened))
            prepared.append((None, ids))
            params.append(replace(own, structured=held.structured))
            readings.append(None if box is None else _Reading(dialect, box, opened, held.certain))
        shown = dialect.marks(self.tokenizer) if any(box is not None for box in boxes) else frozenset()
        outputs = self._run(prepared, params, progress, given, shown)
        for output, reading in zip(outputs, readings, strict=True):
            for one in output.outputs:
                if reading is not None:
                    reading.tell_apart(one)
        return outputs

    def score(self, texts: Prompt | Sequence[Prompt], *, top: int = 0) -> list[ScoreOutput]:
        """How likely each text is: prefill only, nothing is generated. `top` alternatives are given a position."""
        many = self._many(texts)
        prepared = [self.prompt_ids(text, f"texts[{i}]") for i, text in enumerate(many)]
        params = SamplingParams(max_tokens=1, prompt_logprobs=top)
        outputs = self._run(prepared, [params] * len(many), None, {"kind": Kind.SCORE})
        scored = []
        for out in outputs:
            if out.outputs[0].error is not None:
                raise RequestFault(out.outputs[0].error)
            positions = out.prompt_logprobs or [None]
            ids = out.prompt_token_ids
            total = sum(entry[token].logprob for token, entry in zip(ids, positions, strict=True) if entry is not None)
            count = len(ids) - 1
            perplexity = math.exp(-total / count) if count else math.nan
            scored.append(ScoreOutput(out.prompt, ids, positions, total, count, perplexity))
        return scored

    def embed(self, texts: Prompt | Sequence[Prompt], *, dimensions: int | None = None) -> list[EmbeddingOutput]:
        """The vector of each text, by an embedding model; with `dimensions` cut to so many numbers.

        Raises BadRequest for a model that gives no vectors, and for texts that it cannot take.
        """
        many = self._many(texts)
        check_dimensions(dimensions, self._vector_facts("embed"))
        prepared = [self._text_ids(text, f"texts[{i}]") for i, text in enumerate(many)]
        vectors = self._vectors([ids for _, ids in prepared], "texts")
        return [
            EmbeddingOutput(text, ids, list(shortened(vector, dimensions)))
            for (text, ids), vector in zip(prepared, vectors, strict=True)
        ]

    def similarity(self, first: str | Sequence[str], second: str | Sequence[str]) -> list[float]:
        """How alike two texts are: one against each of several, or several pairs.

        By an embedding model the cosine of their vectors; by one that scores pairs (a cross-encoder) a number from 0
        to 1. Raises BadRequest.
        """
        ones, others = (
            [first] if isinstance(first, str) else list(first),
            [second] if isinstance(second, str) else list(second),
        )
        if len(ones) == 1:
            ones *= len(others)
        if len(ones) != len(others):
            raise BadRequest("second", f"{len(others)} texts", f"as many as the first, {len(ones)}, or one first text")
        if check_pairs(self._vector_facts("score")):
            ids = [self.tokenizer.encode_pair(one, other) for one, other in zip(ones, others, strict=True)]
            return [probability(vector[0]) for vector in self._vectors(ids, "pairs")]
        texts = list(dict.fromkeys([*ones, *others]))
        vectors = dict(
            zip(texts, self._vectors([self._text_ids(text, "texts")[1] for text in texts], "texts"), strict=True)
        )
        return [similarity(vectors[one], vectors[other]) for one, other in zip(ones, others, strict=True)]

    def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[RankedDocument]:
        """The documents from the one that fits the query best on, at most `top_n` of them. Raises BadRequest."""
        if isinstance(documents, str) or not documents:
            raise BadRequest("documents", documents, "a list of at least one text")
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
            raise BadRequest("top_n", top_n, "an integer from 1")
        scores = self.similarity(query, documents)
        return [RankedDocument(place, score, documents[place]) for place, score in best(scores, top_n)]

    def _vector_facts(self, asked: str) -> Mapping[str, Any]:
        facts = self.assembled.spec.vectors
        if not facts:
            raise BadRequest("model", self.model, f"one that gives vectors, such as all-minilm-l6-v2, to {asked}")
        return facts

    def _text_ids(self, text: Prompt, param: str) -> tuple[str | None, list[int]]:
        found, ids = self.prompt_ids(text, param)
        if found is not None and not self.tokenizer.says_something(ids):
            raise BadRequest(param, found, "a text of at least one token")
        return found, ids

    def _vectors(self, prompts: Sequence[list[int]], param: str) -> list[array[float]]:
        """One vector for each prompt, in order; they run together. Raises BadRequest and RequestFault."""
        vectors: dict[int, array[float]] = {}
        ended: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        requests = []
        for place, ids in enumerate(prompts):
            request = self.request(ids, SamplingParams(max_tokens=1), kind=Kind.EMBED)
            try:
                self.assembled.engine.num_outputs(request)
            except BadRequest as error:
                raise BadRequest(f"{param}[{place}]: {error.param}", error.got, error.allowed) from None
            requests.append(request)
        unfinished = {request.id for request in requests}
        try:
            for request in requests:
                self.thread.submit(request, ended.put)
            while unfinished:
                chunk = ended.get()
                unfinished.discard(chunk.request_id)
                if chunk.vector is None:
                    raise RequestFault(chunk.error or "the request ended without a vector")
                vectors[chunk.request_id] = floats(chunk.vector)
        finally:
            for request_id in unfinished:
                self.thread.abort(request_id)
        return [vectors[request.id] for request in requests]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int = 4,
        max_tokens: int = 16,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        ignore_eos: bool = False,
    ) -> list[RequestOutput]:
        """The `beam_width` best continuations of each prompt, best first, over forks of the KV."""
        choice = Choice(
            "beam", {"width": beam_width, "length_penalty": length_penalty, "early_stopping": early_stopping}
        )
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        many = self._many(prompts)
        prepared = [self.prompt_ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(many)]
        return self._run(prepared, [params] * len(many), None, {"decode": choice})

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **given: Any) -> Iterator[str]:
        """The text of one output as it comes. Leaving early aborts the request. Raises RequestFault when it fails."""
        text, ids = self.prompt_ids(prompt)
        params = sampling_params or self.get_default_sampling_params()
        request = self.request(ids, self.checked(params), **given)
        if self.assembled.engine.num_outputs(request) != 1:
            raise BadRequest("n", params.n, "1 when streaming")
        builder = OutputBuilder(request.id, text, ids, params, 1, self.tokenizer)
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self.thread.submit(request, chunks.put)
        done = False
        try:
            while not done:
                chunk = chunks.get()
                done = chunk.finish is not None
                if piece := builder.add(chunk):
                    yield piece
                if chunk.error is not None:
                    raise RequestFault(chunk.error)
        finally:
            if not done:
                self.thread.abort(request.id)

    def close(self) -> None:
        self._close_grammars()
        self.thread.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _many(prompts: Any) -> Sequence[Any]:
        if isinstance(prompts, str | Mapping):
            return [prompts]
        if not isinstance(prompts, Sequence):
            raise BadRequest("prompts", prompts, "a prompt or a list of prompts")
        if prompts and isinstance(prompts[0], int):
            return [prompts]
        return prompts

    def _params(self, given: Any, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or not all(isinstance(own, SamplingParams) for own in given):
            raise BadRequest("sampling_params", given, "SamplingParams, or a list of them")
        if len(given) != count:
            raise BadRequest("sampling_params", f"{len(given)} of them", f"one, or one for each of {count} prompts")
        return list(given)

    def _run(
        self,
        prepared: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        progress: Progress | None,
        given: Mapping[str, Any],
        shown: frozenset[int] = frozenset(),
    ) -> list[RequestOutput]:
        engine = self.assembled.engine
        builders: dict[int, OutputBuilder] = {}
        requests = []
        for place, ((text, ids), own) in enumerate(zip(prepared, params, strict=True)):
            try:
                request = self.request(ids, self.checked(own), **given)
                count = engine.num_outputs(request)
            except BadRequest as error:
                raise BadRequest(f"prompts[{place}]: {error.param}", error.got, error.allowed) from None
            builders[request.id] = OutputBuilder(request.id, text, ids, own, count, self.tokenizer, shown)
            requests.append(request)
        # Nobody reads along, so text is made once an output is whole: until then this thread leaves the cores alone.
        chunks: dict[int, deque[Chunk]] = {request_id: deque() for request_id in builders}
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()

        def sink(chunk: Chunk) -> None:
            chunks[chunk.request_id].append(chunk)
            if chunk.finish is not None:
                ended.put(chunk.request_id)

        unfinished = set(builders)
        try:
            for request in requests:
                self.thread.submit(request, sink)
            while unfinished:
                request_id = ended.get()
                builder = builders[request_id]
                while chunks[request_id]:
                    builder.add(chunks[request_id].popleft())
                if builder.output.finished and request_id in unfinished:
                    unfinished.discard(request_id)
                    if progress is not None:
                        progress(builder.output)
        finally:
            for request_id in unfinished:
                self.thread.abort(request_id)
        return [builders[request.id].output for request in requests]


class AsyncLLM(_Front):
    """The same model for an event loop; `client` is the EngineClient beneath."""

    def __init__(self, model: str, config: Any = None, **options: Any) -> None:
        super().__init__(model, config, **options)
        self.client = AsyncEngine(self.thread, facts_of(self.assembled, model))

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **given: Any
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, each time it grew; the last one has `finished`. Leaving early aborts the request."""
        text, ids = self.prompt_ids(prompt)
        params = sampling_params or self.get_default_sampling_params()
        if params.structured is not None:
            ready = await self.grammars.check_async(params.structured)
            params = replace(params, structured=ready.structured)
        request = self.request(ids, params, **given)
        count = self.assembled.engine.num_outputs(request)
        builder = OutputBuilder(request.id, text, ids, params, count, self.tokenizer)
        async for chunk in self.client.submit(request):
            builder.add(chunk)
            yield builder.output

    async def close(self) -> None:
        self._close_grammars()
        await self.client.close()
