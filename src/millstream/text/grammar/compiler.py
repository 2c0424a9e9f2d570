"""Whether a grammar can be taken: asked of a process that is killed when it hangs, and remembered.

    compiler = GrammarCompiler(tokenizer.vocabulary, vocab_size, tokenizer.stop_ids)
    ready = compiler.check(Structured.json(schema))    # or: await compiler.check_async(...)
    SamplingParams(structured=ready.structured)

Every front end asks here before it submits: what a grammar does wrong is then a BadRequest, told before the first
token. The engine builds the same grammar again, which takes a millisecond, under the same limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from millstream.core.errors import BadRequest, EngineClosed, RequestFault, Told
from millstream.core.lru import Lru
from millstream.core.request import Structured
from millstream.text.grammar.build import MISSING, installed
from millstream.text.grammar.wire import Ask, Tokens, Verdict, frame, read_frame
from millstream.text.vocabulary import Vocabulary

# An entry's share of the cache beside its texts.
_ENTRY_BYTES = 512


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """Of one compile: seconds and bytes. Of the cache: entries and bytes. `waiting` grammars may stand in line."""

    time_s: float = 2.0
    memory_bytes: int = 512 << 20
    cache_items: int = 2048
    cache_bytes: int = 32 << 20
    waiting: int = 64


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar that can be taken, as the engine is to be given it; `warnings` tell what of it is not enforced."""

    structured: Structured
    warnings: tuple[str, ...] = ()


class GrammarCompiler:
    """Owns one worker process, started when it is first needed and again after it died. Thread-safe.

    `command` starts the worker (tests use another); it gets the time limit and the memory limit as arguments.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int,
        stop_ids: Iterable[int],
        limits: CompileLimits = CompileLimits(),
        command: Sequence[str] = (sys.executable, "-m", "millstream.text.grammar.worker"),
    ) -> None:
        self.limits = limits
        self._vocabulary, self._vocab_size, self._stop_ids = vocabulary, vocab_size, sorted(stop_ids)
        self._command = list(command)
        self._verdicts: Lru[Structured, Verdict] = Lru(limits.cache_items, limits.cache_bytes)
        self._asked: dict[Structured, Future[Verdict]] = {}
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._worker: _Worker | None = None
        self._closed = False
        self.compiled = self.refused = self.crashes = self.timeouts = 0
        self.compile_s = 0.0

    def check(self, structured: Structured, param: str = "structured") -> Compiled:
        """Waits for the verdict. Raises BadRequest, naming `param`, and RequestFault when no worker can be had."""
        return self._told(structured, self._ask(structured, param).result(), param)

    async def check_async(self, structured: Structured, param: str = "structured") -> Compiled:
        """The same, for an event loop."""
        asked = self._ask(structured, param)
        # Others may wait for the same grammar: one that is cancelled must not take it from them.
        verdict = asked.result() if asked.done() else await asyncio.shield(asyncio.wrap_future(asked))
        return self._told(structured, verdict, param)

    def warm(self) -> None:
        """Starts the worker, so that the first grammar need not wait for it. Returns at once."""
        if installed():
            with self._lock:
                if not self._closed:
                    self._executor().submit(self._warm)

    def counters(self) -> dict[str, float]:
        """For metrics. `grammar_cache_hits` over the sum of hits and misses is the hit rate."""
        verdicts = self._verdicts
        return {
            "grammar_cache_hits": verdicts.hits,
            "grammar_cache_misses": verdicts.misses,
            "grammar_cache_items": len(verdicts),
            "grammar_cache_bytes": verdicts.bytes,
            "grammar_cache_evicted": verdicts.evicted,
            "grammar_compiled": self.compiled,
            "grammar_refused": self.refused,
            "grammar_compile_s": self.compile_s,
            "grammar_worker_crashes": self.crashes,
            "grammar_worker_timeouts": self.timeouts,
            "grammar_waiting": len(self._asked),
        }

    def close(self) -> None:
        """Ends the worker. What is being asked fails with EngineClosed."""
        with self._lock:
            self._closed = True
            thread, worker = self._thread, self._worker
            self._thread = None
        if worker is not None:
            worker.stop()
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)
        if self._worker is not None:
            self._end(self._worker)
        with self._lock:
            waiting, self._asked = list(self._asked.values()), {}
        for asked in waiting:
            if not asked.done():
                asked.set_exception(EngineClosed("the grammar compiler is closed"))

    def _ask(self, structured: Structured, param: str) -> Future[Verdict]:
        if not installed():
            raise BadRequest(param, structured.kind, f"nothing: {MISSING}")
        with self._lock:
            if self._closed:
                raise EngineClosed("the grammar compiler is closed")
            asked = self._asked.get(structured)
            if asked is not None:
                return asked
            known = self._verdicts.get(structured)
            if known is not None:
                asked = Future()
                asked.set_result(known)
                return asked
            if len(self._asked) >= self.limits.waiting:
                raise RequestFault(f"{self.limits.waiting} grammars are waiting to be compiled already")
            asked = self._asked[structured] = Future()
            self._executor().submit(self._judge, structured, asked)
            return asked

    def _told(self, structured: Structured, verdict: Verdict, param: str) -> Compiled:
        if not verdict.taken:
            raise BadRequest(param, Told(verdict.got), verdict.allowed)
        if verdict.text == structured.text:
            return Compiled(structured, verdict.warnings)
        return Compiled(replace(structured, text=verdict.text), verdict.warnings)

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "millstream-grammar")
        return self._thread

    # -- on the compiler's own thread

    def _judge(self, structured: Structured, asked: Future[Verdict]) -> None:
        start = time.perf_counter()
        error: BaseException | None = None
        verdict: Verdict | None = None
        try:
            verdict = self._try(structured)
        except BaseException as caught:
            error = caught
        with self._lock:
            self._asked.pop(structured, None)
            self.compile_s += time.perf_counter() - start
            if verdict is not None:
                self.compiled += 1
                self.refused += not verdict.taken
                size = 4 * (len(structured.text) + len(verdict.text)) + len(verdict.got) + _ENTRY_BYTES
                self._verdicts.put(structured, verdict, size)
        if asked.done():
            return
        if verdict is not None:
            asked.set_result(verdict)
        else:
            asked.set_exception(error or RequestFault("the grammar was not compiled"))

    def _try(self, structured: Structured) -> Verdict:
        worker = self._started()
        try:
            return worker.ask(
                Ask(structured.kind, structured.text, structured.strict, structured.lead), self.limits.time_s
            )
        except TimeoutError:
            self._end(worker)
            self.timeouts += 1
            return Verdict(
                got=f"a {structured.kind} that compiles for more than {self.limits.time_s:g} s", allowed=_LESS
            )
        except (EOFError, OSError, ValueError, msgspec.MsgspecError):
            self._end(worker)
            if self._closed:
                raise EngineClosed("the grammar compiler is closed") from None
            self.crashes += 1
            return Verdict(got=f"a {structured.kind} that the compiler broke down over", allowed=_LESS)

    def _warm(self) -> None:
        with contextlib.suppress(RequestFault, EngineClosed):
            self._started()

    def _started(self) -> _Worker:
        if self._worker is not None and self._worker.alive():
            return self._worker
        vocabulary = self._vocabulary
        tokens = Tokens(vocabulary.all_bytes(), sorted(vocabulary.special_ids), self._stop_ids, self._vocab_size)
        try:
            worker = _Worker([*self._command, str(self.limits.time_s), str(self.limits.memory_bytes)])
        except OSError as error:
            raise RequestFault(f"the grammar compiler cannot be started: {error.strerror}") from None
        with self._lock:
            self._worker = worker
        try:
            if self._closed:
                raise EngineClosed("the grammar compiler is closed")
            worker.introduce(tokens)
        except (TimeoutError, EOFError, OSError, ValueError, msgspec.MsgspecError):
            self._end(worker)
            raise RequestFault("the grammar compiler does not come up") from None
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        self._worker = None


_LESS = "a simpler grammar"


class _Worker:
    """The process and its two pipes. One thread talks to it; `stop` may be called from another."""

    # What a start may take on a busy machine: Python, llguidance, the vocabulary. It takes 0.3 s on a quiet one.
    START_S = 60.0

    def __init__(self, command: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What a library says when it breaks down may hold a client's text.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
            # Ctrl-C is for the server, which closes us when it is done.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)

    def introduce(self, tokens: Tokens) -> None:
        """Raises what `ask` raises."""
        self._exchange(frame(tokens), self.START_S)

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, ask: Ask, time_s: float) -> Verdict:
        """Raises TimeoutError; EOFError or OSError when the process is gone; ValueError for an answer that is none."""
        return self._exchange(frame(ask), time_s)

    def stop(self) -> None:
        """Ends the process; whoever waits for it has EOFError."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def kill(self) -> None:
        """Ends the process and gives everything back."""
        self.stop()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _exchange(self, data: bytes, time_s: float) -> Verdict:
        until = time.monotonic() + time_s
        self._write(data, until)
        answer = read_frame(lambda size: self._read(size, until))
        if answer is None:
            raise EOFError("the worker ended")
        return msgspec.msgpack.decode(answer, type=Verdict)

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._in, select.POLLOUT, until)
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._in, view) :]

    def _read(self, size: int, until: float) -> bytes:
        self._wait(self._out, select.POLLIN, until)
        return os.read(self._out, size)

    @staticmethod
    def _wait(fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
