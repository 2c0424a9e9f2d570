"""The table of metrics in docs/observability.md is the one that the code has."""

from __future__ import annotations

from pathlib import Path

from millstream.serve.families import Counter, Gauge, Histogram
from millstream.serve.metrics import Metrics

DOC = Path(__file__).parents[3] / "docs" / "observability.md"
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


def table() -> str:
    metrics = Metrics("m", process=False)
    metrics.describe_cache(block_size=16)
    rows = ["| metric | kind | labels | also known as | what |", "|---|---|---|---|---|"]
    for family in [*metrics.families, metrics.cache_info]:
        if not family.name.startswith("millstream_"):
            continue
        total = "_total" if isinstance(family, Counter) else ""
        labels = ", ".join(family.labels) if family is not metrics.cache_info else "one a setting"
        aliases = ", ".join(f"`{alias}{total}`" for alias in family.aliases)
        rows.append(f"| `{family.name}{total}` | {KINDS[type(family)]} | {labels} | {aliases} | {family.told} |")
    return "\n".join(rows)


def test_the_table_of_metrics_is_current():
    text = DOC.read_text()
    start, end = text.index("<!-- metrics -->") + len("<!-- metrics -->"), text.index("<!-- /metrics -->")
    assert text[start:end].strip() == table(), f"docs/observability.md should have:\n\n{table()}\n"
