"""Medians, ranges and ratios as one table: for the screen, as markdown, and as JSON.

Ratios say how many times faster the first engine is: its rate over the other's, or the other's seconds over its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peers.measures import Results

START, AFTER_IMPORTS = "start to first token", "first token after imports"
RATE, SECONDS = "tokens/s", "s"


@dataclass(frozen=True, slots=True)
class Cell:
    """The median of `count` values with the lowest and the highest; `ratio` is the first engine's advantage."""

    median: float
    low: float
    high: float
    count: int
    ratio: float | None = None

    def words(self, unit: str) -> str:
        digits = 2 if unit == SECONDS or self.median < 10 else 1 if self.median < 1000 else 0
        range_of = f" ({self.low:.{digits}f} to {self.high:.{digits}f})" if self.count > 1 else ""
        return f"{self.median:.{digits}f}{range_of}" + (f", {self.ratio:.2f}x" if self.ratio is not None else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of all engines; one that has no value for it is not in `cells`."""

    measure: str
    unit: str
    cells: Mapping[str, Cell]


def rows(results: Results, engines: Sequence[str]) -> list[Row]:
    """Decode first, then prefill, totals and starts. `engines` are in the order asked for."""
    measures: dict[str, None] = {}
    for held in results.values.values():
        measures.update(dict.fromkeys(held))
    kinds = ("decode", "prefill", "total")
    ordered = sorted(measures, key=lambda name: kinds.index(name.split()[0]))
    made = [
        _row(name, RATE, {e: results.values.get(e, {}).get(name, []) for e in engines}, engines) for name in ordered
    ]
    starts = {engine: warm(results.starts.get(engine, [])) for engine in engines}
    for name, read in (
        (START, lambda one: one["total_s"]),
        (AFTER_IMPORTS, lambda one: one["total_s"] - one["imports_s"]),
    ):
        made.append(_row(name, SECONDS, {engine: [read(one) for one in starts[engine]] for engine in engines}, engines))
    return [row for row in made if row.cells]


def warm(starts: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """All starts but the first, which may compile and fill caches; that one where there is no other."""
    return starts[1:] or starts


def _row(measure: str, unit: str, values: Mapping[str, Sequence[float]], engines: Sequence[str]) -> Row:
    first = values[engines[0]] if engines else []
    ours = statistics.median(first) if first else None
    cells = {}
    for engine in engines:
        own = values[engine]
        if not own:
            continue
        median = statistics.median(own)
        ratio = None
        if ours is not None and engine != engines[0]:
            ratio = median / ours if unit == SECONDS else ours / median
        cells[engine] = Cell(median, min(own), max(own), len(own), ratio)
    return Row(measure, unit, cells)


def table(made: Sequence[Row], engines: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of words."""
    held = [engine for engine in engines if any(engine in row.cells for row in made)]
    titles = ["", "unit", *held]
    lines = [
        [row.measure, row.unit, *(row.cells[e].words(row.unit) if e in row.cells else "-" for e in held)]
        for row in made
    ]
    return titles, lines


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as a table of markdown."""
    rule = ["---"] * len(titles)
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *lines])


def footnotes(results: Results, engines: Sequence[str]) -> list[str]:
    """What the table does not say: precision and versions, who is missing and why, perplexity, agreement, idling."""
    notes = []
    for engine in engines:
        if engine in results.told:
            told = results.told[engine]
            notes.append(f"{engine}: {told['engine']} {told['version']}, weights {told['precision']}; {told['set']}")
        if engine in results.absent:
            notes.append(f"{engine}: not measured, {results.absent[engine]}")
    for engine, (same, of) in results.agreed.items():
        notes.append(f"{engine}: {same} of {of} first output tokens are those of {engines[0]}")
    for engine, (spent, of) in results.idle.items():
        if of and spent > 0.02 * of:
            notes.append(f"{engine}: took {spent / of:.0%} of a core while others were measured")
    if results.perplexity:
        told = ", ".join(f"{engine} {value:.3f}" for engine, value in results.perplexity.items())
        notes.append(f"perplexity of WikiText-2 (test), {results.perplexity_tokens} tokens in windows of 1,024: {told}")
    return notes


def as_json(results: Results, made: Sequence[Row], **about: Any) -> dict[str, Any]:
    """All of it, with every value measured."""
    return {
        "bench": "peers",
        **about,
        "rows": [
            {"measure": row.measure, "unit": row.unit, "engines": {e: asdict(cell) for e, cell in row.cells.items()}}
            for row in made
        ],
        "values": results.values,
        "starts": results.starts,
        "engines": results.told,
        "absent": results.absent,
        "first_tokens_agreed": results.agreed,
        "idle_cpu_s": results.idle,
        "perplexity": results.perplexity,
        "perplexity_tokens": results.perplexity_tokens,
    }
