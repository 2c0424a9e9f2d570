"""A picture of a run record: the arms' medians as bars, every repeat as a dot, required levels as marks at their arm.

Needs matplotlib (extra `bench`). Text is of a grey that reads on white and on black alike, and the ground is clear,
so one file serves light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from millstream.core.errors import ConfigError
from millstream.reproduce.ledger import MetricRecord, Record, RequiredRecord

INK = "#767676"
BASELINE = "#8a8f98"
COLOURS = ("#3b82f6", "#d97706", "#059669", "#a855f7", "#e11d48", "#0891b2")
LINE = "#dc2626"


def plot(record: Record, stem: Path) -> tuple[Path, Path]:
    """Draws `record` into `stem`.png and `stem`.svg and returns both paths.

    Raises ConfigError when matplotlib is missing or the record holds no measurement.
    """
    matplotlib = _matplotlib()
    metrics = [m for m in record.metrics if any(m.name in arm.metrics for arm in record.arms)]
    if not metrics:
        raise ConfigError(f"the record of {record.name!r} ({record.verdict}) holds no measurement to draw")
    columns = min(3, len(metrics))
    counts = [sum(metric.name in arm.metrics for arm in record.arms) for metric in metrics]
    # Each line of panels is as high as the arms of its fullest one take.
    tallest = [max(counts[start : start + columns]) for start in range(0, len(metrics), columns)]
    heights = [1.1 + 0.42 * most for most in tallest]
    style = {
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": record.name,
        "svg.fonttype": "none",
    }
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page

    with matplotlib.rc_context(style):
        page = Page(figsize=(4.2 * columns, 0.9 + sum(heights)), layout="constrained")
        FigureCanvasAgg(page)
        axes = page.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
        for place, panel in enumerate(axes.flat):
            if place < len(metrics):
                _panel(panel, record, metrics[place], tallest[place // columns])
            else:
                panel.set_axis_off()
        quick = ", quick run" if record.quick else ""
        told = f"{record.verdict}{quick}, {record.date[:10]}, {record.machine.cpu}"
        page.suptitle(f"{record.title}\n{told}; red: what is required of an arm, and on which side", fontsize=10)
        png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
        png.parent.mkdir(parents=True, exist_ok=True)
        page.savefig(png, dpi=150, transparent=True, metadata={"Software": None})
        page.savefig(svg, transparent=True, metadata={"Date": None})
    return png, svg


def _panel(panel: Any, record: Record, metric: MetricRecord, room: int) -> None:
    """With room for so many arms, of which those that measured it are drawn."""
    arms = [arm for arm in record.arms if metric.name in arm.metrics]
    colours = {
        arm.name: COLOURS[(place - 1) % len(COLOURS)] if place else BASELINE for place, arm in enumerate(record.arms)
    }
    top = max(arm.metrics[metric.name].high for arm in arms)
    for row, arm in enumerate(arms):
        colour, taken = colours[arm.name], arm.metrics[metric.name]
        panel.barh(row, taken.median, height=0.62, color=colour, alpha=0.45)
        count = len(taken.values)
        heights = [row + 0.4 * (i / (count - 1) - 0.5) if count > 1 else row for i in range(count)]
        panel.scatter(taken.values, heights, s=13, color=colour, edgecolors=INK, linewidths=0.4, zorder=3)
        panel.annotate(
            f"{taken.median:.4g}",
            (max(taken.high, taken.median, 0), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
    rows = {arm.name: row for row, arm in enumerate(arms)}
    for need in record.required:
        level, row = _level(record, need, metric.name), rows.get(_technique(record, need))
        if level is None or row is None:
            continue
        # The arrow tells on which side of the mark the arm has to be.
        least = (need.at_least is not None) == (need.over is None or _technique(record, need) == need.of.arm)
        panel.vlines(level, row - 0.42, row + 0.42, color=LINE, linewidth=1.4, zorder=4)
        panel.scatter(level, row - 0.42, marker=9 if least else 8, s=22, color=LINE, linewidths=0, zorder=4)
        top = max(top, level)
    panel.set_yticks(range(len(arms)), [arm.name for arm in arms])
    panel.set_ylim(-0.5, room - 0.5)
    panel.invert_yaxis()
    panel.set_xlim(right=top * 1.22 if top > 0 else None)
    arrow = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(metric.better, "")
    panel.set_xlabel(f"{metric.name}{f' [{metric.unit}]' if metric.unit else ''}{arrow}")
    panel.spines[["top", "right"]].set_visible(False)
    panel.patch.set_alpha(0.0)


def _level(record: Record, need: RequiredRecord, metric: str) -> float | None:
    """Where a required bound lies on the axis of `metric`; for a ratio, the level that its later arm must reach."""
    bound = need.at_least if need.at_least is not None else need.at_most
    if bound is None or need.value is None:
        return None
    if need.over is None:
        return bound if need.of.metric == metric else None
    if need.of.metric != metric or need.over.metric != metric:
        return None
    medians = {arm.name: arm.metrics[metric].median for arm in record.arms if metric in arm.metrics}
    # "baseline / technique >= 2" asks the technique to come down to half of the baseline.
    if _technique(record, need) == need.over.arm:
        return medians[need.of.arm] / bound if bound else None
    return medians[need.over.arm] * bound


def _technique(record: Record, need: RequiredRecord) -> str:
    """The arm that a row asks something of: of two, the one that the experiment lists later."""
    order = [arm.name for arm in record.arms]
    sides = [need.of.arm] if need.over is None else [need.of.arm, need.over.arm]
    return max(sides, key=order.index)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "drawing needs matplotlib, which the extra `bench` brings: pip install 'millstream[bench]'"
        ) from error
    return matplotlib
