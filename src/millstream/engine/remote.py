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
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from millstream.core.client import Chunk, Load, ModelFacts
from millstream.core.errors import BadRequest, EngineAway, EngineClosed, MillstreamError
from millstream.core.events import Event
from millstream.core.request import Request
from millstream.core.sequence import Finish
from millstream.engine import wire
from millstream.engine.feed import EventFeed, covered
from millstream.engine.stream import Stream
from millstream.text.tokenizer import Tokenizer

RETRY_S = 0.05
# Beats come with news, many times a second; that this process lives need not be said as often.
ALIVE_S = 0.2
# Requests that ended here and whose last events may still come.
MAX_RECENT = 4096
MAX_UNSENT = 64 << 20

FILES = "millstream.models.opened"

_log = logging.getLogger("millstream.engine")


class _Stream(Stream):
    """A stream, its id in frames, and the connection it went over last."""

    def __init__(self, wire_id: int, request: Request, facts: ModelFacts, seeds: random.Random) -> None:
        super().__init__(request, facts, seeds, time.monotonic())
        self.wire_id = wire_id
        self.sent_on: _Link | None = None


Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]


class RemoteEngine:
    """The engine that `engine/process.py` serves at `path`. Made and used inside one event loop, after `start`.

    While it is away, requests that were inside wait for `patience_s`; one that was inside when the engine was lost for
    the `max_losses`-th time may be what kills it, and is not sent again. An engine that gives no sign of life for
    `quiet_s` is not ready, nor is one whose present turn lasts longer than `stall_s`. A request's `arrival` is in
    seconds of `time.monotonic()`; 0 means now. `first_id` keeps the ids of requests to several engines apart.

    `connect` makes another connection than one over a Unix socket: it is given a maker of protocols, as
    `loop.create_connection` is, and `path` is then only what it is called. Such an engine does not come back: what was
    inside when it was lost fails, as does everything after it, with EngineClosed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        connect: Connect | None = None,
        patience_s: float = 120.0,
        max_losses: int = 3,
        quiet_s: float = 3.0,
        stall_s: float = 30.0,
        first_id: int = 1,
    ) -> None:
        self.path = str(path)
        self._connect, self._why = connect, ""
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
        self._beat_at = self._alive_at = 0.0
        self._away_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._closed = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is gone for good."""
        return self._closed

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
            raise EngineClosed(f"the engine was closed before its model was loaded: {self._why}")
        return self._facts

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        stream = self._open(request)
        try:
            while stream.unread:
                yield await stream.next()
        finally:
            self._close_stream(stream)

    async def abort(self, request_id: int) -> None:
        stream = self._by_request.get(request_id)
        if stream is None or not stream.left:
            return
        if not self._give_up(stream):
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
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._end("it was told to close")

    def _end(self, why: str) -> None:
        """Nobody is left waiting, and nothing more is taken."""
        self._closed, self._why = True, self._why or why
        if self._away_timer is not None:
            self._away_timer.cancel()
        gone = EngineClosed(f"the engine was closed: {self._why}")
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
        stream = _Stream(self._wire_id(request.id), request, facts, self._random)
        self._streams[stream.wire_id] = self._by_request[request.id] = stream
        self._empty.clear()
        stream.watch_deadline(partial(self._give_up, stream))
        self._send(stream)
        return stream

    def _wire_id(self, request_id: int) -> int:
        """Never the same twice, and the request's own wherever that rises slowly: chunks then need no other name."""
        near = self._last_wire_id < request_id < min(self._last_wire_id + (1 << 20), wire.MAX_ID)
        self._last_wire_id = request_id if near else self._last_wire_id + 1
        return self._last_wire_id

    def _close_stream(self, stream: _Stream) -> None:
        """Its reader is done with it, or has left."""
        if stream.left and stream.error is None:
            self._give_up(stream)
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
            self._say(wire.submit(stream.wire_id, stream.again(), time.monotonic() - stream.arrived))
            stream.sent_on = self._link
        except wire.WireError as error:
            stream.fail(BadRequest("request", "something that cannot be sent to the engine", f"what can be: {error}"))

    def _give_up(self, stream: _Stream) -> bool:
        """Tells the engine that nobody waits for it; False where the engine that has it is not there."""
        if stream.sent_on is None or stream.sent_on is not self._link:
            return False
        self._say(wire.Abort(stream.wire_id))
        return True

    def _must_be_there(self) -> ModelFacts:
        if self._closed:
            raise EngineClosed(f"the engine was closed: {self._why}")
        if self._facts is None:
            raise EngineAway("the model is being loaded")
        if self._link is None or not self._link.ready:
            raise EngineAway("the engine was lost and is being started again")
        return self._facts

    # -- the connection

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            link = _Link(self)
            try:
                if self._connect is None:
                    await loop.create_unix_connection(lambda link=link: link, self.path)  # type: ignore[misc]
                else:
                    await self._connect(lambda link=link: link)  # type: ignore[misc]
            except OSError as error:
                if self._connect is not None:
                    self._end(str(error))
                    return
                await asyncio.sleep(RETRY_S)
                continue
            self._link = link
            self._say(wire.Hello(wire.VERSION, os.getpid()))
            why = await link.lost
            self._lost(link)
            if self._connect is not None:
                self._end(str(why or "the connection to it was lost"))
                return
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
            if (error := stream.lost(self.max_losses)) is not None:
                stream.fail(error)
        self._away_timer = asyncio.get_running_loop().call_later(self.patience_s, self._out_of_patience)

    def _out_of_patience(self) -> None:
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
            if now - self._alive_at >= ALIVE_S:
                self._alive_at = now
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
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._frames = wire.Frames(wire.MAX_TO_CLIENT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Other loops have transports of their own, which are like these.
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and not wire.peer_is_us(sock):
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
            self.lost.set_result(error)

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
