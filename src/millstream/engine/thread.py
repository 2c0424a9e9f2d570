"""An engine on a thread of its own, so that whoever asks never waits for a step."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from millstream.core.client import Chunk, Load, ModelFacts
from millstream.core.errors import EngineClosed
from millstream.core.events import Event
from millstream.core.request import Request
from millstream.core.sequence import Finish
from millstream.engine import calls
from millstream.engine.engine import Engine, Sink
from millstream.engine.feed import EventFeed, Tap, still

_log = logging.getLogger("millstream.engine")

# A step that finds work and cannot launch any of it waits this long for a gate to open.
_GATED_WAIT_S = 0.05
# Counting everything takes tens of microseconds, and nobody needs it anew more often.
_LOAD_EVERY_S = 0.02


class EngineThread:
    """Runs `engine` until closed. `submit`, `abort` and `post` may be called from any thread; sinks run on its own.

    `on_turn` are called on its own thread at the end of every turn (what was asked since the last one, and a step);
    `on_error` when the engine has failed, before anybody is told. `load` is how the engine stood after a recent turn,
    `turns` counts them, and `busy` says whether there is work inside: all may be read from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        name: str = "millstream-engine",
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.on_turn: list[Callable[[], None]] = []
        self.turns = 0
        self.load = engine.load()
        self._load_at = 0.0
        self._on_error = on_error
        self._inbox: deque[Callable[[], None]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ids = itertools.count(1)
        self._idle = threading.Event()
        self._idle.set()
        engine.wake = self._nudge
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def new_id(self) -> int:
        return next(self._ids)

    def submit(self, request: Request, sink: Sink) -> int:
        """Gives how many outputs will end. Raises BadRequest at once; what fails later reaches the sink as a chunk with
        an error for each of them."""
        ended = {prior.index for prior in request.prior if prior.ended}
        outputs = [index for index in range(self.engine.num_outputs(request)) if index not in ended]

        def take() -> None:
            try:
                self.engine.submit(request, sink)
            except Exception as error:
                for index in outputs:
                    sink(Chunk(request.id, index, finish=Finish.ERROR, error=str(error)))

        self.post(take)
        return len(outputs)

    def abort(self, request_id: int) -> None:
        self.post(lambda: self.engine.abort(request_id))

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it has not failed, and was not closed."""
        return self.error is None and not self._closing

    def call(self, work: Callable[[Engine], object]) -> object:
        """Runs `work` between two steps and returns what it gives."""
        done = threading.Event()
        out: list[object] = []
        error: list[BaseException] = []

        def take() -> None:
            try:
                out.append(work(self.engine))
            except BaseException as caught:
                error.append(caught)
            done.set()

        self.post(take)
        done.wait()
        if error:
            raise error[0]
        return out[0]

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is inside; False when the time ran out first."""
        return self._idle.wait(timeout_s)

    def close(self) -> None:
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def post(self, work: Callable[[], None]) -> None:
        """Has `work` run between two steps. It must not raise. Raises EngineClosed."""
        with self._wake:
            if self._closing or self.error is not None:
                raise EngineClosed("the engine is closed" if self.error is None else f"the engine failed: {self.error}")
            self._idle.clear()
            self._inbox.append(work)
            self._wake.notify()

    def _nudge(self) -> None:
        """Ends the wait for a gate."""
        with contextlib.suppress(EngineClosed):
            self.post(lambda: None)

    def _run(self) -> None:
        engine = self.engine
        try:
            while True:
                with self._wake:
                    while not self._inbox and not engine.busy and not self._closing:
                        self._idle.set()
                        self._wake.wait()
                    if self._closing:
                        break
                    self._work, self._inbox = self._inbox, deque()
                self._do()
                waits = engine.busy and not engine.step()
                self._turned()
                if waits:
                    with self._wake:
                        if not self._inbox and not self._closing:
                            self._wake.wait(_GATED_WAIT_S)
        except BaseException as error:
            _log.exception("the engine thread failed")
            with self._wake:
                self.error = error
            if self._on_error is not None:
                self._on_error(error)
        self._end()

    def _turned(self) -> None:
        self.turns += 1
        now = time.monotonic()
        if now - self._load_at >= _LOAD_EVERY_S or not self.engine.busy:
            self._load_at = now
            self.load = self.engine.load()
        for tell in self.on_turn:
            tell()

    def _do(self) -> None:
        while self._work:
            self._work.popleft()()

    def _end(self) -> None:
        """Nobody is left waiting: what is inside fails, what is in the inbox is refused."""
        self.engine.fail(self.error or EngineClosed("the engine was closed"))
        with self._wake:
            self._work.extend(self._inbox)
            self._inbox.clear()
            self._closing = True
        self._do()
        self.engine.fail(self.error or EngineClosed("the engine was closed"))
        self.engine.close()
        self._idle.set()


class AsyncEngine:
    """An EngineClient over an EngineThread, for one event loop. `facts` are those that `facts()` tells."""

    def __init__(self, thread: EngineThread, facts: ModelFacts | None = None) -> None:
        self.thread = thread
        self._facts = facts
        self._draining = False

    def new_id(self) -> int:
        return self.thread.new_id()

    async def facts(self) -> ModelFacts:
        if self._facts is None:
            raise EngineClosed("this engine was made without a model's files, so there are no facts to tell")
        return self._facts

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        if self._draining:
            raise EngineClosed("the engine is draining")
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        finished = 0

        def sink(chunk: Chunk) -> None:
            # A loop that ended takes its request along, not the engine's thread.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, chunk)

        outputs = self.thread.submit(request, sink)
        try:
            while finished < outputs:
                chunk = await queue.get()
                finished += chunk.finish is not None
                yield chunk
        finally:
            if finished < outputs:
                await self.abort(request.id)

    async def abort(self, request_id: int) -> None:
        # A closed engine has ended everything already.
        with contextlib.suppress(EngineClosed):
            self.thread.abort(request_id)

    async def events(self, *kinds: type[Event]) -> AsyncIterator[Event]:
        feed, loop = EventFeed(), asyncio.get_running_loop()

        def pass_on(events: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(feed.put, events)

        tap = Tap(kinds, still, pass_on)
        thread = self.thread
        thread.post(lambda: tap.open(thread.engine.listeners, thread.on_turn))
        try:
            async for event in feed:
                yield event
        finally:
            with contextlib.suppress(EngineClosed):
                thread.post(lambda: tap.close(thread.engine.listeners, thread.on_turn))

    async def call(self, name: str, **given: Any) -> Any:
        work = calls.find(name)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        loop = done.get_loop()

        def settle(value: Any, error: Exception | None) -> None:
            if not done.done():
                done.set_result(value) if error is None else done.set_exception(error)

        def take() -> None:
            value, error = None, None
            try:
                value = work(self.thread.engine, **given)
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, value, error)

        self.thread.post(take)
        return await done

    async def ready(self) -> bool:
        return self.thread.alive and not self._draining

    async def drain(self) -> None:
        self._draining = True
        await asyncio.to_thread(self.thread.drain)

    async def load(self) -> Load:
        return self.thread.load

    async def adapters(self) -> Sequence[str]:
        return sorted(self.thread.engine.limits.adapters)

    async def close(self) -> None:
        await asyncio.to_thread(self.thread.close)
