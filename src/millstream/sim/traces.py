"""Recorded traffic: when requests came, how long they were, and which prefixes they shared.

Rows begin at second 0 and are in order of time. A trace of arrivals alone takes its lengths from `sharegpt-lengths`.
"""

from __future__ import annotations

import ast
import bisect
import csv
import io
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from millstream.core.errors import BadFile, UnknownName
from millstream.sim import data

# Tokens that one entry of `blocks` stands for.
BLOCK_TOKENS = 512
# Of a CSV: time, tokens of the prompt and of the output. Of one's own, Azure's, BurstGPT's and Vidur's.
TABLES = (
    ("arrival_s", "prompt_tokens", "output_tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
)
# What may stand beside them; blocks are numbers with spaces between.
MORE = ("tenant", "session", "think_s", "blocks")
# ServeGen tells rates by windows; a part of the day is taken.
WINDOW_S, WINDOWS = 600.0, 2


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Two rows share their first k blocks of BLOCK_TOKENS tokens when their first k `blocks` are equal.

    Rows of one `session` follow each other, each `think_s` seconds after the one before has ended, and all begin as the
    one before did, as far as both are long.

    With a `wave` they are calls of a workflow: those of one wave run side by side, and a wave begins when all of the
    one before has ended. `stage` names the step; only calls of one stage begin alike.
    """

    at_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    session: str = ""
    think_s: float = 0.0
    stage: str = ""
    wave: int | None = None


def load(name: str) -> list[Row]:
    """A trace by its name. Raises UnknownName, BadFile and DownloadError."""
    known = {**TRACES, **UNTIMED}
    if name not in known:
        raise UnknownName("trace", name, known)
    source, read = known[name]
    return _from_zero(read(data.find(source)))


def load_file(path: Path) -> list[Row]:
    """A trace of one's own, in a form that published ones have, gzipped or not.

    A CSV with the columns of one of TABLES and, where wanted, those of MORE; times are seconds, or dates with times.
    Or JSON lines as of Mooncake (timestamp in ms, input_length, output_length, hash_ids), of agents' sessions
    (session_id, input_tokens, output_tokens, and end_time_s with duration_ms, or think_time_s), of workflows (calls) or
    of ServeGen's clients. Or numbers alone, one a line: arrivals in seconds. Raises BadFile naming the line.
    """
    rows = _from_zero((_table if ".csv" in path.suffixes else _form_of(path))(path))
    if not rows:
        raise BadFile(path, "has no requests")
    return rows


def _form_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    """How JSON lines, or numbers, are read: by the first one."""
    number, line = next(_lines(path), (1, "{}"))
    try:
        first = json.loads(line)
    except ValueError as error:
        raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error
    if isinstance(first, int | float) and not isinstance(first, bool):
        return _arrivals
    if not isinstance(first, dict):
        raise BadFile(path, f"line {number}: is neither an object nor a number")
    forms = (("calls", _workflows), ("trace_csv", _servegen), ("duration_ms", _agents), ("session_id", _coding))
    return next((form for name, form in forms if name in first), _mooncake)


def _from_zero(rows: Iterator[Row]) -> list[Row]:
    found = sorted(rows, key=lambda row: row.at_s)
    return [replace(row, at_s=row.at_s - found[0].at_s) for row in found]


def _row(at_s: float, prompt: int, output: int, *more: Any, **named: Any) -> Row:
    """Raises ValueError for what no request can be."""
    if prompt < 1 or output < 0 or not math.isfinite(at_s):
        got = f"got {prompt} and {output} tokens at {at_s} s"
        raise ValueError(f"{got}; a prompt has 1 token or more, an output 0 or more, and times are numbers")
    return Row(at_s, prompt, output, *more, **named)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty."""
    return ((number, line) for number, line in enumerate(data.read(path).splitlines(), start=1) if line.strip())


def _mooncake(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            yield _row(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


def _arrivals(path: Path) -> Iterator[Row]:
    lengths = itertools.cycle(data.lengths("sharegpt-lengths"))
    for number, line in _lines(path):
        try:
            yield _row(float(line), *next(lengths))
        except ValueError as error:
            raise BadFile(path, f"line {number}: {error}") from error


def _table(path: Path) -> Iterator[Row]:
    # A byte order mark is what spreadsheets begin with.
    reader = csv.DictReader(io.StringIO(data.read(path).removeprefix("\ufeff")))
    there = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = there
    names = next((names for names in TABLES if set(names) <= set(there)), None)
    if names is None:
        nearest = max(TABLES, key=lambda names: len(set(names) & set(there)))
        missing = next(name for name in nearest if name not in there)
        known = " or ".join(", ".join(names) for names in TABLES)
        raise BadFile(path, f"has no column {missing}; columns are {known}; and, where wanted, {', '.join(MORE)}")
    for number, row in enumerate(reader, start=2):
        try:
            at, prompt, output = _time_s(row[names[0]]), int(row[names[1]]), int(row[names[2]])
            blocks = tuple(int(block) for block in (row.get("blocks") or "").split())
            think = float(row.get("think_s") or 0)
            yield _row(at, prompt, output, blocks, row.get("tenant") or "", row.get("session") or "", think)
        except (TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {error}") from error


def _time_s(text: str) -> float:
    """Seconds, or a date with a time. Raises ValueError."""
    try:
        return float(text)
    except ValueError:
        # Seven digits of a second are written; datetime takes six.
        return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC).timestamp()


def _lengths(name: str) -> Callable[[Path], Iterator[Row]]:
    """Lengths alone: when they come is for whoever replays them to say."""
    return lambda path: (Row(0.0, prompt, max(1, output)) for prompt, output in data.lengths(name))


def _agents(path: Path) -> Iterator[Row]:
    """Sessions of calls; what passed between the end of one and the beginning of the next is thought and tools."""
    last: dict[str, tuple[float, float]] = {}  # -> when its last call ended, when its first began
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            session, end = str(row["session_id"]), float(row["end_time_s"])
            start = end - float(row["duration_ms"]) / 1000
            before, first = last.get(session, (start, start))
            last[session] = (end, first)
            think = max(0.0, start - before)
            if not int(row["input_tokens"]):
                continue  # it failed before it was read
            yield _row(first, int(row["input_tokens"]), max(1, int(row["output_tokens"])), (), "", session, think)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


def _coding(path: Path) -> Iterator[Row]:
    """Sessions whose first calls come a minute apart: the recording tells only the times within each."""
    begun: dict[str, float] = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            session = str(row["session_id"])
            first = begun.setdefault(session, 60.0 * len(begun))
            think = max(0.0, float(row.get("think_time_s") or 0))
            prompt, output = max(1, int(row["input_tokens"])), max(1, int(row["output_tokens"]))
            yield _row(first, prompt, output, (), "", session, think)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


# Steps of the text-to-SQL workflow whose calls run side by side; calls of the others follow each other.
_SIDE_BY_SIDE = frozenset({"generate_candidate_llama-agent", "evaluate"})
WORKFLOW_GAP_S = 2.0


def _workflows(path: Path) -> Iterator[Row]:
    """Queries of an agent that writes SQL, one a line: its calls in order, each with its step and lengths.

    The recording tells no times: queries are taken to come WORKFLOW_GAP_S apart, the slower rate of its paper.
    """
    for place, (number, line) in enumerate(_lines(path)):
        try:
            wave, before = -1, ""
            calls = json.loads(line)["calls"]
            if not calls:
                raise ValueError("a workflow has one call or more")
            for call in calls:
                step, prompt, output = str(call["step"]), int(call["input_length"]), int(call["output_length"])
                if step != before or step not in _SIDE_BY_SIDE:
                    wave += 1
                before = step
                at, session = WORKFLOW_GAP_S * place, f"query-{place}"
                yield replace(
                    _row(at, prompt, output, session=session, stage=step, wave=wave), num_output=max(1, output)
                )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


def _servegen(path: Path) -> Iterator[Row]:
    """Clients by their windows of ten minutes: gaps of the recorded shape, lengths of the recorded histograms.

    The first windows of every client; seeded, so that the same rows come each time.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            client, draw = f"client-{row['client']}", random.Random(f"servegen {row['client']}")
            windows = [window.split(",") for window in row["trace_csv"].splitlines() if window]
            held = {float(start): lengths for start, lengths in row["dataset"].items()}
            seen = [pair for start in sorted(held) if (pair := _histograms(held[start])) is not None]
            if not seen:
                continue
            prompts, outputs = seen[0]
            for window in windows[:WINDOWS]:
                start, rate, cv = float(window[0]), float(window[1]), float(window[2])
                at = start
                # Rates are requests a second; the shape of a gamma distribution follows from the variation of gaps.
                shape = 1 / max(cv, 0.05) ** 2
                while rate > 0:
                    at += draw.gammavariate(shape, 1 / (shape * rate))
                    if at >= start + WINDOW_S:
                        break
                    yield _row(at, max(1, _drawn(draw, prompts)), max(1, _drawn(draw, outputs)), (), client)
        except (AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {type(error).__name__} {error}") from error


_Histogram = tuple[list[int], list[float]]


def _histograms(held: Any) -> tuple[_Histogram, _Histogram] | None:
    """Of prompts and of outputs: lengths, and the sums of their shares so far; None for what was never seen."""
    found = []
    for name in ("input_tokens", "output_tokens"):
        shares = ast.literal_eval(held[name]) if isinstance(held[name], str) else held[name]
        if not shares:
            return None
        values = sorted((int(value), float(share)) for value, share in shares.items())
        found.append(([value for value, _ in values], list(itertools.accumulate(share for _, share in values))))
    return found[0], found[1]


def _drawn(draw: random.Random, histogram: _Histogram) -> int:
    values, sums = histogram
    return values[min(len(values) - 1, bisect.bisect(sums, draw.random() * sums[-1]))]


# Name -> (data set, how its file is read).
TRACES: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "azure-conv": ("azure-conv", _table),
    "azure-code": ("azure-code", _table),
    "mooncake": ("mooncake-conversation", _mooncake),
    "mooncake-synthetic": ("mooncake-synthetic", _mooncake),
    "mooncake-toolagent": ("mooncake-toolagent", _mooncake),
    "burstgpt": ("burstgpt", _arrivals),
    "servegen": ("servegen-small", _servegen),
    "servegen-mid": ("servegen-mid", _servegen),
    "servegen-reason": ("servegen-reason", _servegen),
}
# What tells no time for each request: sessions, whose calls wait for each other, and lengths alone.
UNTIMED: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "agents": ("agents-swebench", _agents),
    "agents-coding": ("agents-coding", _coding),
    "hexgen-formula1": ("hexgen-formula1", _workflows),
    "hexgen-financial": ("hexgen-financial", _workflows),
    "lengths": ("sharegpt-lengths", _lengths("sharegpt-lengths")),
    "lengths-arxiv": ("arxiv-lengths", _lengths("arxiv-lengths")),
    "lengths-bwb": ("bwb-lengths", _lengths("bwb-lengths")),
}
