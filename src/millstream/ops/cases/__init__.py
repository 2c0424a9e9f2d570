"""Case tables: for each op the shapes, dtypes and edges that matter, and how far a result may be from exact.

The same table drives the tests (every implementation against an independent float64 formula and the reference), and is
there for benchmarks and gradient checks. A new file here is found by itself. No tolerance lives anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from millstream.ops.table import Op


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `make` builds its arguments from a seeded generator; tolerances are against the float64 formula."""

    name: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    atol: float
    rtol: float = 0.0

    def args(self) -> tuple[Any, ...]:
        """The arguments, the same ones each time and new memory each time."""
        return self.make(torch.Generator().manual_seed(20240917))


def returned(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The outcome of an op that returns its result."""
    result = function(*args)
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True, slots=True)
class Table:
    """The cases of one op. `exact` is an independent formula in float64 for `outcome` (every tensor to compare)."""

    op: Op[..., Any]
    cases: tuple[Case, ...]
    exact: Callable[..., tuple[torch.Tensor, ...]]
    outcome: Callable[[Callable[..., Any], tuple[Any, ...]], tuple[torch.Tensor, ...]] = returned


def tables() -> dict[str, Table]:
    """Every table of this folder, by op name."""
    found: dict[str, Table] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found.update({table.op.name: table for table in getattr(module, "TABLES", ())})
    return found


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Callable[..., torch.Tensor]:
    """A maker of normal numbers of this shape."""

    def make(generator: torch.Generator) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return make


def call(*makers: Any) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Arguments made in order; what is not callable stands for itself."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        return tuple(m(generator) if callable(m) else m for m in makers)

    return make
