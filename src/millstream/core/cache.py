"""Cache groups: the kinds of per-sequence state that a model keeps, and how long each is kept."""

from __future__ import annotations

import enum
from dataclasses import dataclass

# How many levels of a tree of shared prefixes to read once for all that share them: as many as pay, and as many as
# there are whether it pays or not, which is for tests.
ALL_LEVELS = 1 << 20
EVERY_LEVEL = -1


class Keep(enum.Enum):
    """FULL keeps every token, WINDOW the last `window` ones, RECURRENT one state of fixed size."""

    FULL = "full"
    WINDOW = "window"
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that keep the same tokens and so share block ids. `window` counts the token itself."""

    name: str
    keep: Keep = Keep.FULL
    window: int | None = None
    num_layers: int = 1
    kv_heads: int = 1
    head_dim: int = 1
