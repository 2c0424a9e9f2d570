"""Recorded traffic: when requests came, how long they were, and which prefixes they shared.

Rows begin at second 0 and are in order of time. A trace of arrivals alone takes its lengths from `sharegpt-lengths`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from millstream.bench import data
from millstream.core.errors import BadFile, UnknownName

# Tokens that one entry of `blocks` stands for.
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Two rows share their first k blocks of BLOCK_TOKENS tokens when their first k `blocks` are equal."""

    at_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()


def load(name: str) -> list[Row]:
    """A trace by its name. Raises UnknownName, BadFile and DownloadError."""
    if name not in TRACES:
        raise UnknownName("trace", name, TRACES)
    source, read = TRACES[name]
    return _from_zero(read(data.find(source)))


def load_file(path: Path) -> list[Row]:
    """A trace in Mooncake's form: JSON lines of timestamp (ms), input_length, output_length and hash_ids (optional)."""
    return _from_zero(_mooncake(path))


def _from_zero(rows: Iterator[Row]) -> list[Row]:
    found = sorted(rows, key=lambda row: row.at_s)
    return [replace(row, at_s=row.at_s - found[0].at_s) for row in found]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty."""
    return ((number, line) for number, line in enumerate(data.read(path).splitlines(), start=1) if line.strip())


def _azure(path: Path) -> Iterator[Row]:
    for number, row in enumerate(csv.DictReader(io.StringIO(data.read(path))), start=2):
        try:
            # Seven digits of a second are written; datetime takes six.
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC).timestamp()
            yield Row(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {error}") from error


def _mooncake(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            yield Row(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


def _arrivals(path: Path) -> Iterator[Row]:
    lengths = itertools.cycle(data.lengths("sharegpt-lengths"))
    for number, line in _lines(path):
        try:
            at = float(line)
        except ValueError as error:
            raise BadFile(path, f"line {number}: {error}") from error
        yield Row(at, *next(lengths))


# Name -> (data set, how its file is read).
TRACES: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "azure-conv": ("azure-conv", _azure),
    "azure-code": ("azure-code", _azure),
    "mooncake": ("mooncake-conversation", _mooncake),
    "mooncake-synthetic": ("mooncake-synthetic", _mooncake),
    "mooncake-toolagent": ("mooncake-toolagent", _mooncake),
    "burstgpt": ("burstgpt", _arrivals),
}
