"""By what really will come, which nobody knows: the bound that experiments measure regret against."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Config:
    """From `times[i]` on, in seconds, `rates[i]` requests come in a second. `capacity`: those that a replica can do.
    A replica is ordered so early that it is there `cold_start_s` later, and kept no longer than it is needed.
    """

    times: Sequence[float] = (0.0,)
    rates: Sequence[float] = (1.0,)
    capacity: float = 1.0
    cold_start_s: float = 30.0
    interval_s: float = 15.0

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.rates) or list(self.times) != sorted(self.times):
            raise ValueError(f"as many times as rates, in order: got {len(self.times)} and {len(self.rates)}")
        if not self.capacity > 0 or self.cold_start_s < 0 or self.interval_s <= 0:
            raise ValueError(
                f"capacity and interval_s are above 0, cold_start_s 0 or more; got {self.capacity}, {self.interval_s} "
                f"and {self.cold_start_s}"
            )


class Oracle(Autoscaler):
    def __init__(self, config: Config) -> None:
        self.config, self.interval_s = config, config.interval_s

    def target(self, fleet: FleetView, now: float) -> int:
        config = self.config
        first = max(0, bisect.bisect_right(config.times, now) - 1)
        # What is ordered at the next view is there too late for what comes before then.
        last = bisect.bisect_left(config.times, now + config.cold_start_s + config.interval_s)
        most = max(config.rates[first : max(last, first + 1)])
        return max(1, math.ceil(round(most / config.capacity, 9)))


CARD = Card("oracle", "as many replicas as the true rate of arrivals takes, known beforehand", paper=29)
PLUGIN = Oracle
