"""What has been measured: the latest run record of each experiment, and the state of each paper that follows from it.

Records are `reproduce/records/NAME.json`, committed. A record holds the sha256 of every file that made it; when one
no longer matches, the paper is stale, never works. A quick record never makes a paper work.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

import millstream
from millstream.core.errors import BadFile, ConfigError
from millstream.reproduce.machine import Machine, without_private
from millstream.reproduce.papers import PAPERS, Paper

SCHEMA = 1
MIN_REPEATS = 5
MIN_QUICK_REPEATS = 3

SOURCE_ROOT = Path(millstream.__file__).resolve().parent.parent
"""The folder that holds the package: names of files in records are relative to it."""

RECORDS = Path(__file__).resolve().parent / "records"

Verdict = Literal["works", "partly", "failed", "void"]
State = Literal["works", "partly", "not yet", "stale", "failed"]
Outcome = Literal["passed", "failed", "out of reach", "elsewhere"]


@dataclass(frozen=True, slots=True)
class Spread:
    """All values of one number over the repeats, with median, quartiles and range."""

    values: tuple[float, ...]
    median: float
    q1: float
    q3: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """An arm and its metrics by name."""

    name: str
    description: str
    metrics: dict[str, Spread]


@dataclass(frozen=True, slots=True)
class MetricRecord:
    name: str
    unit: str
    better: str
    description: str


@dataclass(frozen=True, slots=True)
class SideRecord:
    """A metric of an arm."""

    arm: str
    metric: str


@dataclass(frozen=True, slots=True)
class FigureRecord:
    """A number that the paper claims, low..high, and ours: the ratio of medians and the ratios repeat by repeat."""

    text: str
    of: SideRecord
    over: SideRecord | None
    low: float
    high: float | None
    ours: float | None
    repeats: Spread | None


@dataclass(frozen=True, slots=True)
class RequiredRecord:
    """A required row with what was measured. `value` None: it was not measured."""

    text: str
    of: SideRecord
    over: SideRecord | None
    at_least: float | None
    at_most: float | None
    how: str
    value: float | None
    repeats: Spread | None
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class CheckRecord:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Record:
    """One run of an experiment. `date` is UTC; `files` and `inputs` hold sha256 by name; `hash` covers `files`.

    `order` lists the arms of each repeat in the order they ran. `commit` is that of the source tree ("" outside of
    one) and `dirty` whether tracked files differed from it.
    """

    schema: int
    name: str
    paper: int | None
    title: str
    date: str
    quick: bool
    verdict: Verdict
    why: tuple[str, ...]
    claim: str
    figures: tuple[FigureRecord, ...]
    required: tuple[RequiredRecord, ...]
    checks: tuple[CheckRecord, ...]
    metrics: tuple[MetricRecord, ...]
    arms: tuple[ArmRecord, ...]
    order: tuple[tuple[str, ...], ...]
    warmup: int
    seconds: float
    warnings: tuple[str, ...]
    inputs: dict[str, str]
    files: dict[str, str]
    hash: str
    commit: str
    dirty: bool
    machine: Machine


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a paper stands. `measured` is the day of its latest record (ISO), None when there is none."""

    paper: Paper
    state: State
    measured: str | None
    reason: str
    record: Record | None


def encode(record: Record) -> bytes:
    """The record as indented JSON without anything that names this machine's host, user or folders."""
    plain = without_private(msgspec.to_builtins(record))
    return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write(record: Record, path: Path) -> None:
    """Writes `path` in one step: a reader sees the old record or the new one. Raises ConfigError when it cannot."""
    data = encode(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner reads; a record is for everybody.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"the record cannot be written to {path}: {error.strerror or error}") from error


def read(path: Path) -> Record:
    """A record from its file. Raises BadFile when it is damaged or of another schema."""
    try:
        plain: Any = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise BadFile(path, f"not a run record: {error}") from error
    schema = plain.get("schema") if isinstance(plain, Mapping) else None
    if schema != SCHEMA:
        raise BadFile(path, f"run record of schema {schema!r}; this version reads {SCHEMA}")
    try:
        return msgspec.convert(plain, Record)
    except msgspec.ValidationError as error:
        raise BadFile(path, f"not a run record: {error}") from error


def latest(name: str, folder: Path = RECORDS) -> Record | None:
    """The committed record of an experiment, None when there is none. Raises BadFile."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    record = read(path)
    if record.name != name:
        raise BadFile(path, f"the record is of {record.name!r}")
    return record


def hash_files(paths: Iterable[Path], root: Path = SOURCE_ROOT) -> dict[str, str]:
    """sha256 of each file by its name relative to `root`, or to the import path for code installed elsewhere."""
    return {
        key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in sorted((_key(p, root), p) for p in paths)
    }


def combined(hashes: Mapping[str, str]) -> str:
    """One sha256 over names and hashes."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def changed(record: Record, root: Path = SOURCE_ROOT) -> tuple[str, ...]:
    """The names of the record's files that are gone or differ now, sorted. A record without files counts as changed."""
    if not record.files or combined(record.files) != record.hash:
        return ("the record's own list of files",)
    return tuple(name for name, digest in sorted(record.files.items()) if _hash_now(name, root) != digest)


def standing(paper: Paper, folder: Path = RECORDS, root: Path = SOURCE_ROOT) -> Standing:
    """The state of one paper, from its latest record."""
    try:
        record = latest(paper.name, folder)
    except BadFile as error:
        return Standing(paper, "failed", None, error.what, None)
    if record is None:
        return Standing(paper, "not yet", None, "no record", None)
    day = record.date[:10]
    moved = changed(record, root)
    if moved:
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        return Standing(paper, "stale", day, f"changed since it was measured: {moved[0]}{more}", record)
    why = "; ".join(record.why)
    if record.verdict in ("failed", "void"):
        return Standing(paper, "failed", day, why or record.verdict, record)
    if record.quick:
        return Standing(paper, "not yet", day, "only a quick run is recorded", record)
    if record.verdict == "works" and not supports_works(record):
        return Standing(paper, "failed", day, "the record says works, but its own rows do not", record)
    return Standing(paper, "works" if record.verdict == "works" else "partly", day, why, record)


def supports_works(record: Record) -> bool:
    """Whether a record's rows bear out the verdict 'works': a word alone does not make one."""
    return (
        not record.quick
        and len(record.order) >= MIN_REPEATS
        and bool(record.checks)
        and all(check.passed for check in record.checks)
        and any(row.outcome == "passed" for row in record.required)
        and all(row.outcome in ("passed", "elsewhere") for row in record.required)
    )


def standings(folder: Path = RECORDS, root: Path = SOURCE_ROOT) -> tuple[Standing, ...]:
    """The state of all papers, by number."""
    return tuple(standing(paper, folder, root) for paper in PAPERS)


def _key(path: Path, root: Path) -> str:
    path = path.resolve()
    homes = [root.resolve(), *(Path(entry).resolve() for entry in sys.path if entry)]
    for home in homes:
        if path.is_relative_to(home):
            return path.relative_to(home).as_posix()
    raise ConfigError(
        f"{path.name} lies outside of the package and of the import path; its hash could not be checked again"
    )


def _hash_now(name: str, root: Path) -> str | None:
    for home in (root, *(Path(entry) for entry in sys.path if entry)):
        path = home / name
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return None
