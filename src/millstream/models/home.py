"""Where models live on disk, what a file's checksum is, and who may write there now.

$MILLSTREAM_HOME            (~/.cache/millstream when not set)
  models/<name>/            named models, one folder each
  hub/<org>--<name>/        models taken from a hub
  converted/                converted weights
  partial/                  downloads under way; what is verified here is not downloaded again
  locks/                    one file a lock
  checksums.json            path, size, mtime, inode -> sha256
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from millstream.config.load import home

MAX_CHECKSUMS = 4096


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file's content, always read afresh. `progress` gets the bytes done so far. Raises OSError."""
    digest = hashlib.sha256()
    done = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def checksum(path: str | Path) -> str:
    """The sha256 of a file, remembered for as long as its path, size, mtime and inode stay the same. Raises OSError."""
    path = Path(path).resolve()
    stamp = _stamp(path)
    index = home() / "checksums.json"
    known = _read_index(index).get(str(path))
    if known and known[:-1] == stamp and re.fullmatch(r"[0-9a-f]{64}", str(known[-1])):
        return str(known[-1])
    digest = sha256_of(path)
    if _stamp(path) == stamp:
        remember(path, digest)
    return digest


def remember(path: Path, digest: str) -> None:
    """Notes the checksum of a file just read whole. An index that cannot be written costs time, never an answer."""
    path = path.resolve()
    index = home() / "checksums.json"
    with contextlib.suppress(OSError), locked("checksums"):
        entries = _read_index(index)
        entries.pop(str(path), None)
        entries[str(path)] = [*_stamp(path), digest]
        write_atomically(index, json.dumps(dict(list(entries.items())[-MAX_CHECKSUMS:])).encode())


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_index(index: Path) -> dict[str, list[Any]]:
    try:
        entries = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, list) and len(v) == 4}


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a small file in place whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock `name` against other processes and threads. `waiting` is called once when somebody else has it.

    The lock goes with the process, so a killed download leaves none behind. Raises OSError when home is not writable.
    """
    path = home() / "locks" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
