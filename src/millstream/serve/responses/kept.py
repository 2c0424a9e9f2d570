"""Responses that are kept: to be fetched again, and to be gone on from. Each belongs to the key that made it.

They are few and not for ever: beyond a number or a number of bytes, of one key or of all, those that were not looked at
for longest go first.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from millstream.serve.responses.shapes import Item
from millstream.serve.store import DiskTrouble, Store

SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, used_at REAL NOT NULL, bytes INTEGER NOT NULL, status TEXT NOT NULL,
    object BLOB NOT NULL, items BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS responses_by_owner ON responses (owner, used_at, bytes);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used_at, bytes);
"""

_UNDER_WAY = ("queued", "in_progress")


@dataclass(frozen=True, slots=True)
class KeptLimits:
    """How many responses are kept, and bytes of them: of one key, and of all keys together."""

    owner_count: int = 10_000
    owner_bytes: int = 256 << 20
    count: int = 100_000
    bytes: int = 2 << 30


class Responses:
    """All kept responses of a store. `clock` gives wall-clock seconds."""

    def __init__(self, store: Store, limits: KeptLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self._store, self.limits, self._clock = store, limits or KeptLimits(), clock

    async def start(self) -> None:
        """What was under way when a process ended will never be done."""

        def fail(db: sqlite3.Connection) -> None:
            marks = ", ".join("?" * len(_UNDER_WAY))
            query = f"SELECT id, object FROM responses WHERE status IN ({marks})"
            for response_id, data in db.execute(query, _UNDER_WAY).fetchall():
                response = msgspec.json.decode(data)
                error = {"code": "server_error", "message": "the server was restarted before this was done"}
                response |= {"status": "failed", "error": error}
                values = ("failed", msgspec.json.encode(response), response_id)
                db.execute("UPDATE responses SET status = ?, object = ? WHERE id = ?", values)

        await self._store.run(fail)

    async def put(self, owner: str, response: dict[str, Any], items: list[Item]) -> None:
        """Keeps a response and the items that it answered, its whole conversation so far. Raises DiskTrouble."""
        data, told = msgspec.json.encode(response), msgspec.json.encode(items)
        size = len(data) + len(told)

        def insert(db: sqlite3.Connection) -> None:
            row = (response["id"], owner, self._clock(), size, response["status"], data, told)
            db.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            limits = self.limits
            _trim(db, "WHERE owner = ?", (owner,), limits.owner_count, limits.owner_bytes)
            _trim(db, "", (), limits.count, limits.bytes)

        await self._store.run(insert)

    async def get(self, owner: str, response_id: str) -> tuple[dict[str, Any], list[Item]] | None:
        """A response and its items; None when there is none, or it is another's."""

        query, used = (
            "SELECT object, items FROM responses WHERE owner = ? AND id = ?",
            "UPDATE responses SET used_at = ? WHERE id = ?",
        )
        row = await self._store.run(lambda db: db.execute(query, (owner, response_id)).fetchone())
        if row is None:
            return None
        # A disk that takes nothing now can still be read.
        with contextlib.suppress(DiskTrouble):
            await self._store.run(lambda db: db.execute(used, (self._clock(), response_id)))
        return msgspec.json.decode(row[0]), msgspec.json.decode(row[1])

    async def delete(self, owner: str, response_id: str) -> bool:
        query = "DELETE FROM responses WHERE owner = ? AND id = ?"
        return await self._store.run(lambda db: db.execute(query, (owner, response_id)).rowcount > 0)


def _trim(db: sqlite3.Connection, where: str, values: tuple[str, ...], most: int, most_bytes: int) -> None:
    """Drops those that were used longest ago until the rest fits."""
    query = f"SELECT count(*), coalesce(sum(bytes), 0) FROM responses {where}"
    count, total = db.execute(query, values).fetchone()
    if count <= most and total <= most_bytes:
        return
    rows = db.execute(f"SELECT id, bytes FROM responses {where} ORDER BY used_at, id", values).fetchall()
    for response_id, size in rows:
        if count <= most and total <= most_bytes:
            return
        db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        count, total = count - 1, total - size
