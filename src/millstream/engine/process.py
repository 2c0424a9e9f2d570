"""An engine in a process of its own: `python -m millstream.engine.process --socket PATH --config FILE`.

The file names the model and holds the engine's part of the configuration (`model = "..."`, `[engine]`); what else it
holds is for others. The socket is there at once, and says how the loading gets on; torch is imported by the loading.

Clients may come and go. When one is gone, its requests end. SIGTERM or SIGINT: nothing new is taken, what is inside is
finished, for at most `--drain-s` seconds; a second one ends at once. The exit code says how it ended (`exits.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from millstream.config.load import build, log_by, read_file
from millstream.config.schema import EngineConfig
from millstream.core.client import Chunk, Load, ModelFacts
from millstream.core.clock import Clock, WallClock
from millstream.core.errors import (
    BadFile,
    ConfigError,
    DownloadError,
    EngineClosed,
    MillstreamError,
    ModelError,
    UnknownModel,
    UnknownName,
)
from millstream.core.logs import set_up_logs
from millstream.core.sequence import Finish
from millstream.engine import calls, wire
from millstream.engine.assemble import assemble, facts_of
from millstream.engine.engine import Engine
from millstream.engine.exits import Exit, die_with_parent, orphaned
from millstream.engine.feed import Tap, kinds_named
from millstream.engine.thread import EngineThread

BEAT_S = 0.25
# With news, the load is told as often as this: admission control goes by it.
SOON_S = 0.05
HELLO_S = 2.0
MAX_CLIENTS = 16
MAX_ASKS = 64
# What a client may leave unread before it is taken for dead.
MAX_UNREAD = 64 << 20
SWITCH_S = 0.0005
# Objects that are made, beyond those that are dropped, before Python looks for cycles among them.
YOUNG = 10_000
# A step that does not end is not waited for longer when the process is to end.
CLOSE_S = 5.0
_POLL_S = 0.01

_NO_LOAD = Load(0, 0, 0, 0)

_log = logging.getLogger("millstream.engine")

Make = Callable[[], tuple[Engine, ModelFacts]]


class EngineServer:
    """Serves an engine at a Unix socket, on one event loop. `counters` say what was wrong with clients so far.

    `failed` is set, with what the engine raised, when it can no longer step; from then on nothing more is said to
    clients, so that they find the connection gone and can have their requests taken up by another engine.
    """

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self.path = path
        self.clock = clock or WallClock()
        self.counters: Counter[str] = Counter(
            bad_frames=0, refused_peers=0, slow_clients=0, dropped_requests=0, connections=0
        )
        self.thread: EngineThread | None = None
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._facts: ModelFacts | None = None
        self._clients: dict[int, _Client] = {}
        self._numbers = 0
        self._broken = False
        self._fresh: list[Chunk] = []  # of the present turn; the engine's thread alone touches it
        self._turns, self._turned_at = -1, self.clock.now()
        self._beat_at = 0.0
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def open(self) -> None:
        """Raises OSError where the socket cannot be had."""
        sock = wire.listen(self.path)
        self._inode = self.path.stat().st_ino
        self._server = await self._loop.create_unix_server(partial(_Client, self), sock=sock)

    def client(self) -> asyncio.Protocol:
        """One more client, for whoever brings a transport to it that is no socket of this server's."""
        return _Client(self)

    def attach(self, engine: Engine, facts: ModelFacts) -> None:
        """The model is loaded: its engine starts, and requests are taken."""
        self._facts = facts
        self.thread = EngineThread(engine, on_error=self._fail)
        self.thread.on_turn.append(self._turn)
        for client in list(self._clients.values()):
            if client.greeted:
                client.say(wire.Ready(facts))
        self.beat()

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing more and waits for what is inside; False when that took longer than `timeout_s`."""
        self.draining = True
        self.beat()
        end = self.clock.now() + timeout_s
        while self.thread is not None and self.thread.busy:
            if self.clock.now() >= end:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def close(self) -> None:
        # What is inside now is not told of an end: another engine may take it up.
        self._broken = True
        if self._server is not None:
            self._server.close()
            # Another process may have taken the place over.
            with contextlib.suppress(OSError):
                if self.path.stat().st_ino == self._inode:
                    self.path.unlink()
        for client in list(self._clients.values()):
            client.transport.close()
        if self.thread is not None:
            closer = threading.Thread(target=self.thread.close, daemon=True)
            closer.start()
            end = self.clock.now() + CLOSE_S
            while closer.is_alive() and self.clock.now() < end:
                await asyncio.sleep(_POLL_S)

    def beat(self) -> None:
        """Tells every client how the engine gets on."""
        thread, now = self.thread, self.clock.now()
        self._beat_at = now
        clients = tuple((one.pid, now - one.heard_at) for one in self._clients.values() if one.greeted)
        if thread is None:
            told = wire.Beat("loading", 0, 0, False, 0.0, _NO_LOAD, clients)
        else:
            if thread.turns != self._turns or not thread.busy:
                self._turns, self._turned_at = thread.turns, now
            phase = "draining" if self.draining else "ready"
            idle_s = now - self._turned_at
            load = thread.load
            load = Load(
                load.waiting, load.running, load.free_blocks, load.total_blocks, {**load.counters, **self.counters}
            )
            told = wire.Beat(phase, thread.turns, thread.engine.num_steps, thread.busy, idle_s, load, clients)
        for client in list(self._clients.values()):
            if client.greeted:
                client.say(told)

    # -- clients

    def enter(self, client: _Client) -> int | None:
        """A number for a client that has just come; None where there are too many."""
        if len(self._clients) >= MAX_CLIENTS:
            return None
        self._numbers += 1
        self._clients[self._numbers] = client
        self.counters["connections"] += 1
        return self._numbers

    def leave(self, client: _Client) -> None:
        """It is gone: nobody waits for what it asked for."""
        self._clients.pop(client.number, None)
        self.counters["dropped_requests"] += len(client.inside)
        for request_id in client.inside:
            self.give_up(request_id)
        if client.tap is not None:
            self._listen(client.tap, None)
        client.inside.clear()

    def give_up(self, request_id: int) -> None:
        """Ends a request; that of nobody, or one that has ended, is nothing."""
        if self.thread is not None:
            with contextlib.suppress(EngineClosed):
                self.thread.abort(request_id)

    def hear(self, client: _Client, message: wire.ToEngine) -> None:
        """Does what a client says. Raises WireError for what it cannot have meant."""
        client.heard_at = self.clock.now()
        if not client.greeted:
            self._greet(client, message)
        elif isinstance(message, wire.Submit):
            self._submit(client, message)
        elif isinstance(message, wire.Abort):
            request_id = client.engine_id(message.id)
            if request_id in client.inside:
                self.give_up(request_id)
        elif isinstance(message, wire.Watch):
            self._watch(client, message)
        elif isinstance(message, wire.Ask):
            self._ask(client, message)
        elif isinstance(message, wire.Hello):
            raise wire.WireError("a second greeting")

    def _greet(self, client: _Client, message: wire.ToEngine) -> None:
        if not isinstance(message, wire.Hello):
            raise wire.WireError(f"a {type(message).__name__} before any greeting")
        client.greeted, client.pid = True, message.pid
        client.say(wire.Hello(wire.VERSION, os.getpid()))
        if message.version != wire.VERSION:
            raise wire.WireError(f"the client speaks version {message.version}, this is {wire.VERSION}")
        if self._facts is not None:
            client.say(wire.Ready(self._facts))
        self.beat()

    def _submit(self, client: _Client, message: wire.Submit) -> None:
        request_id = client.engine_id(message.id)
        if request_id in client.inside:
            raise wire.WireError(f"request {message.id} is inside already")
        try:
            if self.thread is None:
                raise EngineClosed("the model is still being loaded")
            if self.draining:
                raise EngineClosed("the engine is draining")
            arrival = self.clock.now() - max(0.0, message.age_s)
            request = wire.request_of(message, request_id, arrival)
            # Chunks come by way of this loop, so none is here before this.
            client.inside[request_id] = self.thread.submit(request, self._sink)
        except Exception as error:
            if not isinstance(error, MillstreamError):
                _log.exception("request %d could not be taken", message.id)
            client.say(wire.Refused(message.id, wire.trouble_of(error)))

    def _watch(self, client: _Client, message: wire.Watch) -> None:
        try:
            kinds = kinds_named(message.kinds)
        except KeyError as error:
            raise wire.WireError(f"there is no event {error}") from None
        if self.thread is None:
            raise wire.WireError("events of an engine that is not there yet")
        before = client.tap
        client.tap = Tap(kinds, wire.event_out, partial(self._happened, client)) if kinds else None
        self._listen(before, client.tap)

    def _listen(self, before: Tap[wire.WireEvent] | None, after: Tap[wire.WireEvent] | None) -> None:
        """At once, so that no event falls between the two."""
        if self.thread is None:
            return
        engine, on_turn = self.thread.engine, self.thread.on_turn

        def change() -> None:
            if before is not None:
                before.close(engine.listeners, on_turn)
            if after is not None:
                after.open(engine.listeners, on_turn)

        with contextlib.suppress(EngineClosed):
            self.thread.post(change)

    def _ask(self, client: _Client, message: wire.Ask) -> None:
        if client.asking >= MAX_ASKS:
            raise wire.WireError(f"more than {MAX_ASKS} calls at once")
        client.asking += 1
        try:
            work = calls.find(message.name)
            if self.thread is None:
                raise EngineClosed("the model is still being loaded")
            thread = self.thread
            thread.post(lambda: self._call(client, message, partial(work, thread.engine, **message.given)))
        except Exception as error:
            self._answer(client, wire.Answer(message.id, trouble=wire.trouble_of(error)))

    # -- on the engine's thread

    def _sink(self, chunk: Chunk) -> None:
        if not self._broken:
            self._fresh.append(chunk)

    def _turn(self) -> None:
        if self._fresh:
            fresh, self._fresh = self._fresh, []
            self._to_loop(self._deliver, fresh)

    def _fail(self, error: BaseException) -> None:
        self._broken = True
        self._to_loop(self._failed, error)

    def _call(self, client: _Client, message: wire.Ask, work: Callable[[], Any]) -> None:
        try:
            answer = wire.Answer(message.id, work())
        except Exception as error:
            answer = wire.Answer(message.id, trouble=wire.trouble_of(error))
        self._to_loop(self._answer, client, answer)

    def _happened(self, client: _Client, events: list[wire.WireEvent]) -> None:
        self._to_loop(self._tell, client, events)

    def _to_loop(self, work: Callable[..., None], *given: Any) -> None:
        # A loop that has ended needs no news.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work, *given)

    # -- back on the loop

    def _failed(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    def _deliver(self, chunks: list[Chunk]) -> None:
        if self._broken:
            return
        told: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            number = chunk.request_id // wire.MAX_ID
            client = self._clients.get(number)
            if client is None or chunk.request_id not in client.inside:
                continue
            if chunk.finish is not None:
                client.inside[chunk.request_id] -= 1
                if client.inside[chunk.request_id] <= 0:
                    del client.inside[chunk.request_id]
            told.setdefault(number, []).append(chunk)
        for number, own in told.items():
            self._clients[number].tell(own)
        load = self.thread.load if self.thread is not None else _NO_LOAD
        if load.running + load.waiting == 0 or self.clock.now() - self._beat_at >= SOON_S:
            self.beat()

    def _tell(self, client: _Client, events: list[wire.WireEvent]) -> None:
        # Of others' requests a client hears nothing.
        own = tuple(
            event for event in events if event.seq is None or event.seq.request_id // wire.MAX_ID == client.number
        )
        if own and not client.gone:
            client.say(wire.Happened(own))

    def _answer(self, client: _Client, answer: wire.Answer) -> None:
        client.asking -= 1
        if not client.gone:
            client.say(answer)


class _Client(asyncio.Protocol):
    """One connection. `inside` are the engine's ids of its requests, and how many outputs of each are to come."""

    transport: asyncio.Transport

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.number = 0
        self.pid = 0
        self.heard_at = 0.0
        self.greeted = False
        self.gone = False
        self.inside: dict[int, int] = {}
        self.asking = 0
        self.tap: Tap[wire.WireEvent] | None = None
        self._frames = wire.Frames(wire.MAX_TO_ENGINE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Other loops have transports of their own, which are like these.
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and not wire.peer_is_us(sock):
            self.server.counters["refused_peers"] += 1
            self._drop("it belongs to another user")
            return
        number = self.server.enter(self)
        if number is None:
            self._drop(f"there are {MAX_CLIENTS} clients already")
            return
        self.number = number
        asyncio.get_running_loop().call_later(HELLO_S, self._check_greeted)

    def data_received(self, data: bytes) -> None:
        if self.gone:
            return
        try:
            for payload in self._frames.feed(data):
                self.server.hear(self, wire.to_engine(payload))
        except wire.WireError as error:
            self.server.counters["bad_frames"] += 1
            self._drop(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        if self.number:
            self.server.leave(self)

    def engine_id(self, wire_id: int) -> int:
        """Ids that clients choose lie apart for each client. Raises WireError for one that is out of bounds."""
        if not 0 <= wire_id < wire.MAX_ID:
            raise wire.WireError(f"request id {wire_id}, allowed are 0 to {wire.MAX_ID - 1}")
        return self.number * wire.MAX_ID + wire_id

    def say(self, message: wire.ToClient) -> None:
        """Sends a message. One that cannot be sent ends the connection, not the engine."""
        if self.gone:
            return
        try:
            data = wire.frame(message, wire.MAX_TO_CLIENT)
        except Exception as error:
            self._drop(f"a {type(message).__name__} could not be sent: {error}")
            return
        self._write(data)

    def _write(self, data: bytes) -> None:
        self.transport.write(data)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.server.counters["slow_clients"] += 1
            self._drop(f"more than {MAX_UNREAD >> 20} MiB lie unread")

    def tell(self, chunks: list[Chunk]) -> None:
        """The chunks of one turn, under the client's own ids; in one frame wherever they fit."""
        base = self.number * wire.MAX_ID
        own = tuple(replace(chunk, request_id=chunk.request_id - base) for chunk in chunks)
        if self.gone:
            return
        try:
            data = [wire.frame(wire.News(own), wire.MAX_TO_CLIENT)]
        except wire.WireError:
            data = [self._one(chunk) for chunk in own]
        for each in data:
            self._write(each)

    def _one(self, chunk: Chunk) -> bytes:
        try:
            return wire.frame(wire.News((chunk,)), wire.MAX_TO_CLIENT)
        except wire.WireError as error:
            self.server.give_up(chunk.request_id + self.number * wire.MAX_ID)
            failed = Chunk(chunk.request_id, chunk.index, finish=Finish.ERROR, error=f"too much to send: {error}")
            return wire.frame(wire.News((failed,)), wire.MAX_TO_CLIENT)

    def _check_greeted(self) -> None:
        if not self.greeted and not self.gone:
            self._drop(f"it said nothing for {HELLO_S:g} s")

    def _drop(self, why: str) -> None:
        _log.warning("client %d is cut off: %s", self.number, why)
        self.gone = True
        self.transport.abort()


def make_from(file: Path) -> tuple[Engine, ModelFacts]:
    """The engine that a config file describes. Raises as `assemble` does."""
    try:
        tree = read_file(file)
    except BadFile as error:
        raise ConfigError(str(error)) from None
    model = tree.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(f"{file}: model is {model!r}, allowed is a model's name or path")
    return make_of(model, tree.get("engine", {}))


def make_of(model: str, tree: Mapping[str, Any]) -> tuple[Engine, ModelFacts]:
    """The engine of a model, with the settings of a tree `[engine]`. Raises as `assemble` does."""
    config = build(EngineConfig, tree, "engine")
    made = assemble(model, config, notice=_log.info, tune=True)
    return made.engine, facts_of(made, model)


async def serve(path: Path, make: Make, parent: int | None = None, drain_s: float = 30.0) -> Exit:
    """Serves what `make` makes at `path` until told to stop. `make` runs on a thread of its own."""
    loop = asyncio.get_running_loop()
    server = EngineServer(path)
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.put_nowait, number)
    try:
        await server.open()
    except OSError as error:
        _log.error("%s: %s", path, error)
        return Exit.ADDRESS
    stopped = asyncio.ensure_future(told.get())
    alone = asyncio.ensure_future(_alone(server, parent))
    try:
        made: asyncio.Future[tuple[Engine, ModelFacts]] = loop.create_future()
        threading.Thread(target=making, args=(make, loop, made), name="millstream-load", daemon=True).start()
        await asyncio.wait((made, stopped, alone), return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return Exit.DONE if stopped.done() else Exit.ORPHANED
        if (why := made.exception()) is not None:
            return _told(why)
        engine, facts = made.result()
        server.attach(engine, facts)
        collect_rarely()
        _log.info("%s is ready at %s", facts.model, path)
        await asyncio.wait((server.failed, stopped, alone), return_when=asyncio.FIRST_COMPLETED)
        if server.failed.done():
            _log.error("the engine can no longer step: %s", server.failed.result())
            return Exit.ENGINE
        if not stopped.done():
            return Exit.ORPHANED
        _log.info("told to stop; finishing what is inside")
        draining = asyncio.ensure_future(server.drain(drain_s))
        forced = asyncio.ensure_future(told.get())
        await asyncio.wait((draining, forced, alone, server.failed), return_when=asyncio.FIRST_COMPLETED)
        return Exit.DONE if draining.done() and draining.result() else Exit.CUT
    finally:
        stopped.cancel()
        alone.cancel()
        await server.close()


def collect_rarely() -> None:
    """Has Python look for cycles rarely, and never again among what is there now: a model and its modules.

    For a process that does nothing but serve. What is made for a step and dropped after it is no garbage of that kind,
    and one look through everything takes longer than a step of 64 rows.
    """
    gc.collect()
    gc.freeze()
    youngest, *older = gc.get_threshold()
    gc.set_threshold(youngest and max(youngest, YOUNG), *older)


async def _alone(server: EngineServer, parent: int | None) -> None:
    """Beats; returns when the parent is gone."""
    while parent is None or not orphaned(parent):
        await asyncio.sleep(BEAT_S)
        server.beat()


def making(make: Make, loop: asyncio.AbstractEventLoop, made: asyncio.Future[Any]) -> None:
    """Settles `made`, which is the loop's, with what `make` gives or raises; for a thread of its own."""
    settle: Callable[[], None]
    try:
        settle = partial(made.set_result, make())
    except BaseException as caught:
        settle = partial(made.set_exception, caught)
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)


def _told(error: BaseException) -> Exit:
    """Logs why there is no engine; what to leave with."""
    if isinstance(error, ModelError | DownloadError | UnknownModel):
        _log.error("the model cannot be loaded: %s", error)
        return Exit.MODEL
    if isinstance(error, ConfigError | UnknownName):
        _log.error("%s", error)
        return Exit.USAGE
    _log.error("the engine cannot be made", exc_info=error)
    return Exit.FAILED


def main(argv: Sequence[str] | None = None, make: Callable[[Path], tuple[Engine, ModelFacts]] = make_from) -> int:
    parser = argparse.ArgumentParser("millstream.engine.process", description="An engine in a process of its own.")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; its folder is closed to others")
    parser.add_argument("--config", type=Path, required=True, help="TOML, YAML or JSON: model, and [engine]")
    parser.add_argument("--parent", type=int, help="end when the process of this id is no longer the parent")
    parser.add_argument("--drain-s", type=float, default=30.0, help="seconds that a stop may take (default 30)")
    args = parser.parse_args(argv)
    set_up_logs()
    # What else is wrong with the file is said by whoever reads it for the engine.
    with contextlib.suppress(MillstreamError):
        log_by(read_file(args.config))
    # Of two threads that both have work, the one that talks to clients must not wait for the other's whole turn.
    sys.setswitchinterval(SWITCH_S)
    if args.parent is not None and not die_with_parent(args.parent):
        return Exit.ORPHANED
    return int(asyncio.run(serve(args.socket, partial(make, args.config), args.parent, args.drain_s)))


def leave(code: int) -> None:
    """Ends the process with what was written flushed: libraries that tidy up take longer than they are worth."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
