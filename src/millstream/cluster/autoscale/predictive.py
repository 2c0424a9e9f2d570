"""By what will come: the rate of arrivals is forecast as far ahead as a replica takes to start.

The forecast is a line through the recent rates or, once a period of known length (`period_s`: a day) was seen whole,
what came at that time of the last periods, times what comes now against what came then.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.cluster.scaling import Behavior, Capacity, Stabilizer
from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Config:
    """`cold_start_s`: from the order of a replica to its first request; the forecast reaches so far, and an interval
    further. `period_s`: after how long traffic repeats itself (None: it does not). `window_s`: what a line is drawn
    through. `use`, `capacity`: the share that is planned with of what a replica can do in a second, and that (None:
    learned). `drain_s`: within how long what waits shall be worked off.
    """

    cold_start_s: float = 30.0
    period_s: float | None = None
    window_s: float = 120.0
    use: float = 0.8
    capacity: float | None = None
    drain_s: float = 15.0
    interval_s: float = 15.0
    down_window_s: float = 300.0
    up_period_s: float = 15.0
    up_share: float = 1.0
    up_count: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.use <= 1 or self.cold_start_s < 0:
            raise ValueError(
                f"use is above 0 and up to 1, cold_start_s 0 or more; got {self.use} and {self.cold_start_s}"
            )
        for name in ("window_s", "drain_s", "interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity is above 0, got {self.capacity}")
        if self.period_s is not None and self.period_s < 4 * self.interval_s:
            raise ValueError(f"period_s is 4 intervals or more, got {self.period_s}")
        self.behavior()

    def behavior(self) -> Behavior:
        return Behavior(self.down_window_s, self.up_period_s, self.up_share, self.up_count)


class Predictive(Autoscaler):
    def __init__(self, config: Config) -> None:
        self.config, self.interval_s = config, config.interval_s
        self._stabilizer = Stabilizer(config.behavior())
        self._capacity = Capacity(config.capacity)
        self._recent: deque[tuple[float, float]] = deque()  # the middle of an interval, its rate
        self._bins: list[float | None] = []  # rates by the time of the period
        if config.period_s is not None:
            self._bins = [None] * max(4, round(config.period_s / config.interval_s))

    def target(self, fleet: FleetView, now: float) -> int:
        config = self.config
        self._capacity.see(fleet)
        level = self._level() if self._bins else 1.0  # before this interval is learned
        if fleet.interval_s > 0:
            middle, rate = now - fleet.interval_s / 2, fleet.arrived / fleet.interval_s
            self._recent.append((middle, rate))
            while self._recent[0][0] < now - config.window_s:
                self._recent.popleft()
            self._learn(middle, rate)
        one = self._capacity.rate
        if one is None or not self._recent:
            wanted = fleet.size
        else:
            horizon = now + config.cold_start_s + config.interval_s
            rate = max(self.forecast(at, level) for at in (now, (now + horizon) / 2, horizon))
            wanted = math.ceil(round((rate + fleet.waiting / config.drain_s) / (one * config.use), 9))
        return self._stabilizer.settle(fleet.size, wanted, now)

    def forecast(self, at: float, level: float = 1.0) -> float:
        """Requests a second at a time; `level` is what came lately by what used to come at that time."""
        if self._bins and all(one is not None for one in self._bins):
            return max(0.0, (self._bins[self._bin(at)] or 0.0) * level)
        count = len(self._recent)
        mean_t, mean_r = sum(t for t, _ in self._recent) / count, sum(r for _, r in self._recent) / count
        spread = sum((one - mean_t) ** 2 for one, _ in self._recent)
        if count < 3 or not spread:
            return mean_r
        slope = sum((t - mean_t) * (r - mean_r) for t, r in self._recent) / spread
        return max(0.0, mean_r + slope * (at - mean_t))

    def _bin(self, at: float) -> int:
        assert self.config.period_s is not None
        return int(at % self.config.period_s / self.config.period_s * len(self._bins)) % len(self._bins)

    def _level(self) -> float:
        """What came in the window against what used to come then, from half to twice as much."""
        usual = [self._bins[self._bin(at)] for at, _ in self._recent]
        if not usual or any(one is None for one in usual):
            return 1.0
        before = sum(one or 0.0 for one in usual)
        return min(2.0, max(0.5, sum(rate for _, rate in self._recent) / before)) if before else 1.0

    def _learn(self, at: float, rate: float) -> None:
        if self._bins:
            place = self._bin(at)
            before = self._bins[place]
            self._bins[place] = rate if before is None else (before + rate) / 2


CARD = Card("predictive", "as many replicas as the traffic that is forecast one start ahead takes", paper=29)
PLUGIN = Predictive
