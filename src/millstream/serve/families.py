"""Families of metrics: plain numbers that are cheap to add to, and turned into Prometheus text only when asked.

A family may have aliases, names under which other people's dashboards know the same numbers: they cost nothing until
the text is made. Label values are bounded: what comes after `MAX_SERIES` different ones is counted as "other".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)

MAX_SERIES = 512
OTHER = "other"


class Family:
    """What all kinds share: a name, labels, aliases, and a bound on how many series there are.

    `base` are labels that every series has, with their values.
    """

    def __init__(
        self, name: str, told: str, labels: Seq[str] = (), aliases: Seq[str] = (), base: dict[str, str] | None = None
    ) -> None:
        self.name, self.told, self.labels, self.aliases = name, told, tuple(labels), tuple(aliases)
        self.base = dict(base or {})
        self._known: set[tuple[str, ...]] = set()

    def _key(self, values: tuple[str, ...]) -> tuple[str, ...]:
        if values in self._known:
            return values
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, got {values}")
        if len(self._known) >= MAX_SERIES:
            return (OTHER,) * len(values)
        self._known.add(values)
        return values

    def collect(self) -> Iterator[Any]:
        """The family under its own name and under every alias."""
        for name in (self.name, *self.aliases):
            yield self._as(name)

    def _as(self, name: str) -> Any:
        raise NotImplementedError

    def _all_labels(self, key: tuple[str, ...]) -> list[str]:
        return [*self.base.values(), *key]


class Counter(Family):
    """A sum that only grows. Without labels it is there from the start, as 0."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.values: dict[tuple[str, ...], float] = {} if self.labels else {(): 0.0}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        key = self._key(labels)
        self.values[key] = self.values.get(key, 0.0) + amount

    def total(self, *labels: str) -> float:
        return self.values.get(labels, 0.0)

    def _as(self, name: str) -> Any:
        family = CounterMetricFamily(name, self.told, labels=[*self.base, *self.labels])
        for key, value in self.values.items():
            family.add_metric(self._all_labels(key), value)
        return family


class Gauge(Family):
    """A value that goes up and down. A series that was never set is not shown."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *labels: str) -> None:
        self.values[self._key(labels)] = float(value)

    def value(self, *labels: str) -> float | None:
        return self.values.get(labels)

    def _as(self, name: str) -> Any:
        family = GaugeMetricFamily(name, self.told, labels=[*self.base, *self.labels])
        for key, value in self.values.items():
            family.add_metric(self._all_labels(key), value)
        return family


class Histogram(Family):
    """Counts of observations by upper bound, and their sum. Without labels it is there from the start, empty."""

    def __init__(self, name: str, told: str, bounds: Iterable[float], **named: Any) -> None:
        super().__init__(name, told, **named)
        self.bounds = tuple(float(bound) for bound in bounds)
        if list(self.bounds) != sorted(set(self.bounds)):
            raise ValueError(f"{name}: bounds must rise, got {self.bounds}")
        self.counts: dict[tuple[str, ...], list[int]] = {}
        self.sums: dict[tuple[str, ...], float] = {}
        if not self.labels:
            self._fresh(())

    def _fresh(self, key: tuple[str, ...]) -> list[int]:
        counts = self.counts[key] = [0] * (len(self.bounds) + 1)
        self.sums[key] = 0.0
        return counts

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        key = self._key(labels)
        counts = self.counts.get(key)
        if counts is None:
            counts = self._fresh(key)
        counts[bisect_left(self.bounds, value)] += times
        self.sums[key] += value * times

    def count(self, *labels: str) -> int:
        return sum(self.counts.get(labels, ()))

    def sum(self, *labels: str) -> float:
        return self.sums.get(labels, 0.0)

    def _as(self, name: str) -> Any:
        family = HistogramMetricFamily(name, self.told, labels=[*self.base, *self.labels])
        for key, counts in self.counts.items():
            buckets, total = [], 0
            for bound, count in zip([*map(repr, self.bounds), "+Inf"], counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric(self._all_labels(key), buckets, self.sums[key])
        return family


class Summary(Family):
    """A number of observations and their sum."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.values: dict[tuple[str, ...], tuple[int, float]] = {}

    def observe(self, value: float, *labels: str) -> None:
        key = self._key(labels)
        count, total = self.values.get(key, (0, 0.0))
        self.values[key] = (count + 1, total + value)

    def _as(self, name: str) -> Any:
        family = SummaryMetricFamily(name, self.told, labels=[*self.base, *self.labels])
        for key, (count, total) in self.values.items():
            family.add_metric(self._all_labels(key), count, total)
        return family
