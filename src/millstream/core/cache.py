"""Cache groups: the kinds of per-sequence state that a model keeps, and how long each is kept."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
