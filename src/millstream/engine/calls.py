"""Small things that may be asked of a running engine by name, beside requests. They run between two steps.

What a call takes and gives is plain: text, numbers, lists and tables of them, so that it can be asked over a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from millstream.core.errors import UnknownName
from millstream.engine.engine import Engine


def reset_prefix_cache(engine: Engine) -> dict[str, int]:
    """Forgets every prefix that no running request holds. Gives how many blocks that freed, and how many are free."""
    ledger = engine.scheduler.ledger
    before = ledger.stats()["idle_blocks"]
    ledger.index.clear()
    return {"freed_blocks": before - ledger.stats()["idle_blocks"], "free_blocks": ledger.free()}


def stats(engine: Engine) -> dict[str, Any]:
    """How the engine stands, and all its counters since the start."""
    load = engine.load()
    return {
        "waiting": load.waiting,
        "running": load.running,
        "free_blocks": load.free_blocks,
        "total_blocks": load.total_blocks,
        "max_running": engine.max_running,
        **load.counters,
    }


CALLS: Mapping[str, Callable[..., Any]] = {"reset_prefix_cache": reset_prefix_cache, "stats": stats}


def find(name: str) -> Callable[..., Any]:
    """Raises UnknownName."""
    found = CALLS.get(name)
    if found is None:
        raise UnknownName("call", name, CALLS)
    return found
