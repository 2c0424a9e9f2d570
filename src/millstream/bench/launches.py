"""How many things a computation asks of the machine one by one: ops of torch, and calls of native code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from millstream.ops.cpu import build

# They give memory, or are views that do not say so, and compute nothing.
_NOTHING = frozenset(
    {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view"}
)
# What a kernel's library answers about itself.
_ASIDE = ("_abi", "_scratch")


@dataclass(slots=True)
class Launches:
    """`ops` that compute or copy (views and fresh memory do not count), `native` calls."""

    ops: int = 0
    native: int = 0

    @property
    def total(self) -> int:
        return self.ops + self.native


def launches(run: Callable[[], object]) -> Launches:
    """Counts what `run` launches in this thread. The ops that one op of torch is made of are counted in its place."""
    found = Launches()
    library = build.library
    build.library = lambda name: _Watched(library(name), found)  # type: ignore[assignment, return-value]
    try:
        with _Counting(found):
            run()
    finally:
        build.library = library
    return found


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Launches) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Without autograd nobody has taken a compound op apart by now.
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        aliases = [given.alias_info for given in func._schema.returns if given.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        self.found.ops += not is_view and func._schema.name not in _NOTHING
        return func(*args, **kwargs)


class _Watched:
    """A library whose calls are counted."""

    def __init__(self, library: Any, found: Launches) -> None:
        self._library, self._found = library, found

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if any(word in name for word in _ASIDE):
            return function

        def call(*args: Any) -> Any:
            self._found.native += 1
            return function(*args)

        return call
