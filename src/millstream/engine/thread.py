"""An engine on a thread of its own, so that whoever asks never waits for a step."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from millstream.core.client import Chunk, Load
from millstream.core.errors import EngineClosed
from millstream.core.request import Request
from millstream.core.sequence import Finish
from millstream.engine.engine import Engine, Sink

_log = logging.getLogger("millstream.engine")

# A step that finds work and cannot launch any of it waits this long for a gate to open.
_GATED_WAIT_S = 0.05


class EngineThread:
    """Runs `engine` until closed. `submit` and `abort` may be called from any thread; sinks run on the engine's."""

    def __init__(self, engine: Engine, name: str = "millstream-engine") -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ids = itertools.count(1)
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def new_id(self) -> int:
        return next(self._ids)

    def submit(self, request: Request, sink: Sink) -> None:
        """Raises BadRequest at once; what fails later reaches the sink as a chunk with an error for each output."""
        outputs = self.engine.num_outputs(request)

        def take() -> None:
            try:
                self.engine.submit(request, sink)
            except Exception as error:
                for index in range(outputs):
                    sink(Chunk(request.id, index, finish=Finish.ERROR, error=str(error)))

        self._post(take)

    def abort(self, request_id: int) -> None:
        self._post(lambda: self.engine.abort(request_id))

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

        self._post(take)
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

    def _post(self, work: Callable[[], None]) -> None:
        with self._wake:
            if self._closing or self.error is not None:
                raise EngineClosed("the engine is closed" if self.error is None else f"the engine failed: {self.error}")
            self._idle.clear()
            self._inbox.append(work)
            self._wake.notify()

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
                if engine.busy and not engine.step():
                    with self._wake:
                        if not self._inbox and not self._closing:
                            self._wake.wait(_GATED_WAIT_S)
        except BaseException as error:
            _log.exception("the engine thread failed")
            with self._wake:
                self.error = error
        self._end()

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
    """An EngineClient over an EngineThread, for one event loop."""

    def __init__(self, thread: EngineThread) -> None:
        self.thread = thread
        self._draining = False

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        if self._draining:
            raise EngineClosed("the engine is draining")
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        outputs = self.thread.engine.num_outputs(request)
        finished = 0

        def sink(chunk: Chunk) -> None:
            # A loop that ended takes its request along, not the engine's thread.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, chunk)

        self.thread.submit(request, sink)
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

    async def ready(self) -> bool:
        return self.thread.error is None and not self._draining

    async def drain(self) -> None:
        self._draining = True
        await asyncio.to_thread(self.thread.drain)

    async def load(self) -> Load:
        return self.thread.engine.load()

    async def adapters(self) -> Sequence[str]:
        return sorted(self.thread.engine.limits.adapters)

    async def close(self) -> None:
        await asyncio.to_thread(self.thread.close)
