"""The exception tree of Millstream.

    MillstreamError
    |- BadRequest          one request asks for something out of bounds (HTTP 400)
    |- UnknownName         a model, plug-in, option or command that does not exist
    |  `- UnknownModel
    |- ConfigError         a configuration value or a combination of values is wrong
    |- ModelError          a model cannot be loaded as it is
    |  |- BadFile          a file is damaged, lies about itself, or is missing a part
    |  `- Unsupported      the file is sound, but asks for something this build does not know
    |- DownloadError       a download could not be finished or does not have the expected content
    |- EngineClosed        the engine no longer takes requests
    |  `- EngineAway       it is being started again; ask once more in a few seconds
    `- RequestFault        a request failed inside the engine; the others went on

A message says what was asked, what exists and what is nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class MillstreamError(Exception):
    """Root of every error that this package raises on purpose."""


class BadRequest(MillstreamError):
    """A request value is out of bounds. `param` names the field as the caller spelled it."""

    def __init__(self, param: str, got: object, allowed: str) -> None:
        self.param, self.got, self.allowed = param, got, allowed
        super().__init__(f"{param}: got {_short(got)}, allowed is {allowed}")


class UnknownName(MillstreamError):
    """A name that is not among those that exist. `kind` is what was being named."""

    def __init__(self, kind: str, name: str, exist: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.exist = sorted(exist)
        self.nearest = nearest(name, self.exist)
        text = f"there is no {kind} {name!r}"
        if self.nearest:
            text += f"; the nearest is {self.nearest!r}"
        if self.exist:
            text += f"; there are: {', '.join(self.exist)}"
        if hint:
            text += f". {hint}"
        super().__init__(text)


class UnknownModel(UnknownName):
    """No model of that name, id or path."""

    def __init__(self, name: str, exist: Iterable[str], hint: str = "") -> None:
        super().__init__("model", name, exist, hint)


class ConfigError(MillstreamError):
    """A configuration value, or a combination of values, is wrong."""


class SettingError(ConfigError):
    """One setting is wrong, or there is none of that name. `setting` is its place in the tree, with dots, and `value`
    what it was given."""

    def __init__(self, setting: str, value: object, what: str) -> None:
        self.setting, self.value = setting, value
        super().__init__(what)


class ModelError(MillstreamError):
    """A model cannot be loaded as it is."""


class BadFile(ModelError):
    """A file is damaged, lies about itself, or misses a part."""

    def __init__(self, path: str | Path, what: str) -> None:
        self.path, self.what = str(path), what
        super().__init__(f"{path}: {what}")


class Unsupported(ModelError):
    """A sound file that asks for something this build does not know."""


class DownloadError(MillstreamError):
    """A download could not be finished, or its content is not what was expected."""


class EngineClosed(MillstreamError):
    """The engine no longer takes requests."""


class EngineAway(EngineClosed):
    """There is no engine now, and there will be one soon: ask again."""


class RequestFault(MillstreamError):
    """One request failed inside the engine; the others went on."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `name`, or None when nothing does."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


class Told(str):
    """Not a value but words about one: an error shows it without quotes and leaves it longer."""

    __slots__ = ()


def _short(value: object, limit: int = 80) -> str:
    text, limit = (str(value), 400) if isinstance(value, Told) else (repr(value), limit)
    return text if len(text) <= limit else text[: limit - 3] + "..."
