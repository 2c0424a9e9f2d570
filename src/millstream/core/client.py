"""The waist: whoever wants tokens speaks EngineClient, whatever makes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from millstream.core.events import Event
from millstream.core.plan import TokenLogprobs
from millstream.core.record import record
from millstream.core.registry import Choice
from millstream.core.request import Limits, Request
from millstream.core.sequence import Finish


@record
class Usage:
    """Token counts of one output. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds in the engine's clock, from arrival; None where it never happened."""

    queue_s: float | None
    ttft_s: float | None
    total_s: float | None
    preemptions: int = 0

    @property
    def worked_s(self) -> float:
        """From its first place in a step to its end, waits after preemptions included."""
        return 0.0 if self.total_s is None or self.queue_s is None else self.total_s - self.queue_s


@record
class Chunk:
    """News of one output of a request: new tokens, and on the last one why it ended.

    `index` tells the outputs of n > 1 apart. `text/` turns tokens into words. `error` is set when `finish` is ERROR.
    `vector` is what came of a request for an embedding: float32, little-endian, on its last chunk.
    `stop_token`: the last token ended the output and is no part of its text.
    """

    request_id: int
    index: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    vector: bytes | None = None
    finish: Finish | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    cumulative_logprob: float = 0.0
    # A method that rewrites history (beam search) gives the whole output here on the last chunk.
    replaced: tuple[int, ...] | None = None
    stop_token: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is now."""

    waiting: int
    running: int
    free_blocks: int
    total_blocks: int
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What there is to know of a served model without loading it again.

    `path` is the file or folder that it was read from; its tokenizer is there too. `family` is its architecture,
    `quantization` how most of its weights are stored in the file, `weights` and `dtype` how they are kept. `decode` is
    the method of a request that names none. `generation_config` holds the model's own sampling defaults. `config` is
    the engine's config tree, and `decisions` (name, value, reason) what became of each "auto" in it.
    `phases` are seconds of the start, by what was done. `seed` is the config's, for requests that have none.
    `vectors`, of a model that gives vectors: their `width`, the `pooling`, whether they have length 1 (`normalize`),
    and for a classifier how many `labels` it scores.
    """

    model: str
    path: str
    family: str
    num_parameters: int
    quantization: str
    weights: str
    dtype: str
    limits: Limits
    block_size: int
    total_blocks: int
    decode: Choice = Choice("autoregressive")
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    decisions: tuple[tuple[str, str, str], ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    kv_bytes: int = 0
    seed: int | None = None
    version: str = ""
    vectors: Mapping[str, Any] = field(default_factory=dict)


class EngineClient(Protocol):
    """One engine, or many behind a router. Every method may be called from any task of one event loop."""

    def new_id(self) -> int:
        """An id that no request of this client has had."""
        ...

    async def facts(self) -> ModelFacts:
        """Waits until the model is loaded. Raises EngineClosed when it will not be."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Chunk]:
        """Streams the chunks of all outputs of a request. Raises BadRequest or EngineClosed before the first one.

        Leaving the iterator early aborts the request. Each output ends with exactly one chunk whose `finish` is set.
        """
        ...

    async def abort(self, request_id: int) -> None:
        """Ends a request now; its outputs finish with ABORT. Unknown and finished ids are ignored."""
        ...

    def events(self, *kinds: type[Event]) -> AsyncIterator[Event]:
        """What happens from now on, in order; of the given kinds only, where some are given.

        Asking for Computed gives Prefilled too, which is a kind of it. What a Computed or Emitted costs is paid a row
        and step, so ask for what is read. Views of sequences are as they were at the event. Whoever reads too slowly
        loses the oldest ones (`EventFeed.lost` counts them).
        """
        ...

    async def call(self, name: str, **given: Any) -> Any:
        """One of the small calls of `engine/calls.py`, between two steps. Raises UnknownName, and what it raises."""
        ...

    async def ready(self) -> bool:
        """Whether a request sent now would be served: the model is loaded, steps are made, and nothing drains."""
        ...

    async def drain(self) -> None:
        """Takes no more requests and returns when those inside have finished."""
        ...

    async def load(self) -> Load: ...

    async def adapters(self) -> Sequence[str]: ...

    async def close(self) -> None: ...
