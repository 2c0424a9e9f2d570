"""By what requests were promised: replicas enough that whoever comes now does not wait longer than wished.

What comes and what a replica can do are learned from views. Where so much waits that the wish would be missed, so many
are added that it is worked off within it. Where fewer requests than `goal` got what they were promised, one more, and
then no further one before `patience_s` is over: what ended before it came says nothing of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.cluster.scaling import Behavior, Capacity, Stabilizer
from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Config:
    """`ttft_s`: how long a first token may take. `goal`: the share of requests that shall get what they were promised.

    `use`: the share of what a replica can do that is planned with. `capacity`: requests that a replica can do in a
    second (None: learned). `memory_s`: over how long the rate of arrivals is averaged. `patience_s`: as long as the
    window in which promises are counted.
    """

    ttft_s: float = 1.0
    goal: float = 0.95
    use: float = 0.8
    capacity: float | None = None
    memory_s: float = 30.0
    patience_s: float = 60.0
    interval_s: float = 15.0
    down_window_s: float = 300.0
    up_period_s: float = 15.0
    up_share: float = 1.0
    up_count: int = 4

    def __post_init__(self) -> None:
        if not (0 < self.goal <= 1 and 0 < self.use <= 1):
            raise ValueError(f"goal and use are above 0 and up to 1, got {self.goal} and {self.use}")
        for name in ("ttft_s", "memory_s", "patience_s", "interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity is above 0, got {self.capacity}")
        self.behavior()

    def behavior(self) -> Behavior:
        return Behavior(self.down_window_s, self.up_period_s, self.up_share, self.up_count)


class SloRule(Autoscaler):
    def __init__(self, config: Config) -> None:
        self.config, self.interval_s = config, config.interval_s
        self._stabilizer = Stabilizer(config.behavior())
        self._capacity = Capacity(config.capacity)
        self._rate: float | None = None
        self._grown_s = -math.inf

    def target(self, fleet: FleetView, now: float) -> int:
        self._capacity.see(fleet)
        if fleet.interval_s > 0:
            seen = fleet.arrived / fleet.interval_s
            share = 1 - math.exp(-fleet.interval_s / self.config.memory_s)
            self._rate = seen if self._rate is None else self._rate + share * (seen - self._rate)
        wanted = self._stabilizer.settle(fleet.size, self._desired(fleet, now), now)
        if wanted > fleet.size or fleet.starting:
            self._grown_s = now
        return wanted

    def _desired(self, fleet: FleetView, now: float) -> int:
        config, one = self.config, self._capacity.rate
        wanted = fleet.size
        if one is not None and self._rate is not None and fleet.members:
            wait_s = fleet.waiting / (len(fleet.members) * one)
            late = max(wait_s, fleet.oldest_wait_s) > config.ttft_s
            backlog = fleet.waiting / config.ttft_s if late else 0.0
            wanted = math.ceil(round((self._rate + backlog) / (one * config.use), 9))
        elif fleet.oldest_wait_s > config.ttft_s:
            wanted = fleet.size + 1
        missed = fleet.attainment is not None and fleet.attainment < config.goal
        if missed and fleet.starting:
            wanted = max(wanted, fleet.size)
        elif missed and now - self._grown_s >= config.patience_s:
            wanted = max(wanted, fleet.size + 1)
        return wanted


CARD = Card("slo", "as many replicas as first tokens within their time take", paper=29)
PLUGIN = SloRule
