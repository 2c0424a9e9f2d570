"""A request on its way through engines that may be lost: what it has come to, and what its reader has not read yet.

An engine that takes it up goes on from the tokens that there are (`Request.prior`). Seeds are fixed before a request is
sent, and random numbers are functions of (seed, output, position), so the text goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from millstream.core import registry
from millstream.core.client import Chunk, ModelFacts
from millstream.core.errors import BadRequest, EngineAway, MillstreamError
from millstream.core.plan import TokenLogprobs
from millstream.core.request import MAX_SEED, Prior, Request
from millstream.core.sequence import Finish
from millstream.decode.protocol import DecodeMethod

# The engine ends a request at its deadline itself, and says how far it came; only one that does not is not waited for.
DEADLINE_GRACE_S = 0.5
# Chunks that nobody has read yet are joined: what a slow reader costs is then bounded by the tokens themselves.
JOIN_FROM = 32


@dataclass(slots=True)
class Output:
    """What one output has come to."""

    tokens: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    ended: bool = False

    @property
    def begun(self) -> bool:
        return self.ended or bool(self.tokens)


class Stream:
    """One request on its way, and what its reader has not read yet. Times are of `time.monotonic()`.

    A seed is given to a request that has none. `left` outputs have not ended. `losses` counts the engines that were
    lost while it was inside. `first_s` is when its first token came, from its arrival, `last_s` when its last did.
    """

    def __init__(self, request: Request, facts: ModelFacts, seeds: random.Random, now: float) -> None:
        method = cast(DecodeMethod, registry.make("decode", request.decode or facts.decode))
        if request.params.seed is None:
            # An engine that takes it up must draw the same numbers.
            request = replace(request, params=replace(request.params, seed=seeds.randrange(MAX_SEED)))
        self.request, self.resumes = request, method.resumes
        self.arrived = min(request.arrival or now, now)
        self.outputs = [Output() for _ in range(method.num_outputs(request))]
        for prior in request.prior:
            if not 0 <= prior.index < len(self.outputs):
                raise BadRequest("prior", prior.index, f"outputs from 0 to {len(self.outputs) - 1}")
            self.outputs[prior.index] = Output(list(prior.tokens), prior.cumulative_logprob, prior.ended)
        self.left = sum(not output.ended for output in self.outputs)
        self.losses = 0
        self.first_s: float | None = None
        self.last_s = 0.0
        self.error: MillstreamError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._scores: tuple[TokenLogprobs | None, ...] | None = None
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()

    @property
    def begun(self) -> bool:
        return any(output.begun for output in self.outputs)

    @property
    def unread(self) -> bool:
        """Whether its reader has anything to wait for, or to read."""
        return self.left > 0 or bool(self._chunks)

    def again(self) -> Request:
        """The request as the next engine must have it."""
        request = self.request
        prior = tuple(
            Prior(index, tuple(one.tokens), one.cumulative_logprob, one.ended)
            for index, one in enumerate(self.outputs)
            if one.begun
        )
        if prior:
            # The logprobs of the prompt came with the first of these tokens.
            request = replace(request, prior=prior, params=replace(request.params, prompt_logprobs=None))
        return request

    def take(self, chunk: Chunk, now: float) -> None:
        """News from the engine. What comes after an output's end is not meant for it."""
        if not 0 <= chunk.index < len(self.outputs) or self.outputs[chunk.index].ended:
            return
        output = self.outputs[chunk.index]
        first = not output.begun
        if chunk.tokens or chunk.replaced:
            self.last_s = now - self.arrived
            self.first_s = self.last_s if self.first_s is None else self.first_s
        output.tokens += chunk.tokens
        output.cumulative_logprob = chunk.cumulative_logprob
        changes: dict[str, Any] = {}
        if self.request.params.prompt_logprobs is not None and first and len(self.outputs) > 1:
            self._scores = self._scores or chunk.prompt_logprobs
            changes["prompt_logprobs"] = self._scores
        if chunk.request_id != self.request.id:
            changes["request_id"] = self.request.id
        if chunk.finish is not None:
            output.ended = True
            self.left -= 1
            if self.losses and chunk.metrics is not None:
                # The engine that ended it has not seen its beginning. All times by one clock, then: this process's.
                queue_s, total_s = chunk.metrics.queue_s, now - self.arrived
                if queue_s is not None:
                    queue_s = min(queue_s, total_s if self.first_s is None else self.first_s)
                changes["metrics"] = replace(chunk.metrics, queue_s=queue_s, ttft_s=self.first_s, total_s=total_s)
        self._put(replace(chunk, **changes) if changes else chunk)

    def lost(self, max_losses: int) -> EngineAway | None:
        """An engine was lost with it inside: why it cannot go on elsewhere, None where it can.

        One that was inside too often may be what kills them.
        """
        self.losses += 1
        if self.losses >= max_losses:
            return EngineAway(f"the engine was lost {self.losses} times while this request was inside")
        if not self.resumes and self.begun:
            return EngineAway("the engine was lost, and what this request had come to cannot be taken up")
        return None

    def watch_deadline(self, abort: Callable[[], object]) -> None:
        """Where it has a deadline, and no engine ends it then: `abort` is called, and it ends."""
        deadline_s = self.request.slo.deadline_s
        if deadline_s is None:
            return

        def late() -> None:
            if self.left:
                abort()
                self.end(Finish.TIMEOUT)

        delay_s = max(0.0, self.arrived + deadline_s - time.monotonic()) + DEADLINE_GRACE_S
        self.timer = asyncio.get_running_loop().call_later(delay_s, late)

    def end(self, reason: Finish, error: str | None = None) -> None:
        """Ends what has not ended, without the engine."""
        for index, output in enumerate(self.outputs):
            if not output.ended:
                output.ended = True
                self.left -= 1
                total = output.cumulative_logprob
                self._put(Chunk(self.request.id, index, finish=reason, error=error, cumulative_logprob=total))

    def fail(self, error: MillstreamError) -> None:
        """It cannot go on. One that has said nothing yet can be asked again: its reader gets the error itself."""
        if self.left == 0 or self.error is not None:
            return
        if self.begun:
            self.end(Finish.ERROR, str(error))
        else:
            self.error = error
            self._news.set()

    async def next(self) -> Chunk:
        """Raises the error of `fail`."""
        while not self._chunks:
            if self.error is not None:
                raise self.error
            self._news.clear()
            await self._news.wait()
        if len(self._chunks) > 1:
            self._join()
        return self._chunks.popleft()

    def _put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        if len(self._chunks) >= JOIN_FROM * len(self.outputs):
            self._join()
        self._news.set()

    def _join(self) -> None:
        by_output: dict[int, list[Chunk]] = {}
        for chunk in self._chunks:
            by_output.setdefault(chunk.index, []).append(chunk)
        self._chunks = deque(_joined(chunks) for chunks in by_output.values())


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one output as one."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        tokens=tuple(itertools.chain.from_iterable(chunk.tokens for chunk in chunks)),
        logprobs=tuple(itertools.chain.from_iterable(chunk.logprobs for chunk in chunks)),
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not None), None),
    )
