"""Records of which every step makes one for each of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[_T]) -> type[_T]:
    """`dataclass(frozen=True, slots=True)` whose fields only the type checker keeps from being set again.

    To make a frozen one takes three times as long: it sets each field by a call.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
