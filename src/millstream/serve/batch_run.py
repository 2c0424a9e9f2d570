"""A batch from a file to a file, without a server: what `millstream run-batch` runs.

Results are appended as they come, each line whole before the next, and put into the order of the input at the end. A
run that was interrupted is taken up by the same command: what has a result is not done again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from millstream.core.errors import BadFile, BadRequest
from millstream.serve.batch_lines import (
    DEFAULT_LIMITS,
    Answer,
    BatchLimits,
    Line,
    LineError,
    error_line,
    read_lines,
    result_line,
)
from millstream.serve.files import new_id

Execute = Callable[[str, bytes, str], Awaitable[Answer]]
"""(endpoint, JSON body, label) -> answer."""

_PAGE_LINES = 64


@dataclass(slots=True)
class Summary:
    """How a run ended: requests in the file, those that had a result before it, and what became of the others."""

    total: int = 0
    before: int = 0
    completed: int = 0
    failed: int = 0


class _Result(msgspec.Struct):
    custom_id: str = ""
    line: int | None = None
    response: dict[str, Any] | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Result).decode


class BatchRun:
    """One input file and its output file.

    Lines that are no requests get an error of their own, with the number of the line; they are tried again by the next
    run, as are those that failed on our side. Raises BadFile when a file cannot be read or written, or when the output
    is something else than results.
    """

    def __init__(
        self, source: Path, target: Path, endpoints: tuple[str, ...], limits: BatchLimits = DEFAULT_LIMITS
    ) -> None:
        self.source, self.target, self.endpoints, self.limits = source, target, endpoints, limits
        if not source.is_file():
            raise BadFile(source, "is no file")
        if target.exists() and source.samefile(target):
            raise BadRequest("output_file", str(target), "another file than the input")
        self.summary = Summary()
        self._order: dict[str, int] = {}

    def prepare(self) -> None:
        """Counts the requests, and drops from the output what has to be done again."""
        try:
            with self.source.open("rb") as file:
                for number, line in read_lines(file, self.limits):
                    self.summary.total += 1
                    if isinstance(line, Line):
                        self._order.setdefault(line.custom_id, number)
        except OSError as error:
            raise BadFile(self.source, f"cannot be read: {error}") from error
        if not self.summary.total:
            raise BadFile(self.source, "has no requests")
        if self.target.exists():
            kept = self._kept()
            self._replace(kept)
            self.summary.before = len(kept)

    async def run(
        self, execute: Execute, at_once: int, progress: Callable[[Summary], None] = lambda summary: None
    ) -> Summary:
        """Answers what has no result yet, `at_once` requests at a time, and puts the output in order."""
        done = set(self._results_by_id())
        places = asyncio.Semaphore(at_once)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("ab") as out:
            async with asyncio.TaskGroup() as group:
                async for number, line in self._lines():
                    if isinstance(line, Line) and line.custom_id in done and self._order[line.custom_id] == number:
                        continue
                    await places.acquire()
                    task = group.create_task(self._one(number, line, execute, out, progress))
                    task.add_done_callback(lambda _: places.release())
        await asyncio.to_thread(self._sort)
        return self.summary

    async def _one(
        self, number: int, line: Line | LineError, execute: Execute, out: IO[bytes], progress: Callable[[Summary], None]
    ) -> None:
        result_id = new_id("batch_req_")
        if isinstance(line, Line) and self._order[line.custom_id] != number:
            said = f"custom_id {line.custom_id!r} is that of line {self._order[line.custom_id]} too"
            line = LineError("duplicate_custom_id", said, number)
        elif isinstance(line, Line) and line.url not in self.endpoints:
            said = f"there is no {line.url[:200]!r} here; there are: {', '.join(self.endpoints)}"
            line = LineError("mismatched_url", said, number)
        if isinstance(line, LineError):
            text, good = error_line(result_id, "", line.code, f"line {number}: {line.message}"), False
        else:
            answer = await execute(line.url, bytes(line.body), new_id("req_"))
            text, good = result_line(result_id, line.custom_id, answer), answer.status < 400
        # One write a line: a run that is killed leaves at most its last line in part.
        out.write(text)
        out.flush()
        if good:
            self.summary.completed += 1
        else:
            self.summary.failed += 1
        progress(self.summary)

    async def _lines(self) -> AsyncIterator[tuple[int, Line | LineError]]:
        with self.source.open("rb") as file:
            lines = read_lines(file, self.limits)
            while found := await asyncio.to_thread(lambda: list(itertools.islice(lines, _PAGE_LINES))):
                for one in found:
                    yield one

    # -- the output

    def _kept(self) -> list[bytes]:
        """The lines of the output that need not be done again. Raises BadFile."""
        kept, seen = [], set()
        lines = self._read()
        for number, text in enumerate(lines, start=1):
            try:
                result = _decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if number == len(lines) and not text.endswith(b"\n"):
                    break  # the last run was killed while it wrote this
                raise BadFile(self.target, f"line {number}: is no result of a batch: {error}") from error
            status = (result.response or {}).get("status_code")
            if result.response is None and result.error is None:
                raise BadFile(self.target, f"line {number}: is no result of a batch; name another output file")
            fine = isinstance(status, int) and status < 500
            if fine and result.custom_id in self._order and result.custom_id not in seen:
                seen.add(result.custom_id)
                kept.append(text if text.endswith(b"\n") else text + b"\n")
        return kept

    def _results_by_id(self) -> dict[str, bytes]:
        return {_decode(text).custom_id: text for text in self._read()} if self.target.exists() else {}

    def _sort(self) -> None:
        """Results in the order of their requests; errors of lines without an id come last, as they came."""
        lines = self._read()
        last = len(self._order) + max(self._order.values(), default=0)
        self._replace(sorted(lines, key=lambda text: self._order.get(_decode(text).custom_id, last)))

    def _read(self) -> list[bytes]:
        try:
            return self.target.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise BadFile(self.target, f"cannot be read: {error}") from error

    def _replace(self, lines: list[bytes]) -> None:
        part = self.target.with_name(f"{self.target.name}.{os.getpid()}.part")
        try:
            part.write_bytes(b"".join(lines))
            part.replace(self.target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BadFile(self.target, f"cannot be written: {error}") from error
