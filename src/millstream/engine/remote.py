"""An engine in another process, as an EngineClient of one event loop.

The engine may be lost and come back: `serve`'s supervisor starts a new one at the same socket. What was inside is then
taken up by the new engine from the tokens that there are (`Request.prior`). Seeds are fixed before a request is sent,
and random numbers are functions of (seed, output, position), so the text goes on as if nothing had happened. Requests
that come while there is no engine are refused with EngineAway.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import logging
import os
import random
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from millstream.core import registry
from millstream.core.client import Chunk, Load, ModelFacts
from millstream.core.errors import BadRequest, EngineAway, EngineClosed, MillstreamError
from millstream.core.events import Event
from millstream.core.plan import TokenLogprobs
from millstream.core.request import MAX_SEED, Prior, Request
from millstream.core.sequence import Finish
from millstream.decode.protocol import DecodeMethod
from millstream.engine import wire
from millstream.engine.feed import EventFeed, covered
from millstream.text.tokenizer import Tokenizer

RETRY_S = 0.05
# The engine ends a request at its deadline itself, and says how far it came; only one that does not is not waited for.
DEADLINE_GRACE_S = 0.5
# Chunks that nobody has read yet are joined: what a slow reader costs is then bounded by the tokens themselves.
JOIN_FROM = 32
# Requests that ended here and whose last events may still come.
MAX_RECENT = 4096
MAX_UNSENT = 64 << 20

FILES = "millstream.models.opened"

_log = logging.getLogger("millstream.engine")


@dataclass(slots=True)
class _Output:
    """What one output has come to."""

    tokens: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    ended: bool = False

    @property
    def begun(self) -> bool:
        return self.ended or bool(self.tokens)


class _Stream:
    """One request on its way, and what its reader has not read yet."""

    def __init__(self, wire_id: int, request: Request, outputs: int, resumes: bool, arrived: float) -> None:
        self.wire_id, self.request, self.resumes, self.arrived = wire_id, request, resumes, arrived
        self.outputs = [_Output() for _ in range(outputs)]
        self.left = outputs
        self.losses = 0
        self.sent_on: _Link | None = None
        self.first_s: float | None = None
        self.error: MillstreamError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._scores: tuple[TokenLogprobs | None, ...] | None = None
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()

    def message(self, now: float) -> wire.Submit:
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
        return wire.submit(self.wire_id, request, now - self.arrived)

    def take(self, chunk: Chunk, now: float) -> None:
        """News from the engine. What comes after an output's end is not meant for it."""
        if not 0 <= chunk.index < len(self.outputs) or self.outputs[chunk.index].ended:
            return
        output = self.outputs[chunk.index]
        first = not output.begun
        if chunk.tokens or chunk.replaced:
            self.first_s = now - self.arrived if self.first_s is None else self.first_s
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
        if any(output.begun for output in self.outputs):
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


class RemoteEngine:
    """The engine that `engine/process.py` serves at `path`. Made and used inside one event loop, after `start`.

    While it is away, requests that were inside wait for `patience_s`; one that was inside when the engine was lost for
    the `max_losses`-th time may be what kills it, and is not sent again. An engine that gives no sign of life for
    `quiet_s` is not ready, nor is one whose present turn lasts longer than `stall_s`. A request's `arrival` is in
    seconds of `time.monotonic()`; 0 means now. `first_id` keeps the ids of requests to several engines
    apart.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        patience_s: float = 120.0,
        max_losses: int = 3,
        quiet_s: float = 3.0,
        stall_s: float = 30.0,
        first_id: int = 1,
    ) -> None:
        self.path = str(path)
        self.patience_s, self.max_losses, self.quiet_s, self.stall_s = patience_s, max_losses, quiet_s, stall_s
        self.losses = 0
        self.resumed = 0
        self.bad_frames = 0
        self.engine_pid: int | None = None  # of the last engine that answered
        self._facts: ModelFacts | None = None
        self._random = random.Random()
        self._ids = itertools.count(first_id)
        self._last_wire_id = 0
        self._streams: dict[int, _Stream] = {}
        self._by_request: dict[int, _Stream] = {}
        self._recent: OrderedDict[int, Request] = OrderedDict()
        self._feeds: dict[EventFeed, frozenset[type[Event]]] = {}
        self._asks: dict[int, asyncio.Future[Any]] = {}
        self._link: _Link | None = None
        self._loaded = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._beat: wire.Beat | None = None
        self._beat_at = 0.0
        self._away_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._closed = False
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to look for the engine, and goes on until closed. Does not wait for it: `facts` does."""
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep())

    # -- EngineClient

    def new_id(self) -> int:
        return next(self._ids)

    async def facts(self) -> ModelFacts:
        await self._loaded.wait()
        if self._facts is None:
            raise EngineClosed("the engine was closed before its model was loaded")
        return self._facts

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        stream = self._open(request)
        try:
            while stream.left or stream._chunks:
                yield await stream.next()
        finally:
            self._close_stream(stream)

    async def abort(self, request_id: int) -> None:
        stream = self._by_request.get(request_id)
        if stream is None or not stream.left:
            return
        if stream.sent_on is not None and stream.sent_on is self._link:
            self._say(wire.Abort(stream.wire_id))
        else:
            stream.end(Finish.ABORT)

    async def events(self, *kinds: type[Event]) -> AsyncIterator[Event]:
        feed = EventFeed()
        self._feeds[feed] = covered(kinds)
        self._watch()
        if self._closed:
            feed.close()
        try:
            async for event in feed:
                yield event
        finally:
            del self._feeds[feed]
            self._watch()

    async def call(self, name: str, **given: Any) -> Any:
        self._must_be_there()
        ask_id = next(self._ids)
        done = self._asks[ask_id] = asyncio.get_running_loop().create_future()
        try:
            self._say(wire.Ask(ask_id, name, given))
            return await done
        finally:
            self._asks.pop(ask_id, None)

    async def ready(self) -> bool:
        beat, link = self._beat, self._link
        if self._draining or self._closed or beat is None or link is None or not link.ready or beat.phase != "ready":
            return False
        quiet_s = time.monotonic() - self._beat_at
        return quiet_s < self.quiet_s and not (beat.busy and beat.idle_s + quiet_s > self.stall_s)

    async def drain(self) -> None:
        self._draining = True
        await self._empty.wait()

    async def load(self) -> Load:
        if self._link is not None and self._link.ready and self._beat is not None:
            return self._beat.load
        total = 0 if self._facts is None else self._facts.total_blocks
        return Load(len(self._streams), 0, 0, total)

    async def adapters(self) -> Sequence[str]:
        return sorted(self._facts.limits.adapters) if self._facts is not None else []

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._away_timer is not None:
            self._away_timer.cancel()
        gone = EngineClosed("the engine was closed")
        for stream in list(self._streams.values()):
            stream.fail(gone)
        self._fail_asks(gone)
        if self._link is not None:
            self._link.cut()
            self._link = None
        for feed in self._feeds:
            feed.close()
        self._loaded.set()

    # -- requests

    def _open(self, request: Request) -> _Stream:
        if self._draining:
            raise EngineClosed("the engine is draining")
        facts = self._must_be_there()
        request.check(facts.limits)
        if request.id in self._by_request:
            raise BadRequest("id", request.id, "an id that no request inside has")
        if request.prior:
            raise BadRequest("prior", f"{len(request.prior)} outputs", "none: what is taken up is known here")
        method = cast(DecodeMethod, registry.make("decode", request.decode or facts.decode))
        if request.params.seed is None:
            # An engine that takes it up must draw the same numbers.
            request = replace(request, params=replace(request.params, seed=self._random.randrange(MAX_SEED)))
        now = time.monotonic()
        arrived = min(request.arrival or now, now)
        stream = _Stream(self._wire_id(request.id), request, method.num_outputs(request), method.resumes, arrived)
        self._streams[stream.wire_id] = self._by_request[request.id] = stream
        self._empty.clear()
        if request.slo.deadline_s is not None:
            self._watch_deadline(stream, max(0.0, arrived + request.slo.deadline_s - now) + DEADLINE_GRACE_S)
        self._send(stream)
        return stream

    def _wire_id(self, request_id: int) -> int:
        """Never the same twice, and the request's own wherever that rises slowly: chunks then need no other name."""
        near = self._last_wire_id < request_id < min(self._last_wire_id + (1 << 20), wire.MAX_ID)
        self._last_wire_id = request_id if near else self._last_wire_id + 1
        return self._last_wire_id

    def _close_stream(self, stream: _Stream) -> None:
        """Its reader is done with it, or has left."""
        if stream.left and stream.error is None and stream.sent_on is not None and stream.sent_on is self._link:
            self._say(wire.Abort(stream.wire_id))
        if stream.timer is not None:
            stream.timer.cancel()
        if self._streams.pop(stream.wire_id, None) is not None:
            del self._by_request[stream.request.id]
        if self._feeds:
            self._recent[stream.wire_id] = replace(stream.request, prompt=())
            while len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        if not self._streams:
            self._empty.set()

    def _send(self, stream: _Stream) -> None:
        try:
            self._say(stream.message(time.monotonic()))
            stream.sent_on = self._link
        except wire.WireError as error:
            stream.fail(BadRequest("request", "something that cannot be sent to the engine", f"what can be: {error}"))

    def _watch_deadline(self, stream: _Stream, delay_s: float) -> None:
        def late() -> None:
            if not stream.left:
                return
            if stream.sent_on is not None and stream.sent_on is self._link:
                self._say(wire.Abort(stream.wire_id))
            stream.end(Finish.TIMEOUT)

        stream.timer = asyncio.get_running_loop().call_later(delay_s, late)

    def _must_be_there(self) -> ModelFacts:
        if self._closed:
            raise EngineClosed("the engine was closed")
        if self._facts is None:
            raise EngineAway("the model is being loaded")
        if self._link is None or not self._link.ready:
            raise EngineAway("the engine was lost and is being started again")
        return self._facts

    # -- the connection

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, link = await loop.create_unix_connection(lambda: _Link(self), self.path)
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            self._link = link
            self._say(wire.Hello(wire.VERSION, os.getpid()))
            await link.lost
            self._lost(link)
            await asyncio.sleep(RETRY_S)

    def _say(self, message: wire.ToEngine) -> None:
        if self._link is not None:
            self._link.say(message)

    def _lost(self, link: _Link) -> None:
        if self._link is link:
            self._link, self._beat = None, None
        if not link.ready:
            return
        self.losses += 1
        _log.warning("the engine was lost; %d requests were inside", len(self._streams))
        self._fail_asks(EngineAway("the engine was lost and is being started again"))
        for stream in list(self._streams.values()):
            if stream.sent_on is not link or not stream.left:
                continue
            stream.losses += 1
            if stream.losses >= self.max_losses:
                stream.fail(EngineAway(f"the engine was lost {stream.losses} times while this request was inside"))
            elif not stream.resumes and any(output.begun for output in stream.outputs):
                stream.fail(EngineAway("the engine was lost, and what this request had come to cannot be taken up"))
        self._away_timer = asyncio.get_running_loop().call_later(self.patience_s, self._give_up)

    def _give_up(self) -> None:
        for stream in list(self._streams.values()):
            stream.fail(EngineAway(f"the engine was lost and did not come back within {self.patience_s:g} s"))

    def _arrived(self, link: _Link, facts: ModelFacts) -> None:
        """An engine is there, with its model: what waits is taken up."""
        link.ready = True
        if self._away_timer is not None:
            self._away_timer.cancel()
            self._away_timer = None
        if self._facts is None and facts.seed is not None:
            self._random = random.Random(facts.seed)
        self._facts = facts
        self._loaded.set()
        self._watch()
        waiting = [stream for stream in self._streams.values() if stream.left and stream.error is None]
        for stream in waiting:
            self.resumed += 1
            self._send(stream)
        if waiting:
            _log.warning("the engine is back; %d requests go on", len(waiting))

    def _watch(self) -> None:
        if self._link is not None and self._link.ready:
            kinds = frozenset[type[Event]]().union(*self._feeds.values())
            self._say(wire.Watch(tuple(sorted(kind.__name__ for kind in kinds))))

    def _fail_asks(self, error: MillstreamError) -> None:
        for done in self._asks.values():
            if not done.done():
                done.set_exception(error)

    def _hear(self, link: _Link, message: wire.ToClient) -> None:
        """Does what the engine says. Raises WireError for what it cannot have meant."""
        now = time.monotonic()
        if isinstance(message, wire.News):
            for chunk in message.chunks:
                stream = self._streams.get(chunk.request_id)
                if stream is not None:
                    stream.take(chunk, now)
        elif isinstance(message, wire.Beat):
            self._beat, self._beat_at = message, now
            link.say(wire.Alive())
        elif isinstance(message, wire.Happened):
            self._happened(message)
        elif isinstance(message, wire.Refused):
            stream = self._streams.get(message.id)
            if stream is not None:
                stream.fail(wire.error_of(message.trouble))
        elif isinstance(message, wire.Answer):
            done = self._asks.get(message.id)
            if done is not None and not done.done():
                if message.trouble is None:
                    done.set_result(message.value)
                else:
                    done.set_exception(wire.error_of(message.trouble))
        elif isinstance(message, wire.Ready):
            self._arrived(link, message.facts)
        elif message.version != wire.VERSION:
            raise wire.WireError(f"the engine speaks version {message.version}, this is {wire.VERSION}")
        else:
            self.engine_pid = message.pid

    def _happened(self, message: wire.Happened) -> None:
        events = []
        for event in message.events:
            request = None
            if event.seq is not None:
                stream = self._streams.get(event.seq.request_id % wire.MAX_ID)
                request = stream.request if stream else self._recent.get(event.seq.request_id % wire.MAX_ID)
                if request is None:
                    continue
            events.append(wire.event_in(event, request))
        for feed, kinds in self._feeds.items():
            feed.put([event for event in events if type(event) in kinds])


class _Link(asyncio.Protocol):
    """One connection to an engine. `ready`: it has its model. `lost` is done when the connection is."""

    transport: asyncio.Transport | None = None

    def __init__(self, remote: RemoteEngine) -> None:
        self.remote = remote
        self.ready = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames = wire.Frames(wire.MAX_TO_CLIENT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Other loops have transports of their own, which are like these.
        self.transport = cast(asyncio.Transport, transport)
        if not wire.peer_is_us(transport.get_extra_info("socket")):
            _log.error("%s belongs to another user", self.remote.path)
            self.cut()

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self.remote._hear(self, wire.to_client(payload))
        except wire.WireError as error:
            self.remote.bad_frames += 1
            _log.error("what came from the engine is not understood: %s", error)
            self.cut()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def say(self, message: wire.ToEngine) -> None:
        """Raises WireError for what is too long. Nobody is told of what a lost engine does not hear."""
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(wire.frame(message, wire.MAX_TO_ENGINE))
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            _log.error("the engine reads nothing any more")
            self.cut()

    def cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def load_tokenizer(facts: ModelFacts) -> Tokenizer:
    """The tokenizer of a served model, from its files: nothing of torch is imported. Raises BadFile and Unsupported."""
    found: Tokenizer = importlib.import_module(FILES).open_model(facts.path).tokenizer()
    return found
