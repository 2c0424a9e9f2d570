"""What clients send, as bounded types, and the sampling parameters that it comes to.

A field that is None was not given. Values are checked by `SamplingParams` and the engine, which all front ends share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from millstream.core.errors import BadRequest, Told
from millstream.core.request import MAX_N, MAX_STAGE_CHARS, Program, SamplingParams, Slo, Structured

# What OpenAI's clients send and what means nothing here: taken, and no word lost about it.
IGNORED = frozenset(
    {
        "audio", "metadata", "modalities", "prediction", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user", "verbosity", "web_search_options",
    }
)  # fmt: skip
MAX_TOP_LOGPROBS = 20
MAX_SALT = 256
MAX_PROGRAM = 256
PROGRAM_HEADER = "X-Millstream-Program"
# Of a model's own generation_config, what is a default of requests.
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Wishes(msgspec.Struct, frozen=True):
    """Seconds: to the first token, from token to token, for the whole, and after which a request ends in any case."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    deadline_s: float | None = None


class ProgramAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The place of a call in a program, which is a workflow of many calls: an agent's, a chat's, a search's.

    `id` is any name that the client gives the program. Numbers of calls are the client's own: `parents` are the `call`
    of those whose ends it waited for. `service_s`: seconds of model time that the program has had elsewhere.
    """

    id: str
    call: int | None = None
    thread: int | None = None
    stage: str | None = None
    parents: list[int] | None = None
    service_s: float | None = None


class Timed(msgspec.Struct, kw_only=True):
    """The fields that all requests have which are for an engine."""

    model: str | None = None
    priority: int | None = None
    slo: Wishes | None = None
    deadline_s: float | None = None


class Sampling(Timed, kw_only=True):
    """The fields that all requests have which generate."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    program: str | ProgramAsk | None = None
    return_token_ids: bool | None = None


class ChatAsk(Sampling, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionAsk(Sampling, kw_only=True):
    """The body of `POST /v1/completions`. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class TokensAsk(Sampling, kw_only=True):
    """The body of `POST /generate`: token ids in, token ids out. Sampling fields may lie in `sampling_params`."""

    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] | None = None
    logprobs: int | None = None
    request_id: str | None = None


class TokenizeAsk(msgspec.Struct, kw_only=True):
    """The body of `POST /tokenize`: a `prompt`, or a chat's `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeAsk(msgspec.Struct, kw_only=True):
    """The body of `POST /detokenize`."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = False


def params_of(
    ask: Sampling,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    structured: Structured | None = None,
    max_n: int = MAX_N,
    logprobs_field: str = "logprobs",
) -> SamplingParams:
    """The sampling parameters of a request; what it leaves out is `defaults`' and then the engine's own.

    `logprobs_field` is what it calls the number of alternatives.

    Raises BadRequest naming the field.
    """
    if ask.n is not None and not 1 <= ask.n <= max_n:
        raise BadRequest("n", ask.n, f"1 to {max_n}")
    given: dict[str, Any] = dict(defaults)
    for name in _PLAIN:
        value = getattr(ask, name)
        if value is not None:
            given[name] = value
    if ask.stream and ask.prompt_logprobs is not None:
        raise BadRequest("prompt_logprobs", ask.prompt_logprobs, "none with stream: true, which tells outputs only")
    if ask.stop is not None:
        given["stop"] = (ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop)
    if ask.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(ask.stop_token_ids)
    if ask.logit_bias:
        given["logit_bias"] = {_token(token): bias for token, bias in ask.logit_bias.items()}
    for name, count in ((logprobs_field, logprobs), ("prompt_logprobs", ask.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
            raise BadRequest(name, count, f"0 to {MAX_TOP_LOGPROBS}")
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=ask.prompt_logprobs,
        structured=structured,
        **given,
    )


_PLAIN = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
)  # fmt: skip


def _token(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise BadRequest("logit_bias", text, "token ids as keys")
    return int(text)


def slo_of(ask: Timed, header: str | None, default_s: float | None, most_s: float | None) -> Slo:
    """What a request wishes: its `slo`, with the deadline of `deadline_s` or of the header X-Request-Timeout (seconds).

    Raises BadRequest.
    """
    wishes = ask.slo or Wishes()
    deadline = ask.deadline_s if ask.deadline_s is not None else wishes.deadline_s
    if deadline is None and header is not None:
        try:
            deadline = float(header)
        except ValueError:
            raise BadRequest("X-Request-Timeout", header[:40], "seconds") from None
    if deadline is None:
        deadline = default_s
    if deadline is not None and most_s is not None:
        deadline = min(deadline, most_s)
    return Slo(wishes.ttft_s, wishes.tpot_s, deadline, wishes.e2e_s)


def salt_of(ask: Sampling, salt: str) -> str:
    """What keeps cached prefixes apart: the caller's own with what the request adds. Raises BadRequest."""
    if ask.cache_salt is None:
        return salt
    if not ask.cache_salt or len(ask.cache_salt) > MAX_SALT:
        raise BadRequest("cache_salt", f"{len(ask.cache_salt)} characters", f"1 to {MAX_SALT} characters")
    # Another tenant's salt cannot be spelled: each has its own before it.
    return f"{salt}\x00{ask.cache_salt}"


def affinity_of(ask: Sampling, tenant: str) -> str:
    """What routers keep the requests of one prompt_cache_key together by, the tenant's own. Raises BadRequest."""
    if ask.prompt_cache_key is None:
        return ""
    _check_words("prompt_cache_key", ask.prompt_cache_key, MAX_PROGRAM)
    return f"{tenant}{_APART}{ask.prompt_cache_key}"


def told_program(given: str | ProgramAsk | None, header: str | None) -> ProgramAsk | None:
    """What a request says of its program: in its body, an id or more, and in the header X-Millstream-Program, an id.

    Raises BadRequest, for two ids that differ too.
    """
    param = "program" if isinstance(given, str) else "program.id"
    told = ProgramAsk(given) if isinstance(given, str) else given
    if told is not None:
        _check_words(param, told.id, MAX_PROGRAM)
    if header is None:
        return told
    # What of it is not ASCII, client and server may read differently.
    if not header.isascii():
        raise BadRequest(PROGRAM_HEADER, header, "printable ASCII characters")
    _check_words(PROGRAM_HEADER, header, MAX_PROGRAM)
    if told is None:
        return ProgramAsk(header)
    if told.id != header:
        raise BadRequest(PROGRAM_HEADER, header, f"the id that the body has as {param}, or only one of the two")
    return told


def program_of(ask: Sampling, header: str | None, tenant: str) -> Program | None:
    """The place of a request in a program of its tenant's. Raises BadRequest."""
    told = told_program(ask.program, header)
    if told is None:
        return None
    given = {name: value for name in _PLACE if (value := getattr(told, name)) is not None}
    if told.stage:
        _check_words("program.stage", told.stage, MAX_STAGE_CHARS)
    # Another tenant's program cannot be spelled: no id has a control character.
    return Program(f"{tenant}{_APART}{told.id}" if tenant else told.id, **given)


def told_id(program: Program) -> str:
    """The id of a program of `program_of` as the client wrote it."""
    return program.id.rpartition(_APART)[2]


_APART = "\x00"


_PLACE = ("call", "thread", "stage", "parents", "service_s")


def _check_words(param: str, text: str, most: int) -> None:
    if not 0 < len(text) <= most:
        raise BadRequest(param, Told(f"{len(text)} characters"), f"1 to {most} characters")
    if not text.isprintable():
        raise BadRequest(param, text, "printable characters")


def structured_fields(ask: Sampling) -> dict[str, Any]:
    """What a request says of the form of its outputs, for `structured_of`."""
    return {name: value for name in _STRUCTURED if (value := getattr(ask, name)) is not None}


_STRUCTURED = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "guided_whitespace_pattern",
)  # fmt: skip
