"""Batches: files of requests that are answered when there is nothing else to do, as OpenAI's batch API has them.

    validating -> in_progress -> finalizing -> completed
         |             |-> cancelling -> cancelled
         `-> failed    `-> expired (through finalizing)

Each line is a request like any other, but in the background: the engine computes it in steps that nobody else needs.
Its result is committed before the next line takes its place, so a server that was killed goes on with the lines that
have none. What the disk refuses is tried again until it is taken; meanwhile the batch stands still, and nothing else
does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from millstream.core.errors import BadRequest
from millstream.serve.batch_lines import (
    DEFAULT_LIMITS,
    Answer,
    BatchLimits,
    Line,
    LineError,
    check_file,
    error_line,
    read_lines,
    result_line,
)
from millstream.serve.files import MAX_PAGE, Draft, Files, new_id, page
from millstream.serve.store import DiskTrouble, Store

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at REAL NOT NULL, status TEXT NOT NULL, object BLOB NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, created_at, id);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, created_at);
CREATE TABLE IF NOT EXISTS batch_results (
    batch TEXT NOT NULL REFERENCES batches ON DELETE CASCADE, line INTEGER NOT NULL, good INTEGER NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (batch, line)
) STRICT, WITHOUT ROWID;
"""

MAX_METADATA = 16
MAX_OPEN_PER_OWNER = 1_000
MAX_ENDED_PER_OWNER = 10_000
_OPEN = ("validating", "in_progress", "finalizing", "cancelling")
# Answers that say that the server, not the request, had no good moment.
_AGAIN = frozenset({408, 429, 502, 503, 504})
_PAGE_LINES = 256
_RETRY_S = (0.5, 30.0)

Execute = Callable[[str, bytes, str, str], Awaitable[Answer]]
"""(endpoint, JSON body, owner, label) -> answer. Cancelling it ends the request."""

T = TypeVar("T")

_log = logging.getLogger("millstream.batches")


class Counts(msgspec.Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class ErrorList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[LineError] = []


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch as OpenAI's API shows it. `paused` says why nothing happens, where the disk is to blame."""

    id: str
    object: str = "batch"
    endpoint: str
    errors: ErrorList | None = None
    input_file_id: str
    completion_window: str
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    metadata: dict[str, str] | None = None
    paused: str | None = None


class _Kept(BatchObject, kw_only=True):
    """The same, with what is not shown: the names of files that are being written, and what the end will be."""

    results_id: str = ""
    errors_id: str = ""
    ends_as: str = "completed"


_GONE = LineError("file_not_found", "the input file is not there any more")

_decode = msgspec.json.Decoder(_Kept).decode
_COLUMNS = "object, completed, failed, owner"


class Batches:
    """All batches of a store. `execute` answers a line; `clock` gives wall-clock seconds.

    `at_once` lines are under way at a time, of at most `num_batches` batches, of as many owners as there are.
    """

    def __init__(
        self,
        store: Store,
        files: Files,
        execute: Execute,
        endpoints: Sequence[str],
        *,
        limits: BatchLimits = DEFAULT_LIMITS,
        at_once: int = 16,
        num_batches: int = 4,
        clock: Callable[[], float] = time.time,
        retry_s: tuple[float, float] = _RETRY_S,
    ) -> None:
        self._store, self._files, self._execute = store, files, execute
        self.endpoints, self.limits = tuple(endpoints), limits
        self._clock, self._retry_s = clock, retry_s
        self._places = asyncio.Semaphore(at_once)
        self._num_batches = num_batches
        self._news = asyncio.Event()
        self._running: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._paused: dict[str, str] = {}
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False

    # -- what clients ask for

    async def create(
        self, owner: str, input_file_id: str, endpoint: str, window: str = "24h", metadata: dict[str, str] | None = None
    ) -> BatchObject:
        """Raises BadRequest and DiskTrouble."""
        if endpoint not in self.endpoints:
            raise BadRequest("endpoint", endpoint, ", ".join(self.endpoints))
        window_s = _seconds(window)
        _check_metadata(metadata)
        file = await self._files.get(owner, input_file_id)
        if file is None:
            raise BadRequest("input_file_id", input_file_id, "the id of a file that this key has uploaded")
        if file.purpose != "batch":
            raise BadRequest("input_file_id", f"a file for {file.purpose}", "a file with the purpose batch")
        now = self._clock()
        batch = _Kept(
            id=new_id("batch_"),
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=window,
            created_at=int(now),
            expires_at=int(now + window_s),
            metadata=metadata,
        )

        def insert(db: sqlite3.Connection) -> None:
            marks = ", ".join("?" * len(_OPEN))
            query = f"SELECT count(*) FROM batches WHERE owner = ? AND status IN ({marks})"
            if db.execute(query, (owner, *_OPEN)).fetchone()[0] >= MAX_OPEN_PER_OWNER:
                raise BadRequest("batches", "one more", f"at most {MAX_OPEN_PER_OWNER} that have not ended")
            # Of those that have ended only the latest are remembered.
            ended = (
                f"SELECT id FROM batches WHERE owner = ? AND status NOT IN ({marks}) ORDER BY created_at DESC LIMIT -1"
            )
            db.execute(f"DELETE FROM batches WHERE id IN ({ended} OFFSET ?)", (owner, *_OPEN, MAX_ENDED_PER_OWNER))
            row = (batch.id, owner, now, batch.status, msgspec.json.encode(batch))
            db.execute("INSERT INTO batches (id, owner, created_at, status, object) VALUES (?, ?, ?, ?, ?)", row)

        await self._store.run(insert)
        self._news.set()
        return self._shown(batch)

    async def get(self, owner: str, batch_id: str) -> BatchObject | None:
        query = f"SELECT {_COLUMNS} FROM batches WHERE owner = ? AND id = ?"
        row = await self._store.run(lambda db: db.execute(query, (owner, batch_id)).fetchone())
        return None if row is None else self._shown(_loaded(row))

    async def listed(self, owner: str, after: str | None = None, limit: int = 20) -> tuple[list[BatchObject], bool]:
        """A page of an owner's batches, the newest first, and whether there are more. Raises BadRequest."""
        limit = min(limit, MAX_PAGE)

        def select(db: sqlite3.Connection) -> list[Any]:
            return page(db, f"SELECT {_COLUMNS} FROM batches", "owner = ?", [owner], after, limit, True, "batches")

        rows = await self._store.run(select)
        return [self._shown(_loaded(row)) for row in rows[:limit]], len(rows) > limit

    async def cancel(self, owner: str, batch_id: str) -> BatchObject | None:
        """Ends a batch with what it has. None when there is no such batch; one that has ended stays as it is."""

        def change(db: sqlite3.Connection) -> tuple[_Kept, bool] | None:
            query = f"SELECT {_COLUMNS} FROM batches WHERE owner = ? AND id = ?"
            row = db.execute(query, (owner, batch_id)).fetchone()
            if row is None:
                return None
            batch = _loaded(row)
            now = batch.status in ("validating", "in_progress")
            if now:
                batch.status, batch.cancelling_at, batch.ends_as = "cancelling", int(self._clock()), "cancelled"
                _save(db, batch)
            return batch, now

        found = await self._store.run(change)
        if found is None:
            return None
        batch, now = found
        # Only once: the second time it may be writing out what it has.
        if now and batch_id in self._running:
            self._running[batch_id][1].cancel()
        self._news.set()
        return self._shown(batch)

    # -- the work

    async def start(self) -> None:
        """Takes up what had not ended, and works from now on."""
        self._loop = asyncio.create_task(self._work(), name="batches")

    async def stop(self) -> None:
        """Leaves everything as it is, for the next start."""
        self._stopping = True
        tasks = [task for _, task in self._running.values()] + ([self._loop] if self._loop else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def paused(self) -> bool:
        """Whether a batch stands still because the disk takes nothing."""
        return bool(self._paused)

    async def _work(self) -> None:
        while True:
            self._news.clear()
            try:
                for owner, batch_id in await self._next():
                    task = asyncio.create_task(self._one(batch_id), name=batch_id)
                    self._running[batch_id] = (owner, task)
                    task.add_done_callback(lambda done: self._ended(done.get_name(), done))
            except Exception:
                _log.exception("batches cannot be looked up; tried again")
                await asyncio.sleep(self._retry_s[1])
                continue
            # Time alone ends some of them: looked after now and then.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await self._news.wait()

    async def _next(self) -> list[tuple[str, str]]:
        """(owner, id) of batches to take up now: the oldest of the owners that have fewest under way."""
        marks = ", ".join("?" * len(_OPEN))
        query = f"SELECT owner, id FROM batches WHERE status IN ({marks}) ORDER BY created_at, id"
        rows = await self._store.run(lambda db: db.execute(query, _OPEN).fetchall())
        waiting = [(owner, batch_id) for owner, batch_id in rows if batch_id not in self._running]
        busy = Counter(owner for owner, _ in self._running.values())
        found = []
        for _ in range(self._num_batches - len(self._running)):
            if not waiting:
                break
            first = min(waiting, key=lambda pair: busy[pair[0]])
            waiting.remove(first)
            busy[first[0]] += 1
            found.append(first)
        return found

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            _log.error("batch %s stopped, and is taken up again later", batch_id, exc_info=task.exception())
            task.get_loop().call_later(self._retry_s[1], self._forget, batch_id)
        else:
            self._forget(batch_id)

    def _forget(self, batch_id: str) -> None:
        self._running.pop(batch_id, None)
        self._paused.pop(batch_id, None)
        self._news.set()

    async def _one(self, batch_id: str) -> None:
        """Takes a batch from where it is to its end."""
        try:
            batch = await self._load(batch_id)
            if batch.status == "validating":
                batch = await self._validate(batch)
            if batch.status == "in_progress":
                batch = await self._run(batch)
        except asyncio.CancelledError:
            # By `cancel`: what has come so far is written out. By `stop`: it stays as it is.
            task = asyncio.current_task()
            if self._stopping or task is None:
                raise
            task.uncancel()
            batch = await self._load(batch_id)
        except Exception:
            _log.exception("batch %s failed", batch_id)
            said = LineError("internal_error", "the server could not go on with this batch")
            await self._change(batch_id, lambda kept: _fail(kept, [said], self._clock()))
            return
        if batch.status in ("cancelling", "finalizing"):
            await self._finalize(batch)

    async def _validate(self, batch: _Kept) -> _Kept:
        path = self._files.path(batch.input_file_id)
        try:
            count, errors = await asyncio.to_thread(check_file, path, batch.endpoint, self.limits)
        except FileNotFoundError:
            count, errors = 0, [_GONE]

        def change(kept: _Kept) -> None:
            if kept.status != "validating":
                return
            if errors:
                _fail(kept, errors, self._clock())
            else:
                kept.status, kept.in_progress_at = "in_progress", int(self._clock())
            kept.request_counts.total = count

        return await self._change(batch.id, change)

    async def _run(self, batch: _Kept) -> _Kept:
        query = "SELECT line FROM batch_results WHERE batch = ?"
        rows = await self._patiently(
            batch.id, lambda: self._store.run(lambda db: db.execute(query, (batch.id,)).fetchall())
        )
        done = frozenset(row[0] for row in rows)
        ends_as, owner = "completed", await self._owner(batch.id)
        try:
            # Lines of what is past its time are not begun; those that are under way end with it.
            async with asyncio.timeout(max(0.0, (batch.expires_at or 0) - self._clock())), asyncio.TaskGroup() as group:
                async for number, line in self._lines(batch, done):
                    await self._places.acquire()
                    task = group.create_task(self._line(batch, owner, number, line))
                    task.add_done_callback(lambda _: self._places.release())
        except TimeoutError:
            ends_as = "expired"

        def change(kept: _Kept) -> None:
            if kept.status == "in_progress":
                kept.status, kept.finalizing_at, kept.ends_as = "finalizing", int(self._clock()), ends_as

        return await self._change(batch.id, change)

    async def _lines(self, batch: _Kept, done: frozenset[int]) -> AsyncIterator[tuple[int, Line | LineError]]:
        """Lines without a result, read a page at a time off the event loop."""
        with self._files.path(batch.input_file_id).open("rb") as file:
            lines: Iterator[tuple[int, Any]] = read_lines(file, self.limits, done)
            while found := await asyncio.to_thread(lambda: list(itertools.islice(lines, _PAGE_LINES))):
                for one in found:
                    yield one

    async def _line(self, batch: _Kept, owner: str, number: int, line: Line | LineError) -> None:
        """One request to its end, and the result into the store."""
        if isinstance(line, LineError):  # the file is not what was validated
            data, good = error_line(new_id("batch_req_"), "", line.code, line.message), False
        else:
            answer = await self._answered(batch, owner, line)
            data, good = result_line(new_id("batch_req_"), line.custom_id, answer), answer.status < 400

        def insert(db: sqlite3.Connection) -> None:
            row = (batch.id, number, int(good), data)
            if db.execute("INSERT OR IGNORE INTO batch_results VALUES (?, ?, ?, ?)", row).rowcount:
                column = "completed" if good else "failed"
                db.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (batch.id,))

        await self._patiently(batch.id, lambda: self._store.run(insert))

    async def _answered(self, batch: _Kept, owner: str, line: Line) -> Answer:
        pause, longest = self._retry_s
        while True:
            label = new_id("req_")
            try:
                answer = await self._execute(batch.endpoint, bytes(line.body), owner, label)
            except Exception:
                _log.exception("a request of batch %s failed", batch.id)
                error = {
                    "message": "the server failed on this request",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
                return Answer(500, msgspec.json.encode({"error": error}), label)
            if answer.status not in _AGAIN:
                return answer
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _finalize(self, batch: _Kept) -> None:
        """Writes the files and ends the batch. Again from the start after a kill: files of ours replace themselves."""

        def name(kept: _Kept) -> None:
            kept.results_id = kept.results_id or new_id("file-")
            kept.errors_id = kept.errors_id or new_id("file-")

        batch = await self._change(batch.id, name)
        owner = await self._owner(batch.id)
        written = {}
        for good, file_id, title in ((1, batch.results_id, "output"), (0, batch.errors_id, "error")):
            write = functools.partial(self._write, batch, owner, good, file_id, title)
            written[good] = await self._patiently(batch.id, write)

        def end(db: sqlite3.Connection) -> None:
            kept = _loaded(db.execute(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch.id,)).fetchone())
            kept.output_file_id = kept.results_id if written[1] else None
            kept.error_file_id = kept.errors_id if written[0] else None
            kept.status = kept.ends_as
            setattr(kept, f"{kept.ends_as}_at", int(self._clock()))
            _save(db, kept)
            db.execute("DELETE FROM batch_results WHERE batch = ?", (batch.id,))

        await self._patiently(batch.id, lambda: self._store.run(end))

    async def _write(self, batch: _Kept, owner: str, good: int, file_id: str, title: str) -> bool:
        """One of the two files; False when there is nothing to put into it."""
        draft = await asyncio.to_thread(self._files.begin)
        try:
            await self._copy(draft, batch.id, good)
            if not good and batch.ends_as == "expired":
                await self._copy_expired(draft, batch)
            if draft.size == 0:
                return False
            await self._files.keep(draft, owner, "batch_output", f"{batch.id}_{title}.jsonl", ours=file_id)
            return True
        finally:
            draft.drop()

    async def _copy(self, draft: Draft, batch_id: str, good: int) -> None:
        query = "SELECT line, data FROM batch_results WHERE batch = ? AND good = ? AND line > ? ORDER BY line LIMIT ?"
        last = 0
        while rows := await self._rows(query, (batch_id, good, last, _PAGE_LINES)):
            await asyncio.to_thread(draft.write, b"".join(data for _, data in rows))
            last = rows[-1][0]

    async def _copy_expired(self, draft: Draft, batch: _Kept) -> None:
        done = await self._done(batch.id)
        said = "the batch's time was over before this request was answered"
        with contextlib.suppress(FileNotFoundError):
            async for _, line in self._lines(batch, done):
                if isinstance(line, Line):
                    text = error_line(new_id("batch_req_"), line.custom_id, "batch_expired", said)
                    await asyncio.to_thread(draft.write, text)

    # -- the store

    async def _rows(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        return await self._store.run(lambda db: db.execute(query, values).fetchall())

    async def _kept(self, batch_id: str) -> tuple[Any, ...]:
        query = f"SELECT {_COLUMNS} FROM batches WHERE id = ?"
        rows = await self._patiently(batch_id, lambda: self._rows(query, (batch_id,)))
        return tuple(rows[0])

    async def _load(self, batch_id: str) -> _Kept:
        return _loaded(await self._kept(batch_id))

    async def _owner(self, batch_id: str) -> str:
        return str((await self._kept(batch_id))[3])

    async def _done(self, batch_id: str) -> frozenset[int]:
        """The lines that have a result."""
        query = "SELECT line FROM batch_results WHERE batch = ?"
        return frozenset(row[0] for row in await self._patiently(batch_id, lambda: self._rows(query, (batch_id,))))

    async def _change(self, batch_id: str, change: Callable[[_Kept], None]) -> _Kept:
        def work(db: sqlite3.Connection) -> _Kept:
            kept = _loaded(db.execute(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch_id,)).fetchone())
            change(kept)
            _save(db, kept)
            return kept

        return await self._patiently(batch_id, lambda: self._store.run(work))

    async def _patiently(self, batch_id: str, work: Callable[[], Awaitable[T]]) -> T:
        """Does it, and again for as long as the disk takes nothing."""
        pause, longest = self._retry_s
        while True:
            try:
                found = await work()
            except DiskTrouble as trouble:
                if batch_id not in self._paused:
                    _log.warning("batch %s stands still: %s", batch_id, trouble)
                self._paused[batch_id] = str(trouble)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                continue
            if self._paused.pop(batch_id, None) is not None:
                _log.warning("batch %s goes on", batch_id)
            return found

    def _shown(self, batch: _Kept) -> BatchObject:
        shown = {name: getattr(batch, name) for name in BatchObject.__struct_fields__}
        return BatchObject(**{**shown, "paused": self._paused.get(batch.id)})


def _fail(batch: _Kept, errors: list[LineError], now: float) -> None:
    batch.status, batch.failed_at, batch.errors = "failed", int(now), ErrorList(data=errors)


def _loaded(row: tuple[Any, ...]) -> _Kept:
    data, completed, failed, _ = row
    batch = _decode(data)
    batch.request_counts.completed, batch.request_counts.failed = completed, failed
    return batch


def _save(db: sqlite3.Connection, batch: _Kept) -> None:
    values = (batch.status, msgspec.json.encode(batch), batch.id)
    db.execute("UPDATE batches SET status = ?, object = ? WHERE id = ?", values)


def _seconds(window: str) -> float:
    units = {"m": 60, "h": 3600, "d": 86_400}
    number, unit = window[:-1], window[-1:]
    if (
        not number.isdecimal()
        or unit not in units
        or len(number) > 4
        or not 60 <= int(number) * units[unit] <= 30 * 86_400
    ):
        raise BadRequest("completion_window", window, "24h, or another time from 1m to 30d")
    return float(int(number) * units[unit])


def _check_metadata(metadata: dict[str, str] | None) -> None:
    for key, value in (metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise BadRequest("metadata", key, "keys of at most 64 characters, values of at most 512")
    if metadata is not None and len(metadata) > MAX_METADATA:
        raise BadRequest("metadata", f"{len(metadata)} entries", f"at most {MAX_METADATA}")
