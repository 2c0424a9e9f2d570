"""`millstream papers` and `millstream reproduce NAME`: what the command line prints of the ledger and the harness."""

from __future__ import annotations

import argparse
import json as jsonlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millstream.config.load import data_dir, home
from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName
from millstream.reproduce import ledger
from millstream.reproduce.machine import without_private
from millstream.reproduce.papers import PAPERS, Paper, find

if TYPE_CHECKING:
    from rich.console import Console

    from millstream.reproduce.harness import Tick

EXIT_DID_NOT_HOLD = 1
EXIT_NOT_BUILT = 2

COLOURS = {"works": "green", "partly": "yellow", "stale": "magenta", "failed": "red", "void": "red", "not yet": "dim"}
OUTCOMES = {"passed": "green", "failed": "red", "out of reach": "yellow", "elsewhere": "dim"}

PLOTS = Path("docs/plots")


def papers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="an experiment, as `millstream papers` names it, or the paper's number")
    parser.add_argument(
        "--quick", action="store_true", help="a small version, under a minute; never makes a paper work"
    )
    parser.add_argument("--record", action="store_true", help="write the record into the source tree")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the record to FILE, its plot beside it (default: $MILLSTREAM_HOME/records/NAME.json)",
    )
    parser.add_argument("--json", action="store_true", help="print the record as one line of JSON and nothing else")


def papers_command(json: bool = False) -> int:
    """Prints all papers with their state. Returns the exit status."""
    standings = ledger.standings(ledger.RECORDS, ledger.SOURCE_ROOT)
    if json:
        rows = [
            {
                "number": one.paper.number,
                "name": one.paper.name,
                "title": one.paper.title,
                "room": one.paper.room,
                "switch": one.paper.switch.replace("`", ""),
                "state": one.state,
                "measured": one.measured,
            }
            for one in standings
        ]
        print(jsonlib.dumps({"papers": rows}, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim", min_width=2)
    for title, width in (
        ("name", max(len(paper.name) for paper in PAPERS)),
        ("state", len("not yet")),
        ("measured", len("2026-01-01")),
    ):
        table.add_column(title, no_wrap=True, min_width=width)
    # Where nobody looks at a window's width, nothing is cut. In one, rich would sooner drop whole columns than cut.
    console = Console() if sys.stdout.isatty() else Console(width=300)
    spare = max(30, console.width - 48)
    for title, share in (("technique", 0.4), ("room", 0.25), ("switch", 0.35)):
        widest = int(spare * share) if sys.stdout.isatty() else None
        table.add_column(title, no_wrap=True, overflow="ellipsis", max_width=widest)
    for one in standings:
        paper, colour = one.paper, COLOURS[one.state]
        table.add_row(
            str(paper.number),
            paper.name,
            f"[{colour}]{one.state}[/{colour}]",
            one.measured or "-",
            paper.short,
            paper.room,
            paper.switch.replace("`", ""),
        )
    console.print(table)
    count = Counter(one.state for one in standings)
    console.print(f"\n{len(PAPERS)} papers: " + ", ".join(f"{n} {state}" for state, n in count.most_common()))
    return 0


def reproduce_command(
    name: str,
    quick: bool = False,
    record: bool = False,
    json: bool = False,
    out: Path | None = None,
    data: Path | None = None,
) -> int:
    """Runs an experiment, prints its record and writes it, by default below `home()`. Returns the exit status.

    0 when the verdict is works or partly, 1 when it is failed or void, 2 when the paper has no experiment yet.
    `data` is the folder of public data sets, by default the configured one.
    Raises UnknownName, ConfigError, and what the experiment raises.
    """
    paper = _paper(name)
    name = paper.name if paper else name
    if name not in registry.names("experiment"):
        if paper is None:
            raise UnknownName("experiment", name, {*registry.names("experiment"), *(p.name for p in PAPERS)})
        return _not_built(paper, json)

    destination = _destination(name, quick, record, out)
    from millstream.reproduce import harness

    experiment = registry.make("experiment", name)
    data = data_dir() if data is None else data
    with _progress(experiment.title) as progress:
        result = harness.run(experiment, quick=quick, data=data, progress=progress, root=ledger.SOURCE_ROOT)
    ledger.write(result, destination)
    notes = [f"record: {destination}", *_draw(result, destination, record)]
    if json:
        print(jsonlib.dumps(without_private(msgspec.to_builtins(result)), ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        show(result, Console())
    for note in notes:
        print(note, file=sys.stderr)
    return 0 if result.verdict in ("works", "partly") else EXIT_DID_NOT_HOLD


def show(record: ledger.Record, console: Console) -> None:
    """Prints a record: checks, arms, required rows, the paper's claim beside ours, warnings, verdict."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(record.title)}[/bold]  [dim]{record.date}, {record.seconds:.1f} s[/dim]")
    for check in record.checks:
        mark = "[green]passed[/green]" if check.passed else "[red]failed[/red]"
        console.print(f"  check {mark}  {escape(check.name)}" + (f": {escape(check.detail)}" if check.detail else ""))
    units = {metric.name: metric.unit for metric in record.metrics}
    if record.order:
        table = Table("arm", "metric", box=None, header_style="bold", pad_edge=False)
        for title in ("median", "quartiles", "range"):
            table.add_column(title, justify="right")
        for arm in record.arms:
            for place, (metric, taken) in enumerate(arm.metrics.items()):
                unit = f" {units[metric]}" if units.get(metric) else ""
                table.add_row(
                    escape(arm.name) if place == 0 else "",
                    escape(metric),
                    f"{taken.median:.4g}{escape(unit)}",
                    f"{taken.q1:.4g} to {taken.q3:.4g}",
                    f"{taken.low:.4g} to {taken.high:.4g}",
                )
        console.print(table)
    for row in record.required:
        colour = OUTCOMES[row.outcome]
        value = "not measured" if row.value is None else f"{row.value:.3g}"
        reason = f" [dim]({escape(row.reason)})[/dim]" if row.reason else ""
        console.print(f"  required [{colour}]{row.outcome}[/{colour}]  {escape(row.text)}: {value}{reason}")
    console.print(f"  [dim]the paper:[/dim] {escape(record.claim)}")
    if record.figures:
        from millstream.reproduce.docs import figure_line

        for figure in record.figures:
            console.print(f"    {escape(figure_line(figure))}")
    for warning in record.warnings:
        console.print(f"  [yellow]warning[/yellow]  {escape(warning)}")
    colour = COLOURS[record.verdict]
    quick = " [dim](quick run: does not count as works)[/dim]" if record.quick else ""
    console.print(f"verdict: [bold {colour}]{record.verdict}[/bold {colour}]{quick}")
    for reason in record.why:
        console.print(f"  {escape(reason)}")


def _paper(name: str) -> Paper | None:
    try:
        return find(name)
    except UnknownName:
        return None


def _not_built(paper: Paper, json: bool) -> int:
    state = ledger.standing(paper, ledger.RECORDS, ledger.SOURCE_ROOT).state
    built = [name for name in registry.names("experiment")]
    text = (
        f"paper {paper.number} ({paper.name}: {paper.short}) has no experiment yet; its state is '{state}'; "
        f"experiments that exist: {', '.join(built) or 'none'}"
    )
    if json:
        print(
            jsonlib.dumps(
                {"name": paper.name, "paper": paper.number, "state": state, "error": text}, ensure_ascii=False
            )
        )
    print(text, file=sys.stderr)
    return EXIT_NOT_BUILT


def _destination(name: str, quick: bool, record: bool, out: Path | None) -> Path:
    """Where the record goes, refused before the run rather than after it: minutes of work are always kept."""
    if record and out is not None:
        raise ConfigError("--record and --out: choose one; --record writes into the source tree, --out to a file")
    if not record:
        return out or home() / "records" / f"{name}{'-quick' if quick else ''}.json"
    if not (ledger.SOURCE_ROOT.parent / "pyproject.toml").is_file():
        raise ConfigError("--record writes into a source tree, and this is an installed package; use --out FILE")
    if quick:
        earlier = ledger.latest(name, ledger.RECORDS)
        if earlier is not None and not earlier.quick:
            raise ConfigError(f"--quick --record would replace the full record of {name!r}; use --out FILE")
    return ledger.RECORDS / f"{name}.json"


def _draw(result: ledger.Record, destination: Path, record: bool) -> list[str]:
    from millstream.reproduce.plot import plot

    stem = ledger.SOURCE_ROOT.parent / PLOTS / result.name if record else destination.with_suffix("")
    try:
        png, svg = plot(result, stem)
    except ConfigError as error:
        return [f"no plot: {error}"]
    return [f"plot: {png}", f"plot: {svg}"]


@contextmanager
def _progress(title: str) -> Iterator[Callable[[Tick], None]]:
    """A bar on stderr where that is a terminal, a line for each stage otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def line(tick: Tick) -> None:
            nonlocal last
            if tick.stage == "note" or tick.stage != last:
                print(f"{tick.stage}: {tick.text}", file=sys.stderr, flush=True)
            last = tick.stage

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(tick: Tick) -> None:
            if tick.stage == "note":
                bar.console.print(tick.text, style="dim", markup=False)
            else:
                bar.update(task, description=f"{tick.stage}: {tick.text}", completed=tick.done, total=tick.total)

        yield update
