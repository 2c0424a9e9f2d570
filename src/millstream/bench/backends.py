"""The HTTP APIs that can be loaded: what a request looks like, and what its answer says.

A backend knows its endpoint, writes the body for a sample, and reads answers: one event of a stream at a time, or a
whole body. It tells text that a user would see from the rest, so that TTFT is the first such text and not an empty
first event.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from millstream.bench.samples import Sample


@dataclass(frozen=True, slots=True)
class Said:
    """What one event (or a whole answer) says. `text` is None where it brings none."""

    text: str | None = None
    num_prompt: int | None = None
    num_output: int | None = None
    cached: int | None = None
    finish: str | None = None
    error: str | None = None


NOTHING = Said()


@dataclass(frozen=True, slots=True)
class Options:
    """What is the same in all bodies of a run."""

    model: str
    stream: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    endpoint: str
    streams: bool

    def body(self, sample: Sample, options: Options) -> dict[str, Any]: ...

    def read(self, data: bytes) -> Said:
        """One event's data, or a whole answer. Raises msgspec.DecodeError when it is no JSON of this API."""
        ...


# Only what is counted is decoded; the rest of an event is skipped over.
class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None

    def said(self, text: str | None = None, finish: str | None = None) -> Said:
        details = self.prompt_tokens_details or self.input_tokens_details
        return Said(
            text,
            self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens,
            self.completion_tokens if self.completion_tokens is not None else self.output_tokens,
            details.cached_tokens if details else self.cache_read_input_tokens,
            finish,
        )


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Typed(msgspec.Struct):
    type: str = ""
    delta: Any = None
    response: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    content: list[dict[str, Any]] | None = None
    output: list[dict[str, Any]] | None = None
    usage: _Usage | None = None
    stop_reason: str | None = None
    status: str | None = None
    error: Any = None


_answer = msgspec.json.Decoder(_Answer).decode
_typed = msgspec.json.Decoder(_Typed).decode


def _told(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _shown(message: dict[str, Any] | None) -> str:
    """Text that a user would see, reasoning and the arguments of calls included."""
    if not message:
        return ""
    text = "".join(message.get(key) or "" for key in ("content", "reasoning_content", "reasoning"))
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        text += (function.get("name") or "") + (function.get("arguments") or "")
    return text


class _OpenAI:
    streams = True

    def read(self, data: bytes) -> Said:
        if data == b"[DONE]":
            return NOTHING
        answer = _answer(data)
        if answer.error is not None:
            return Said(error=_told(answer.error))
        text, finish = "", None
        for choice in answer.choices:
            text += choice.text or _shown(choice.delta) or _shown(choice.message)
            finish = choice.finish_reason or finish
        if answer.usage is not None:
            return answer.usage.said(text or None, finish)
        return Said(text or None, finish=finish)

    def _common(self, sample: Sample, options: Options) -> dict[str, Any]:
        body: dict[str, Any] = {"model": options.model, "stream": options.stream}
        if options.stream:
            body["stream_options"] = {"include_usage": True}
        if options.ignore_eos:
            body["ignore_eos"] = True
        return body


class Completions(_OpenAI):
    endpoint = "/v1/completions"

    def body(self, sample: Sample, options: Options) -> dict[str, Any]:
        body = {"prompt": sample.prompt, "max_tokens": sample.max_tokens, **self._common(sample, options)}
        if options.logprobs is not None:
            body["logprobs"] = options.logprobs
        return {**body, **options.extra_body}


class Chat(_OpenAI):
    endpoint = "/v1/chat/completions"

    def body(self, sample: Sample, options: Options) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": sample.prompt}],
            "max_completion_tokens": sample.max_tokens,
            **self._common(sample, options),
        }
        if options.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": options.logprobs}
        return {**body, **options.extra_body}


class Embeddings(_OpenAI):
    endpoint = "/v1/embeddings"
    streams = False

    def body(self, sample: Sample, options: Options) -> dict[str, Any]:
        return {"model": options.model, "input": sample.prompt, **options.extra_body}

    def read(self, data: bytes) -> Said:
        return replace(super().read(data), num_output=0)


class Responses:
    endpoint = "/v1/responses"
    streams = True

    def body(self, sample: Sample, options: Options) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": options.model,
            "input": sample.prompt,
            "max_output_tokens": sample.max_tokens,
            "stream": options.stream,
            "store": False,
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return {**body, **options.extra_body}

    def read(self, data: bytes) -> Said:
        if data == b"[DONE]":
            return NOTHING
        event = _typed(data)
        if event.type.endswith(".delta") and isinstance(event.delta, str):
            return Said(event.delta or None)
        if event.type == "error" or event.type == "response.failed":
            return Said(error=_told(event.error or (event.response or {}).get("error")))
        done = event.response if event.type in ("response.completed", "response.incomplete") else None
        if done is not None:
            usage = msgspec.convert(done.get("usage") or {}, _Usage)
            return usage.said(finish=str(done.get("status")))
        if event.output is not None:  # not streamed
            texts = [part.get("text") or "" for item in event.output for part in item.get("content") or ()]
            return (event.usage or _Usage()).said("".join(texts) or None, event.status)
        return NOTHING


class Messages:
    endpoint = "/v1/messages"
    streams = True

    def body(self, sample: Sample, options: Options) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": options.model,
            "messages": [{"role": "user", "content": sample.prompt}],
            "max_tokens": sample.max_tokens,
            "stream": options.stream,
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return {**body, **options.extra_body}

    def read(self, data: bytes) -> Said:
        event = _typed(data)
        if event.type == "content_block_delta" and isinstance(event.delta, dict):
            parts = (event.delta.get(key) or "" for key in ("text", "thinking", "partial_json"))
            return Said("".join(parts) or None)
        if event.type == "error":
            return Said(error=_told(event.error))
        if event.type == "message_start":
            usage = msgspec.convert((event.message or {}).get("usage") or {}, _Usage)
            return Said(num_prompt=usage.input_tokens, cached=usage.cache_read_input_tokens)
        if event.type == "message_delta":
            finish = event.delta.get("stop_reason") if isinstance(event.delta, dict) else None
            return Said(num_output=event.usage.output_tokens if event.usage else None, finish=finish)
        if event.type == "message" and event.content is not None:
            texts = [block.get("text") or block.get("thinking") or "" for block in event.content]
            return (event.usage or _Usage()).said("".join(texts) or None, event.stop_reason)
        return NOTHING


BACKENDS: dict[str, Backend] = {
    "openai": Completions(),
    "vllm": Completions(),
    "openai-chat": Chat(),
    "openai-responses": Responses(),
    "openai-embeddings": Embeddings(),
    "anthropic": Messages(),
}
