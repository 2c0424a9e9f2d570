"""Keys and values as they are, in float32 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.errors import ConfigError
from millstream.core.registry import Card

# Bytes of one element, by dtype name.
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Config:
    """`dtype` of the stored elements: float32 or bfloat16."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        element_bytes(self.dtype)


def element_bytes(dtype: str) -> int:
    """Bytes of one stored element. Raises ConfigError on a dtype that plain pages cannot hold."""
    if dtype not in ELEMENT_BYTES:
        raise ConfigError(f"kv plain: dtype {dtype!r} cannot be stored; there are: {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[dtype]


CARD = Card(
    name="plain",
    summary="Keys and values as they are, float32 or bfloat16, in blocks that attention reads in place.",
    error="none in float32; bfloat16 keeps 8 significant bits",
)
