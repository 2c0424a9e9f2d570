"""The op table: one plain torch function that says what an op means, and faster ones that must agree with it.

`@op` on the reference makes an `Op`. `@x.implement("cpu", accepts=...)` adds an implementation; `accepts` looks at an
`Ask` and returns None or a `Refusal`. The first accepting one in `PREFERENCE` order is chosen, once per distinct Ask:
`op.resolve(ask)` hands out the bound function, and a hot loop keeps it. `op.explain(ask)` says why.

This file imports no torch: dtypes and devices are compared, never made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from millstream.core.errors import ConfigError, UnknownName

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "ref"
PREFERENCE = ("triton", "cpu", REFERENCE)

Use = Literal["auto", "ref"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an implementation does not take what was asked."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Ask:
    """The class of calls that one choice answers.

    `device` is a device type ("cpu", "cuda"), `dtype` and `width` (the last dimension) are those of the first tensor
    argument; `detail` is what an op adds for its own `accepts`, as (name, value) pairs.
    """

    device: str
    dtype: Hashable
    width: int = 0
    detail: tuple[tuple[str, Hashable], ...] = ()

    def get(self, name: str, default: Hashable = None) -> Hashable:
        """The value of one detail."""
        return dict(self.detail).get(name, default)


Accepts = Callable[[Ask], Refusal | None]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op. `accepts` runs when an Ask is first resolved, and may compile then."""

    name: str
    function: Callable[..., Any]
    accepts: Accepts


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was chosen for one Ask, and why each of the others was not: (name, reason)."""

    op: str
    chosen: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refused)
        return f"{self.op}: {self.chosen}" + (f" ({why})" if why else "")


_ops: dict[str, Op[..., Any]] = {}
_use: Use = "auto"


class Op(Generic[P, R]):
    """A named function with a reference and any number of implementations. Calling it dispatches on its arguments."""

    def __init__(self, reference: Callable[P, R], name: str) -> None:
        self.name = name
        self.reference = reference
        self.implementations: dict[str, Implementation] = {
            REFERENCE: Implementation(REFERENCE, reference, lambda ask: None)
        }
        self._resolved: dict[tuple[Use, Ask], Callable[P, R]] = {}
        functools.update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if len(self.implementations) == 1 or _use == REFERENCE:
            return self.reference(*args, **kwargs)
        return self.resolve(self.ask(*args, **kwargs))(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.implementations)})"

    def ask(self, *args: Any, **kwargs: Any) -> Ask:
        """The Ask of a call: read off its first tensor."""
        for value in (*args, *kwargs.values()):
            if hasattr(value, "dtype") and hasattr(value, "device"):
                return Ask(value.device.type, value.dtype, value.shape[-1] if value.ndim else 1)
        return Ask("cpu", None)

    def implement(self, name: str, accepts: Accepts) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Registers an implementation under one of the names in PREFERENCE. Raises ConfigError on a second one."""
        if name not in PREFERENCE:
            raise UnknownName("op implementation", name, PREFERENCE)
        if name in self.implementations:
            raise ConfigError(f"op {self.name!r} already has an implementation {name!r}")

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.implementations[name] = Implementation(name, function, accepts)
            self._resolved.clear()
            return function

        return register

    def resolve(self, ask: Ask) -> Callable[P, R]:
        """The function for every call of this Ask. Chosen once; keep it where calls are many."""
        key = (_use, ask)
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = self.implementations[self.explain(ask).chosen].function
        return found

    def explain(self, ask: Ask) -> Explanation:
        """The choice for an Ask with the reasons of those passed over."""
        refused: list[tuple[str, str]] = []
        for name in PREFERENCE:
            implementation = self.implementations.get(name)
            if implementation is None:
                continue
            if _use == REFERENCE and name != REFERENCE:
                refused.append((name, "the reference was asked for"))
                continue
            refusal = implementation.accepts(ask)
            if refusal is None:
                return Explanation(self.name, name, tuple(refused))
            refused.append((name, refusal.reason))
        raise AssertionError("the reference accepts everything")

    def forget(self) -> None:
        """Choose anew from here on (a compiler appeared, a kernel directory changed)."""
        self._resolved.clear()


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Makes an Op of its torch reference. The function's name is the op's. Raises ConfigError on a name taken."""
    name = reference.__name__
    if name in _ops:
        raise ConfigError(f"there already is an op {name!r}")
    made = Op(reference, name)
    _ops[name] = made
    return made


def ops() -> Mapping[str, Op[..., Any]]:
    """Every op imported so far, by name."""
    return dict(_ops)


def get(name: str) -> Op[..., Any]:
    """The op of that name. Raises UnknownName."""
    try:
        return _ops[name]
    except KeyError:
        raise UnknownName("op", name, _ops) from None


class use:
    """Sets which implementations the whole process may choose: "auto" or "ref" only.

    Works at once; as a context it is undone on leaving. Functions already handed out by `resolve` stay what they are.
    """

    def __init__(self, implementation: Use) -> None:
        global _use
        if implementation not in ("auto", "ref"):
            raise UnknownName("op implementation", implementation, ("auto", "ref"))
        self._before = _use
        _use = implementation

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _use
        _use = self._before


def in_use() -> Use:
    """What `use` last set."""
    return _use
