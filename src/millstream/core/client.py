"""The waist: whoever wants tokens speaks EngineClient, whatever makes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from millstream.core.plan import TokenLogprobs
from millstream.core.request import Request
from millstream.core.sequence import Finish


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """News of one output of a request: new tokens, and on the last one why it ended.

    `index` tells the outputs of n > 1 apart. `text/` turns tokens into words. `error` is set when `finish` is ERROR.
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


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is now."""

    waiting: int
    running: int
    free_blocks: int
    total_blocks: int
    counters: Mapping[str, float] = field(default_factory=dict)


class EngineClient(Protocol):
    """One engine, or many behind a router. Every method may be called from any task of one event loop."""

    def submit(self, request: Request) -> AsyncIterator[Chunk]:
        """Streams the chunks of all outputs of a request. Raises BadRequest or EngineClosed before the first one.

        Leaving the iterator early aborts the request. Each output ends with exactly one chunk whose `finish` is set.
        """
        ...

    async def abort(self, request_id: int) -> None:
        """Ends a request now; its outputs finish with ABORT. Unknown and finished ids are ignored."""
        ...

    async def ready(self) -> bool: ...

    async def drain(self) -> None:
        """Takes no more requests and returns when those inside have finished."""
        ...

    async def load(self) -> Load: ...

    async def adapters(self) -> Sequence[str]: ...

    async def close(self) -> None: ...
