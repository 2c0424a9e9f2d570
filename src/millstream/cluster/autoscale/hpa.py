"""The rule of the Kubernetes Horizontal Pod Autoscaler: as many replicas as bring a metric to its target.

desired = ceil(current * metric / target), where the metric is the mean over ready replicas; with several metrics the
one that wants the most decides. Nothing is done where the ratio is within `tolerance` of 1. Replicas that start yet
count as doing nothing where more are wanted, so that those on their way are not ordered twice. Changes are held to
`scaling.Behavior`: those of `autoscaling/v2` by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.cluster.scaling import Behavior, Stabilizer
from millstream.core.registry import Card

Metric = Literal["busy", "queue", "inside", "kv"]
# What a replica is brought to where no target is given.
TARGETS = {"busy": 0.7, "queue": 2.0, "inside": 8.0, "kv": 0.6}


@dataclass(frozen=True, slots=True)
class Config:
    """`metric` of a replica: `busy`, the share of time in which it computes, as a CPU's use; `queue`, requests that
    wait; `inside`, requests that wait or run; `kv`, the share of KV blocks that is taken. `target` is its wished value
    (None: that of `TARGETS`); `also` has further metrics and their targets. The others are the autoscaler's `tolerance`
    and `behavior`.
    """

    metric: Metric = "queue"
    target: float | None = None
    also: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.1
    interval_s: float = 15.0
    down_window_s: float = 300.0
    up_period_s: float = 15.0
    up_share: float = 1.0
    up_count: int = 4

    def __post_init__(self) -> None:
        for metric, target in ((self.metric, self.target), *self.also.items()):
            if metric not in get_args(Metric):
                raise ValueError(f"metric is one of {', '.join(get_args(Metric))}, got {metric!r}")
            if target is not None and not target > 0:
                raise ValueError(f"target is above 0, got {target}")
        if self.tolerance < 0 or self.interval_s <= 0:
            raise ValueError(
                f"tolerance is 0 or more and interval_s above 0, got {self.tolerance} and {self.interval_s}"
            )
        self.behavior()

    def behavior(self) -> Behavior:
        return Behavior(self.down_window_s, self.up_period_s, self.up_share, self.up_count)


class Hpa(Autoscaler):
    def __init__(self, config: Config) -> None:
        self.config, self.interval_s = config, config.interval_s
        own = TARGETS[config.metric] if config.target is None else config.target
        self._wished = {**config.also, config.metric: own}
        self._stabilizer = Stabilizer(config.behavior())

    def target(self, fleet: FleetView, now: float) -> int:
        wanted = max(self._desired(fleet, metric, wished) for metric, wished in self._wished.items())
        return self._stabilizer.settle(fleet.size, wanted, now)

    def _desired(self, fleet: FleetView, metric: str, wished: float) -> int:
        ready = len(fleet.members)
        if not ready:
            return fleet.size  # nobody tells a metric
        total = _total(fleet, metric)
        # Rounded so that a bound that is met exactly is not passed by a rounding error.
        ratio = round(total / ready / wished, 9)
        if round(abs(ratio - 1), 9) <= self.config.tolerance:
            return fleet.size
        if ratio > 1 and fleet.starting:
            ratio = round(total / fleet.size / wished, 9)
            if round(ratio - 1, 9) <= self.config.tolerance:
                return fleet.size
        return math.ceil(round(ratio * (fleet.size if ratio > 1 else ready), 8))


def _total(fleet: FleetView, metric: str) -> float:
    """Over all members."""
    if metric in ("busy", "kv"):
        return (fleet.busy if metric == "busy" else fleet.kv) * len(fleet.members)
    return float(fleet.waiting + (fleet.running if metric == "inside" else 0))


CARD = Card("hpa", "Kubernetes' rule: as many replicas as bring a metric to its target", paper=29)
PLUGIN = Hpa
