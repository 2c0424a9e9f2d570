"""Commands to a worker process and its answers: a line of JSON each, on the worker's stdin and stdout.

The worker says `{"ready": ...}` once its engine is loaded and has made one token, then answers

    {"do": "generate", "prompts": [[ids], ...], "output_len": n}    {"seconds": s, "outputs": [[ids], ...]}
    {"do": "score", "prompts": [[ids], ...]}                        {"logprob": sum, "count": tokens}
    {"do": "stop"}                                                  (the process ends)

or `{"error": words}`. Whatever else the engine prints goes to the worker's stderr, which is kept as a file.

Only the standard library here: this file runs in every engine's own environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Given to a worker so that it can tell how long its own process took to start: the same clock on both sides.
STARTED = "PEERS_STARTED"


class WorkerFailed(Exception):
    """A worker that died, did not answer in time, or answered with an error. Says why."""


# -- the worker's side


class Engine(Protocol):
    """What a worker module gives to `serve`. `told` goes into the table: version, precision, what was set."""

    told: Mapping[str, Any]

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        """Greedy, all prompts at once, exactly `output_len` tokens each whatever the model's end token."""
        ...


def serve(make: Callable[[Mapping[str, Any]], Engine]) -> int:
    """The life of a worker: sys.argv[1] is its setup as JSON, `make` turns it into an engine.

    What `make` imports and loads is timed apart when it calls `imported()` in between.
    """
    die_with_parent()
    # Libraries print to the descriptor, not to sys.stdout.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = float(os.environ.get(STARTED, time.monotonic()))
    setup = json.loads(sys.argv[1])

    def say(value: Mapping[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    try:
        engine = make(setup)
        loaded = time.monotonic()
        first = engine.generate([setup["first_prompt"]], 1)
        done = time.monotonic()
        phases = {"imports_s": _imported.at - begun, "load_s": loaded - _imported.at, "first_token_s": done - loaded}
        say({"ready": dict(engine.told), "phases_s": phases, "total_s": done - begun, "outputs": first})
        for line in sys.stdin:
            ask = json.loads(line)
            if ask["do"] == "stop":
                break
            say(_answer(engine, ask))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    with contextlib.suppress(AttributeError):
        engine.close()  # type: ignore[attr-defined]
    return 0


def die_with_parent() -> None:
    """Has the system end this process when the one that started it is gone: a stopped worker would stay forever."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class _Imported:
    at = time.monotonic()


_imported = _Imported()


def imported() -> None:
    """Called by `make` once its engine's modules are there."""
    _imported.at = time.monotonic()


def _answer(engine: Engine, ask: Mapping[str, Any]) -> dict[str, Any]:
    if ask["do"] == "generate":
        start = time.perf_counter()
        outputs = engine.generate(ask["prompts"], ask["output_len"])
        return {"seconds": time.perf_counter() - start, "outputs": [list(map(int, ids)) for ids in outputs]}
    if ask["do"] == "score" and hasattr(engine, "score"):
        logprob, count = engine.score(ask["prompts"])
        return {"logprob": logprob, "count": count}
    return {"error": f"{ask['do']!r} is not something that this engine does"}


# -- the driver's side


class Worker:
    """A worker process. While it is not asked anything it is stopped, so that it takes no time from the others."""

    def __init__(
        self, name: str, command: Sequence[str], setup: Mapping[str, Any], log: Path, env: Mapping[str, str]
    ) -> None:
        self.name, self._log, self._closed, self._idle = name, log, False, False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*command, json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**env, STARTED: repr(time.monotonic())},
                start_new_session=True,
            )
        self._ready = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._ready.register(self._process.stdout, selectors.EVENT_READ)
        self._held = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, limit_s: float = 600.0) -> dict[str, Any]:
        """Waits until it is loaded, and stops it. Raises WorkerFailed."""
        try:
            return self._read(limit_s)
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, limit_s: float = 600.0, **what: Any) -> dict[str, Any]:
        """One command, answered. Raises WorkerFailed, after which the worker is of no more use."""
        self._signal(signal.SIGCONT)
        self._idle = False
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
            return self._read(limit_s)
        except OSError as error:
            raise WorkerFailed(f"{self.name} is gone ({error}): {self._last_words()}") from error
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_s(self) -> float:
        """Processor seconds of the worker and the processes that it started, so far. 0 where /proc is not there."""
        return cpu_seconds(self.pid)

    def close(self) -> None:
        """Asks it to end, and ends it. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGCONT)
        # One that is in the midst of something will not hear it.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(b'{"do": "stop"}\n', timeout=5 if self._idle else 0.1)
        # Its group outlives it when the engine left processes of its own behind.
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._ready.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + limit_s
        while b"\n" not in self._held:
            if not self._ready.select(max(0.0, until - time.monotonic())):
                raise WorkerFailed(f"{self.name} did not answer in {limit_s:.0f} s: {self._last_words()}")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise WorkerFailed(f"{self.name} ended: {self._last_words()}")
            self._held += read
        line, _, self._held = self._held.partition(b"\n")
        self._idle = True
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}")
        return answer

    def _signal(self, which: signal.Signals) -> None:
        # The whole group: engines start processes of their own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, which)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines[-1][-300:] if lines else "it said nothing") + f" (all of it: {self._log})"


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and all that descend from it. 0 where /proc is not there."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command's name is in parentheses and may hold anything.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            found = int(stat.parent.name)
            parents.setdefault(int(fields[1]), []).append(found)
            used[found] = int(fields[11]) + int(fields[12])
    total, queue = 0, [pid]
    while queue:
        one = queue.pop()
        total += used.get(one, 0)
        queue += parents.get(one, [])
    return total / ticks
