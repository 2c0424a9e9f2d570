"""The only reader of files and environment. It parses and merges, no more: rules across fields are in engine/check.py.

Precedence, the later wins: defaults, file, `--set a.b=c`, options given in code or by flags.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from millstream.config.schema import LogConfig
from millstream.core.errors import BadFile, ConfigError, SettingError, nearest
from millstream.core.logs import set_up_logs
from millstream.core.registry import Choice

T = TypeVar("T")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def home() -> Path:
    """Where models, converted weights, kernels and profiles are kept: $MILLSTREAM_HOME, else ~/.cache/millstream."""
    given = os.environ.get("MILLSTREAM_HOME")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "millstream"


def runtime_dir() -> Path | None:
    """Where sockets of this user's processes go: $XDG_RUNTIME_DIR when it can be written to, else None."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given) if given and os.access(given, os.W_OK) else None


def data_dir() -> Path | None:
    """Evaluation data: $MILLSTREAM_DATA when it is a folder, else the cache's own, else None."""
    given = os.environ.get("MILLSTREAM_DATA")
    for path in (Path(given) if given else None, home() / "data"):
        if path is not None and path.is_dir():
            return path
    return None


def given_api_keys() -> tuple[str, ...]:
    """The API keys of a server: $MILLSTREAM_API_KEY, several with commas between them."""
    return tuple(key.strip() for key in os.environ.get("MILLSTREAM_API_KEY", "").split(",") if key.strip())


def read_file(path: str | Path) -> dict[str, Any]:
    """A TOML, YAML or JSON file as a tree. Raises BadFile with the place of the error."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"cannot be read: {error}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            tree = yaml.safe_load(text) or {}
        elif path.suffix == ".json":
            tree = json.loads(text)
        else:
            tree = tomllib.loads(text)
    except Exception as error:
        raise BadFile(path, f"is not valid: {error}") from error
    if not isinstance(tree, dict):
        raise BadFile(path, "holds no table at its top")
    return tree


def parse_sets(pairs: Sequence[str]) -> dict[str, Any]:
    """`--set a.b=c` arguments as a tree; the value is JSON where it parses as JSON, else text."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r}: write it as key.sub=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        at = tree
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ConfigError(f"--set {pair!r}: {part!r} was already set to a value")
        at[last] = value
    return tree


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later trees win; tables merge, everything else is replaced."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
                out[key] = merge(out[key], value)
            else:
                out[key] = value
    return out


def build(kind: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """A config dataclass from a tree. Raises SettingError on unknown keys (with the nearest) and on wrong types."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            close = nearest(key, known)
            raise SettingError(
                path,
                value,
                f"there is no setting {path!r}"
                + (f"; the nearest is {(where + '.' if where else '') + close!r}" if close else "")
                + f"; there are: {', '.join(known)}",
            )
        values[key] = _value(hints[key], value, path)
    return kind(**values)


@contextmanager
def blamed_on(path: str | Path | None) -> Iterator[None]:
    """An error of a setting that stands in this file tells the file and the line: ConfigError for SettingError."""
    try:
        yield
    except SettingError as error:
        line = None if path is None else line_of(Path(path), error.setting, error.value)
        raise ConfigError(f"{path}, line {line}: {error}" if line else str(error)) from None


def line_of(path: Path, setting: str, value: object) -> int | None:
    """Where a file gives a setting this value, from 1; None where it does not. `[engine.sched]` may be just `[sched]`.

    Of a setting in a list of tables the place is part of the name: `tenants[1].rate`.
    """
    try:
        text, tree = path.read_text(encoding="utf-8"), read_file(path)
        lines = _toml_lines(text) if path.suffix not in (".yaml", ".yml", ".json") else _yaml_lines(text)
    except (BadFile, OSError):  # it is not there any more, or has changed
        return None
    for name in (setting, setting.partition(".")[2]):
        given = _given(tree, name)
        if name in lines and (given == value or (isinstance(given, list) and value in given)):
            return lines[name]
    return None


def _given(tree: Any, setting: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", setting):
        try:
            tree = tree[int(part) if isinstance(tree, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return tree


_HEAD = re.compile(r"\s*(\[{1,2})\s*([\w.\-\"' ]+?)\s*\]")
_KEY = re.compile(r"\s*([\w.\-\"' ]+?)\s*=")


def _toml_lines(text: str) -> dict[str, int]:
    table, counts, lines = "", dict[str, int](), dict[str, int]()
    for number, line in enumerate(text.splitlines(), start=1):
        if head := _HEAD.match(line):
            table = _plain(head[2])
            if head[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}[{counts[table]}]"
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault(f"{table}.{_plain(key[1])}".lstrip("."), number)
            # Tables inline: their settings stand on this line too.
            for inner in re.findall(r"[{,]\s*([\w\-]+)\s*=", line):
                lines.setdefault(f"{table}.{_plain(key[1])}.{inner}".lstrip("."), number)
    return lines


def _plain(name: str) -> str:
    return re.sub(r"[\s\"']", "", name)


def _yaml_lines(text: str) -> dict[str, int]:
    """Of YAML, and of JSON, which is some."""
    import yaml

    lines: dict[str, int] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                own = f"{name}.{key.value}".lstrip(".")
                lines[own] = key.start_mark.line + 1
                walk(value, own)
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                walk(value, f"{name}[{place}]")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines


def log_by(tree: Mapping[str, Any]) -> None:
    """Logs as the table `log` of a tree says. Raises ConfigError."""
    config = build(LogConfig, tree.get("log", {}), "log")
    set_up_logs(config.format, config.level)


def tree_of(config: Any) -> Any:
    """A config dataclass as plain values, as `--print-config` shows it."""
    if isinstance(config, Choice):
        return {"name": config.name, **config.options} if config.options else config.name
    if dataclasses.is_dataclass(config):
        return {f.name: tree_of(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [tree_of(item) for item in config]
    if isinstance(config, Mapping):
        return {name: tree_of(value) for name, value in config.items()}
    return config


def parse_bytes(value: int | str, where: str) -> int:
    """ "4GiB", "512MB" or a number of bytes. Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value <= 0:
            raise ConfigError(f"{where}: got {value}, allowed is a positive number of bytes")
        return value
    text = str(value).strip().lower().replace(" ", "")
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    try:
        count = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{where}: got {value!r}, allowed is a size such as 4GiB, 512MB or 1000000") from None
    if count <= 0:
        raise ConfigError(f"{where}: got {value!r}, allowed is a positive size")
    return count


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and hint is not Choice and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, path)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    # A word that stands for itself comes before what any text could name.
    for option in sorted(options, key=lambda one: str(typing.get_origin(one)) != str(typing.Literal)):
        if option is Choice:
            if isinstance(value, Choice):
                return value
            if isinstance(value, str):
                return Choice(value)
            if isinstance(value, Mapping) and isinstance(value.get("name"), str):
                return Choice(value["name"], {k: v for k, v in value.items() if k != "name"})
        elif typing.get_origin(option) is Mapping:
            if isinstance(value, Mapping):
                inside = typing.get_args(option)[1]
                return {str(name): _value(inside, item, f"{path}.{name}") for name, item in value.items()}
        elif typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            if isinstance(value, list | tuple):
                tables = dataclasses.is_dataclass(inner) and inner is not Choice
                return tuple(
                    _value(inner, item, f"{path}[{place}]" if tables else path) for place, item in enumerate(value)
                )
            number = isinstance(value, int | float | bool | None)
            if value != "auto" and (not number or (inner in (int, float) and not isinstance(value, bool | None))):
                return (_value(inner, value, path),)
        elif typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is type(None):
            if value is None:
                return None
        elif (option is float and isinstance(value, int | float) and not isinstance(value, bool)) or (
            isinstance(value, option) and not (option is int and isinstance(value, bool))
        ):
            return value
    raise SettingError(path, value, f"{path}: got {value!r}, allowed is {_spell(options)}")


def _spell(options: Sequence[Any]) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            names += [repr(value) for value in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            names.append("a list of plug-in names" if inner is Choice else f"a list, each {_spell([inner])}")
        elif option is Choice:
            names.append("a plug-in name, or a table with its name and options")
        elif dataclasses.is_dataclass(option) or typing.get_origin(option) is Mapping:
            names.append("a table")
        else:
            names.append(
                {int: "an integer", str: "text", float: "a number", type(None): "null"}.get(option, str(option))
            )
    return " or ".join(names)
