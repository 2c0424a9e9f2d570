"""Pictures of simulations. Needs matplotlib (extra `bench`); text reads on white and on black, the ground is clear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millstream.core.errors import ConfigError
from millstream.sim.compare import Row
from millstream.sim.simulate import Result

INK = "#767676"
COLOURS = ("#3b82f6", "#d97706", "#059669", "#a855f7", "#e11d48", "#0891b2")


def goodput(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Requests served, and those within their limits, by the rate that was asked. Raises ConfigError."""
    page, axes = _page(path)
    rates = [row["rate"] for row in rows]
    axes.plot(rates, [row["request_throughput"] for row in rows], color=COLOURS[0], marker="o", label="served")
    if rows and rows[0]["request_goodput"] is not None:
        axes.plot(rates, [row["request_goodput"] for row in rows], color=COLOURS[2], marker="o", label="within the SLO")
    axes.plot(rates, rates, color=INK, linewidth=0.8, linestyle=":", label="asked")
    axes.set_xlabel("requests asked a second")
    axes.set_ylabel("requests a second")
    _done(page, axes, path)


def first_tokens(result: Result, path: Path) -> None:
    """The time to the first token of every call, by when it came, a colour a tenant. Raises ConfigError."""
    page, axes = _page(path)
    tenants = sorted({one.call.tenant for one in result.served})
    for place, tenant in enumerate(tenants):
        own = [one for one in result.served if one.call.tenant == tenant and one.times_s]
        axes.scatter(
            [one.arrival_s for one in own],
            [one.times_s[0] - one.arrival_s for one in own],
            s=6,
            color=COLOURS[place % len(COLOURS)],
            label=tenant or "requests",
        )
    axes.set_yscale("log")
    axes.set_xlabel("arrival, s")
    axes.set_ylabel("time to the first token, s")
    _done(page, axes, path)


def replicas(result: Result, path: Path, buckets: int = 120) -> None:
    """Replicas over time, with what comes and what waits below. Raises ConfigError, also where nobody scaled."""
    log = result.scaling
    if log is None:
        raise ConfigError(f"--plot {path}: replicas over time are drawn of a run with an autoscaler")
    page, (upper, lower) = _page(path, 2, (6.4, 5.2), rows=True)
    edges: dict[str, list[tuple[float, int]]] = {"ready": [], "paid for": []}
    for span in log.spans:
        for name, begin, end in (
            ("paid for", span.started_s, span.ended_s),
            ("ready", span.ready_s, span.drained_s or span.ended_s),
        ):
            edges[name] += [(at, way) for at, way in ((begin, 1), (end, -1)) if at is not None and at < log.end_s]
    for place, (name, changes) in enumerate(edges.items()):
        times, counts = _steps([*changes, (log.end_s, 0)])
        style = {"color": COLOURS[place], "linewidth": 1.6 if place == 0 else 1.0}
        upper.step(times, counts, where="post", label=name, **style)
    upper.set_ylabel("replicas")
    upper.set_ylim(bottom=0)
    upper.legend(frameon=False, labelcolor=INK, loc="upper left")
    width = max(log.end_s, 1e-9) / buckets
    came = [0] * buckets
    for one in result.served:
        came[min(buckets - 1, int(one.arrival_s / width))] += 1
    lower.step([place * width for place in range(buckets)], [one / width for one in came], where="post", color=INK)
    lower.set_ylabel("requests a second")
    lower.set_xlabel("s")
    other = lower.twinx()
    for axes in (lower, other):
        for side, spine in axes.spines.items():
            spine.set_visible(side != "top")
            spine.set_color(INK)
    other.tick_params(colors=COLOURS[4])
    at_s = [look.at_s for look in log.looks]
    waiting = [look.waiting for look in log.looks]
    inside = [look.waiting + look.running for look in log.looks]
    other.plot(at_s, inside, color=COLOURS[4], linewidth=1, label="inside")
    other.plot(at_s, waiting, color=COLOURS[3], linewidth=1, label="waiting")
    other.legend(frameon=False, labelcolor=INK, loc="upper left")
    other.set_ylabel("requests in the system", color=COLOURS[4])
    _save(page, path)


def _steps(changes: Sequence[tuple[float, int]]) -> tuple[list[float], list[int]]:
    """Changes of a count, as times and counts from then on."""
    times: list[float] = []
    counts: list[int] = []
    count = 0
    for at_s, change in sorted(changes):
        count += change
        if times and times[-1] == at_s:
            counts[-1] = count
        else:
            times.append(at_s)
            counts.append(count)
    return times, counts


def compared(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Policies side by side, a column of bars a trace: mean and p99 a token, fairness, share within the limits."""
    panels = (
        ("mean s a token", "token_mean_s", True),
        ("p99 TTFT, s", "ttft_p99_s", True),
        ("fairness (Jain)", "fairness", False),
        ("within the SLO", "within", False),
    )
    page, grid = _page(path, len(panels), (9.6, 1.2 + 0.2 * max(len(rows) for rows in tables.values())))
    labels = list(dict.fromkeys(row.policy for rows in tables.values() for row in rows))
    for axes, (title, name, logarithmic) in zip(grid, panels, strict=True):
        for place, (trace, rows) in enumerate(tables.items()):
            found = {row.policy: getattr(row, name) for row in rows}
            axes.plot(
                [found.get(label, math.nan) for label in labels],
                range(len(labels)),
                linestyle="none",
                marker="o",
                markersize=4.5,
                color=COLOURS[place % len(COLOURS)],
                label=trace,
            )
        if logarithmic:
            from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(title, color=INK, fontsize=9)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_yticks(range(len(labels)), labels if axes is grid[0] else [""] * len(labels))
    handles, names = grid[0].get_legend_handles_labels()
    page.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, labelcolor=INK)
    _save(page, path)


def _page(path: Path, count: int = 1, size: tuple[float, float] = (6.4, 3.8), rows: bool = False) -> tuple[Any, Any]:
    """A page, and its axes: several beside each other, or as `rows` that share their time."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: the name of a .png or .svg file")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'millstream[bench]'") from None
    page = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(page)
    if rows:
        grid = page.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    else:
        grid = page.subplots(1, count, squeeze=False)[0]
    for axes in grid:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(INK)
        axes.tick_params(colors=INK, which="both")
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return page, grid if count > 1 else grid[0]


def _done(page: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False, labelcolor=INK)
    _save(page, path)


def _save(page: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=150, transparent=True)
