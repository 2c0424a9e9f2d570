"""Pictures of simulations. Needs matplotlib (extra `bench`); text reads on white and on black, the ground is clear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millstream.core.errors import ConfigError
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


def _page(path: Path) -> tuple[Any, Any]:
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: the name of a .png or .svg file")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'millstream[bench]'") from None
    page = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(page)
    axes = page.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return page, axes


def _done(page: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=150, transparent=True)
