"""Files that clients keep here: what batches read and write. Each belongs to the key that made it; no other sees it.

Content lies in files of our own naming; a client's file name is a label. What was written in part before a process
died is removed when the next one starts.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from millstream.core.errors import BadRequest, MillstreamError
from millstream.serve.store import Store, disk_trouble

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, purpose TEXT NOT NULL, filename TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at REAL NOT NULL, expires_at REAL
) STRICT;
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, created_at, id);
"""

# What a client may upload a file for; the others are made here.
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")
MAX_FILENAME = 512
MAX_PAGE = 10_000
_DAY_S = 86_400


class TooLarge(MillstreamError):
    """More bytes than one file, or all files of a key, may have."""


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bytes of one file, and of all files of one key; how many files a key may have."""

    file_bytes: int = 200 << 20
    owner_bytes: int = 4 << 30
    owner_files: int = 10_000


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file as OpenAI's API shows it."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str = "processed"


_COLUMNS = "id, purpose, filename, bytes, created_at, expires_at"


def new_id(prefix: str) -> str:
    """An id that nobody guesses: 128 random bits."""
    return prefix + secrets.token_hex(16)


class Files:
    """All files of a store. `clock` gives wall-clock seconds."""

    def __init__(self, store: Store, limits: FileLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self._store, self.limits, self._clock = store, limits or FileLimits(), clock
        self.folder = store.folder / "files"
        self._sweep_at = 0.0

    async def start(self) -> None:
        """Removes what a process that died left half written, and files that nobody knows. Raises DiskTrouble."""

        def sweep(db: sqlite3.Connection) -> None:
            self.folder.mkdir(exist_ok=True, mode=0o700)
            known = {row[0] for row in db.execute("SELECT id FROM files")}
            for path in self.folder.iterdir():
                if path.name not in known:
                    path.unlink()

        await self._store.run(sweep)

    def begin(self) -> Draft:
        """A file to write to. It becomes a file of its owner with `keep`, and nothing with `drop`."""
        with disk_trouble():
            return Draft(self.folder / f"{new_id('draft-')}.part")

    async def keep(
        self,
        draft: Draft,
        owner: str,
        purpose: str,
        filename: str,
        expires_after_s: int | None = None,
        ours: str | None = None,
    ) -> FileObject:
        """Raises TooLarge, DiskTrouble. `ours` is the id of a file that we made for them: no limit refuses it, and one
        of that id is replaced."""
        await self._expire()
        now = self._clock()
        found = FileObject(
            id=ours or new_id("file-"),
            bytes=draft.size,
            created_at=int(now),
            expires_at=int(now) + expires_after_s if expires_after_s else None,
            filename=_label(filename),
            purpose=purpose,
        )

        def insert(db: sqlite3.Connection) -> None:
            count, total = db.execute(
                "SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE owner = ?", (owner,)
            ).fetchone()
            if ours is None and count >= self.limits.owner_files:
                raise TooLarge(f"this key has {count} files, the most that it may have; delete some")
            if ours is None and total + draft.size > self.limits.owner_bytes:
                raise TooLarge(
                    f"this key's files have {total} bytes, and with this one would have more than "
                    f"{self.limits.owner_bytes}; delete some"
                )
            row = (found.id, owner, purpose, found.filename, found.bytes, now, found.expires_at)
            db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            # A file without a row is removed at the next start; a row without a file would be a lie.
            draft.move(self.path(found.id))

        try:
            await self._store.run(insert)
        except BaseException:
            draft.drop()
            raise
        return found

    async def get(self, owner: str, file_id: str) -> FileObject | None:
        await self._expire()
        query = f"SELECT {_COLUMNS} FROM files WHERE owner = ? AND id = ?"
        row = await self._store.run(lambda db: db.execute(query, (owner, file_id)).fetchone())
        return None if row is None else _shown(row)

    async def listed(
        self,
        owner: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = MAX_PAGE,
        desc: bool = True,
    ) -> tuple[list[FileObject], bool]:
        """A page of an owner's files by age, and whether there are more. Raises BadRequest for a wrong `after`."""
        await self._expire()

        def select(db: sqlite3.Connection) -> list[Any]:
            where, values = "owner = ?", [owner]
            if purpose is not None:
                where += " AND purpose = ?"
                values.append(purpose)
            return page(db, f"SELECT {_COLUMNS} FROM files", where, values, after, limit, desc, "files")

        rows = await self._store.run(select)
        return [_shown(row) for row in rows[:limit]], len(rows) > limit

    async def delete(self, owner: str, file_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            if not db.execute("DELETE FROM files WHERE owner = ? AND id = ?", (owner, file_id)).rowcount:
                return False
            self.path(file_id).unlink(missing_ok=True)
            return True

        return await self._store.run(remove)

    def path(self, file_id: str) -> Path:
        """Where the content of a file lies that `get` has found: the id is one of ours."""
        return self.folder / file_id

    async def _expire(self) -> None:
        """Deletes what is past its time; looked after once a minute, when somebody asks for files."""
        now = self._clock()
        if now < self._sweep_at:
            return
        self._sweep_at = now + 60

        def remove(db: sqlite3.Connection) -> None:
            for (file_id,) in db.execute("DELETE FROM files WHERE expires_at <= ? RETURNING id", (now,)).fetchall():
                self.path(file_id).unlink(missing_ok=True)

        await self._store.run(remove)


class Draft:
    """A file that is being written. Not for the event loop's thread when much is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: IO[bytes] | None = os.fdopen(handle, "wb")
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises DiskTrouble."""
        assert self._file is not None
        with disk_trouble():
            self._file.write(data)
        self.size += len(data)

    def move(self, target: Path) -> None:
        assert self._file is not None
        with disk_trouble():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._close()
            self._path.rename(target)

    def drop(self) -> None:
        """Forgets it; nothing happens when it was kept, or dropped before."""
        try:
            self._close()
        except OSError:
            self._file = None
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def page(
    db: sqlite3.Connection,
    select: str,
    where: str,
    values: list[Any],
    after: str | None,
    limit: int,
    desc: bool,
    table: str,
) -> list[Any]:
    """Rows by (created_at, id) after the one with the id `after`, one more than `limit` when there are more."""
    values = list(values)
    if after is not None:
        # Only an id that these conditions let through: what others have is not told.
        at = db.execute(f"SELECT created_at FROM {table} WHERE {where} AND id = ?", (*values, after)).fetchone()
        if at is None:
            raise BadRequest("after", after, "the id of the last object of the page before")
        where += f" AND (created_at, id) {'<' if desc else '>'} (?, ?)"
        values += [at[0], after]
    order = "DESC" if desc else "ASC"
    query = f"{select} WHERE {where} ORDER BY created_at {order}, id {order} LIMIT ?"
    return db.execute(query, (*values, limit + 1)).fetchall()


def expiry(anchor: str | None, seconds: str | int | None) -> int | None:
    """Seconds of an `expires_after`. Raises BadRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest("expires_after.anchor", anchor, "created_at")
    try:
        found = int(str(seconds))
    except ValueError:
        found = 0
    if not 3600 <= found <= 30 * _DAY_S:
        raise BadRequest("expires_after.seconds", seconds, f"an integer from 3600 to {30 * _DAY_S}")
    return found


def _shown(row: tuple[Any, ...]) -> FileObject:
    file_id, purpose, filename, size, created_at, expires_at = row
    return FileObject(
        id=file_id,
        purpose=purpose,
        filename=filename,
        bytes=size,
        created_at=int(created_at),
        expires_at=None if expires_at is None else int(expires_at),
    )


def _label(filename: str) -> str:
    """A client's file name, for showing: its last part, and nothing that a terminal or a header would act on."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char if char.isprintable() else "_" for char in last)[:MAX_FILENAME] or "file"
