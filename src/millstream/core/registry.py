"""Name -> plug-in. The folder is the registry: `sched/policies/vtc.py` is the policy `vtc`.

A plug-in module holds `PLUGIN` (the class or factory), `CARD` (what it says of itself) and, when it
has options, a frozen dataclass `Config`; `make` then calls `PLUGIN(Config(**options))`, else `PLUGIN()`.
A plug-in with two halves is a folder: `__init__.py` holds `CARD` and `Config` only, `host.py` the
half that needs no torch, `device.py` the other. Names use dashes, files underscores.

Third parties register through entry points, group `millstream.<point>`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from millstream.core.errors import ConfigError, UnknownName, nearest

POINTS: Mapping[str, str] = {
    "policy": "millstream.sched.policies",
    "meter": "millstream.sched.meters",
    "step-cost": "millstream.sched.predictors",
    "router": "millstream.cluster.routers",
    "autoscaler": "millstream.cluster.autoscale",
    "length": "millstream.sched.lengths",
    "prefix": "millstream.memory.prefix",
    "evict": "millstream.memory.evict",
    "tier": "millstream.memory.tiers",
    "kv": "millstream.formats.kv",
    "weights": "millstream.formats.weights",
    "family": "millstream.models.families",
    "decode": "millstream.decode.methods",
    "logits": "millstream.decode.logits",
    "observer": "millstream.decode.observers",
    "attention": "millstream.ops.attention",
    "tools": "millstream.text.tools.formats",
    "experiment": "millstream.reproduce",
}


@dataclass(frozen=True, slots=True)
class Card:
    """What a plug-in says of itself. Docs, cross-field checks and tests read it.

    `paper` is the number of its entry in the list of techniques (None: not from one of them).
    `lossless` means that tokens equal those of the plain engine; otherwise `error` states the bound.
    `needs` and `conflicts` name other choices as "point:name".
    """

    name: str
    summary: str
    paper: int | None = None
    lossless: bool = True
    error: str = ""
    needs: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """A plug-in picked by name, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


def points() -> tuple[str, ...]:
    """The extension points that plug-ins can register at."""
    return tuple(POINTS)


def names(point: str) -> list[str]:
    """Every plug-in name at `point`, built-in and third-party, sorted."""
    package = importlib.import_module(_package(point))
    found = {
        info.name.replace("_", "-")
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_") and info.name not in NOT_PLUGINS
    }
    return sorted(found | set(_entry_points(point)))


_found: set[str] = set()

# Mechanism files that live beside plug-ins.
NOT_PLUGINS = frozenset({"protocol", "harness", "ledger", "papers", "plot", "docs", "data", "machine", "commands"})


def module(point: str, name: str) -> ModuleType:
    """The module of a plug-in: its file, or the folder's `__init__`. Raises UnknownName."""
    entry = _entry_points(point).get(name)
    if entry is not None:
        return importlib.import_module(entry.module)
    path = f"{_package(point)}.{name.replace('-', '_')}"
    # Listing a folder takes longer than all else that a request needs of its plug-ins: what was found once is there.
    if path in _found and path in sys.modules:
        return sys.modules[path]
    # The dot check keeps `name` from reaching outside of its folder.
    if "." in name or not name or name not in names(point):
        raise UnknownName(point, name, names(point))
    found = importlib.import_module(path)
    # Not before it is whole: on another thread somebody may ask for it too.
    _found.add(path)
    return found


def card(point: str, name: str) -> Card:
    found: Card = module(point, name).CARD
    return found


def get(point: str, name: str) -> Any:
    """The host half of a plug-in (its only half, when it is a single file)."""
    return _half(point, name, "host")


def get_device(point: str, name: str) -> Any:
    """The device half of a plug-in (its only half, when it is a single file)."""
    return _half(point, name, "device")


def has(point: str, name: str, half: str) -> bool:
    """Whether a plug-in in two halves has that one: "host" or "device". One of a single file has neither."""
    found = module(point, name)
    if hasattr(found, "PLUGIN"):
        return False
    path = f"{found.__name__}.{half}"
    return path in sys.modules or importlib.util.find_spec(path) is not None


def make(point: str, choice: Choice | str, device: bool = False, **given: Any) -> Any:
    """Builds a plug-in with its options. `given` are objects that the caller hands to every plug-in of the point."""
    if isinstance(choice, str):
        choice = Choice(choice)
    plugin = (get_device if device else get)(point, choice.name)
    config = options(point, choice)
    return plugin(**given) if config is None else plugin(config, **given)


def options(point: str, choice: Choice) -> Any:
    """The plug-in's Config filled from a choice; None when it has no Config. Raises ConfigError on unknown options."""
    config_class = getattr(module(point, choice.name), "Config", None)
    if config_class is None:
        if choice.options:
            raise ConfigError(f"{point} {choice.name!r} takes no options, got {', '.join(choice.options)}")
        return None
    known = [f.name for f in dataclasses.fields(config_class)]
    for key in choice.options:
        if key not in known:
            close = nearest(key, known)
            raise ConfigError(
                f"{point} {choice.name!r} has no option {key!r}"
                + (f"; the nearest is {close!r}" if close else "")
                + f"; it has: {', '.join(known) or 'none'}"
            )
    try:
        return config_class(**choice.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{point} {choice.name!r}: {error}") from error


def _half(point: str, name: str, half: str) -> Any:
    found = module(point, name)
    if hasattr(found, "PLUGIN"):
        return found.PLUGIN
    if not has(point, name, half):
        raise ConfigError(f"{point} {name!r} has no {half} half")
    return importlib.import_module(f"{found.__name__}.{half}").PLUGIN


def _package(point: str) -> str:
    try:
        return POINTS[point]
    except KeyError:
        raise UnknownName("extension point", point, POINTS) from None


def _entry_points(point: str) -> Mapping[str, importlib.metadata.EntryPoint]:
    return _installed(tuple(sys.path)).get(f"millstream.{point}", {})


@functools.cache
def _installed(path: tuple[str, ...]) -> Mapping[str, Mapping[str, importlib.metadata.EntryPoint]]:
    """Ours of all entry points on `path`, by group. Reading them opens a file of every package there is: once, then."""
    found: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for package in importlib.metadata.distributions():
        for entry in package.entry_points:
            if entry.group.startswith("millstream."):
                # A package found twice counts where Python would import it from: the first on the path.
                found.setdefault(entry.group, {}).setdefault(entry.name, entry)
    return found
