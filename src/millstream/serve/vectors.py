"""From texts to vectors and scores: what the routes of embeddings, rerank and score stand on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.core.errors import BadRequest, RequestFault, Told
from millstream.core.request import Kind, SamplingParams
from millstream.engine.vectors import floats, probability, similarity
from millstream.serve.caller import Rights
from millstream.serve.service import INLINE_CHARS, Job, Part, Served, Service, size_of
from millstream.text.tokenizer import Tokenizer

# Up to here it is quicker done than handed to a thread.
_INLINE_PAIRS = 100

_ONE = SamplingParams(max_tokens=1, seed=0)


@dataclass(frozen=True, slots=True)
class Text:
    """What a client wants the vector of: a text or token ids; with a `second` text a pair that is scored.

    `param` is the field that it came in.
    """

    param: str
    value: str | Sequence[int]
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a text, and whether its end was cut off."""

    param: str
    ids: Sequence[int]
    cut: bool


def pick(services: Sequence[Service], name: str | None, rights: Rights) -> tuple[Service, Served]:
    """The model of a name, or of None the first that gives vectors, and what serves it.

    Raises Refused, UnknownModel, EngineAway, and BadRequest for a model that gives no vectors.
    """
    for service in services:
        served = service.served
        if served is not None and (name in served.names or (name is None and Kind.EMBED in served.facts.limits.kinds)):
            return service, service.model(name, rights, Kind.EMBED)
    return services[-1], services[-1].model(name, rights, Kind.EMBED)


async def prompts_of(service: Service, served: Served, texts: Sequence[Text], keep: int | None) -> list[Prompt]:
    """The tokens of each text, in order; of longer ones the first `keep`, or with -1 what the model takes.

    The token that stands behind every text stays there. Raises BadRequest for a text that is empty or too long.
    """
    tokenizer, most = served.tokenizer, served.facts.limits.max_context
    least = len(tokenizer.encode("")) + 1
    if keep is not None and keep != -1 and not least <= keep <= most:
        raise BadRequest("truncate_prompt_tokens", keep, f"-1 for what the model takes, or {least} to {most} tokens")
    chars = 0
    for text in texts:
        own = size_of(text.second) + (size_of(text.value) if isinstance(text.value, str) else 0)
        service.check_bytes(own, text.param)
        chars += own

    def all_of_them() -> list[Prompt]:
        return [_prompt(tokenizer, text, most, most if keep == -1 else keep) for text in texts]

    return all_of_them() if chars <= INLINE_CHARS else await service.aside(all_of_them)


def _prompt(tokenizer: Tokenizer, text: Text, most: int, keep: int | None) -> Prompt:
    ids = list(text.value) if not isinstance(text.value, str) else _said(tokenizer, text.param, text.value)
    if not ids:
        raise BadRequest(text.param, Told("an empty list"), "at least one token id")
    if text.second is not None:
        first, ids = len(ids), tokenizer.join_pair(ids, _said(tokenizer, text.param, text.second))
        if keep is not None and first + 2 > keep:
            room = f"at most {keep - 2}, so that there is room for the second one"
            raise BadRequest(text.param, Told(f"a pair whose first text has {first} tokens"), room)
    size = len(ids)
    if keep is not None and size > keep:
        end = ids[-1:] if ids[-1] == tokenizer.last_id else []
        ids = [*ids[: keep - len(end)], *end]
    elif size > most:
        cut = "with truncate_prompt_tokens: -1 the end of what is longer is left out"
        raise BadRequest(text.param, Told(f"{size} tokens"), f"at most {most}; {cut}")
    return Prompt(text.param, ids, size > len(ids))


def _said(tokenizer: Tokenizer, param: str, text: str) -> list[int]:
    try:
        ids = tokenizer.encode(text)
    except BadRequest as error:
        raise BadRequest(param, error.got, error.allowed) from None
    if not tokenizer.says_something(ids):
        raise BadRequest(param, text, "a text of at least one token")
    return ids


def parts_of(prompts: Sequence[Prompt], vocab_size: int) -> list[Part]:
    """What the engine is asked. Raises BadRequest for token ids that the model does not have."""
    for prompt in prompts:
        wrong = next((token for token in prompt.ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise BadRequest(prompt.param, wrong, f"token ids from 0 to {vocab_size - 1}")
    return [Part(prompt.ids, _ONE, kind=Kind.EMBED) for prompt in prompts]


async def vectors_of(service: Service, job: Job) -> list[array[float]]:
    """The vectors, in order. Raises what `Service.admit` and `Service.run` raise."""
    service.admit(job)
    found: dict[int, array[float]] = {}
    chunks = service.run(job)
    try:
        async for place, chunk in chunks:
            if chunk.vector is not None:
                found[place] = floats(chunk.vector)
    finally:
        await chunks.aclose()
    if len(found) < len(job.parts):
        raise RequestFault("the request was ended before all its vectors were there")
    return [found[place] for place in range(len(job.parts))]


async def scores_of(
    service: Service, found: Sequence[array[float]], pairs: Sequence[tuple[int, int]] | None
) -> list[float]:
    """How alike two texts are: the cosine of their vectors, which lie at the places that `pairs` names.

    Without `pairs` the vectors are a cross-encoder's, one for each pair, and the score is a number from 0 to 1.
    """
    if pairs is None:
        return [probability(vector[0]) for vector in found]

    def all_of_them() -> list[float]:
        return [similarity(found[one], found[other]) for one, other in pairs]

    return all_of_them() if len(pairs) <= _INLINE_PAIRS else await service.aside(all_of_them)
