"""What commands print: JSON on one line, tables, sizes and times in words, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from millstream.models.hub import Progress

_out: TextIO | None = None


@contextlib.contextmanager
def json_only(on: bool) -> Iterator[None]:
    """While on, stdout belongs to `emit`: whatever else is printed goes to stderr."""
    global _out
    if not on:
        yield
        return
    before, _out = _out, _out or sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _out = before


def emit(value: Mapping[str, Any]) -> None:
    """One line of JSON on stdout. Numbers that JSON does not have become null."""
    out = _out or sys.stdout
    out.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n")
    out.flush()


def note(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr, flush=True)


def size_in_words(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit in ("B", "KB") else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    raise AssertionError


def memory_in_words(size_bytes: float) -> str:
    """Memory, in the binary units that it is counted in."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit in ("B", "KiB") else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1024
    raise AssertionError


def seconds_in_words(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """A table on stdout; columns in `right` are numbers. Plain columns where stdout is no terminal."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for place, title in enumerate(titles):
            table.add_column(title, justify="right" if place in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(row[place]) for row in [list(titles), *cells]) for place in range(len(titles))]
    for row in [list(titles), *cells]:
        line = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(line).rstrip())


@contextlib.contextmanager
def download_progress(name: str) -> Iterator[Progress]:
    """A progress callback for pulls: a bar where stderr is a terminal, a line every few seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_progress(name)
        return
    bar: Any = None
    task: Any = None

    def show(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal bar, task
        if bar is None:
            # Only a download pays for rich: models that are here open without it.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            task = bar.add_task(name, total=None)
            bar.start()
        bar.update(task, description=f"{name}: {stage}", completed=done_bytes, total=total_bytes or None)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _plain_progress(name: str, every_s: float = 5.0) -> Progress:
    last_stage, last_s, last_done = "", 0.0, 0

    def show(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal last_stage, last_s, last_done
        now = time.monotonic()
        if stage == last_stage and now - last_s < every_s:
            return
        rate = ""
        if stage == last_stage and done_bytes > last_done:
            rate = f", {size_in_words((done_bytes - last_done) / (now - last_s))}/s"
        share = f" of {size_in_words(total_bytes)}" if total_bytes else ""
        note(f"{name}: {stage} {size_in_words(done_bytes)}{share}{rate}")
        last_stage, last_s, last_done = stage, now, done_bytes

    return show


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def progress_bar(total: int, what: str = "", off: bool = False) -> Iterator[Callable[[], None] | None]:
    """A bar on the standard error, where that is a terminal; the callable says that one more is done."""
    if off or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Drawn seldom: the same core does the work.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=bool(what)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
