"""Always as many: what others are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Config:
    """`n` replicas, whatever happens."""

    n: int = 1
    interval_s: float = 15.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.interval_s <= 0:
            raise ValueError(f"n is 1 or more and interval_s above 0, got {self.n} and {self.interval_s}")


class Static(Autoscaler):
    def __init__(self, config: Config) -> None:
        self.config, self.interval_s = config, config.interval_s

    def target(self, fleet: FleetView, now: float) -> int:
        return self.config.n


CARD = Card("static", "always the same number of replicas", paper=29)
PLUGIN = Static
