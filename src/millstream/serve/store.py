"""What outlives a process: one SQLite file in WAL mode, and one thread that alone reads and writes it.

A statement is a function of the connection, run as one transaction. The event loop never waits for a disk, two writers
never meet, and a process that is killed leaves what it had committed. A second process that opens the same folder is
refused: it would do the first one's work again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from millstream.core.errors import BadFile, ConfigError, MillstreamError

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class DiskTrouble(MillstreamError):
    """The disk took nothing now: full, read-only or failing. What was to be written is not; it can be tried again."""


@contextlib.contextmanager
def disk_trouble() -> Iterator[None]:
    """Turns what a disk may refuse into DiskTrouble."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # The text is SQLite's own; codes of errors are known from Python 3.11 on.
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            raise DiskTrouble(f"the store cannot be written: {error}") from error
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskTrouble(f"the disk takes nothing: {os.strerror(error.errno)}") from error
        raise


class Store:
    """A folder with `store.sqlite` in it. `schemas` are the tables of whoever keeps something here.

    Raises ConfigError when another process has the folder, BadFile when what lies there is no store.
    """

    def __init__(self, folder: Path, *schemas: str) -> None:
        self.folder = folder
        with disk_trouble():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked(folder / "lock")
        self._thread = ThreadPoolExecutor(1, "millstream-store")
        self._closed = False
        try:
            self._db = self._thread.submit(self._open, schemas).result()
        except BaseException:
            self._thread.shutdown()
            self._lock.close()
            raise

    async def run(self, statement: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `statement` as one transaction, after all that were asked before. Raises DiskTrouble, and its own."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, statement)

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Runs file work that belongs between two statements. Raises DiskTrouble, and its own."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._file_work, work)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.submit(self._db.close).result()
            self._thread.shutdown()
            self._lock.close()

    # -- on the store's own thread

    def _open(self, schemas: tuple[str, ...]) -> sqlite3.Connection:
        path = self.folder / "store.sqlite"
        db = sqlite3.connect(path, isolation_level=None)
        try:
            with disk_trouble():
                os.chmod(path, 0o600)
                db.execute("PRAGMA journal_mode = WAL")
                # A commit survives the end of this process. A power cut may take the last ones, never half of one.
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA foreign_keys = ON")
                for schema in schemas:
                    db.executescript(schema)
        except sqlite3.DatabaseError as error:
            db.close()
            raise BadFile(path, f"is no store of this version: {error}") from error
        return db

    def _transaction(self, statement: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        with disk_trouble():
            db.execute("BEGIN IMMEDIATE")
            try:
                found = statement(db)
                db.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled it back already.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        return found

    def _file_work(self, work: Callable[[], T]) -> T:
        with disk_trouble():
            return work()


def _locked(path: Path) -> IO[str]:
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise ConfigError(
            f"{path.parent} belongs to another server (process {holder or 'unknown'}); this one needs its own"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
