"""What rules for the number of replicas have in common: limits on how fast it changes, and what a replica can do.

The limits are the `behavior` of the Kubernetes Horizontal Pod Autoscaler, version 2, with its defaults.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from millstream.cluster.protocol import FleetView


@dataclass(frozen=True, slots=True)
class Behavior:
    """How fast the number may change.

    Down: to the largest number recommended in the last `down_window_s`, so that a short lull removes nobody. Up: in
    `up_period_s` by `up_share` of the number at its start or by `up_count`, whichever is more. Raises ValueError.
    """

    down_window_s: float = 300.0
    up_period_s: float = 15.0
    up_share: float = 1.0
    up_count: int = 4

    def __post_init__(self) -> None:
        if self.down_window_s < 0 or self.up_period_s <= 0 or self.up_share < 0 or self.up_count < 0:
            raise ValueError(
                "up_period_s is above 0; down_window_s, up_share and up_count are 0 or more; got "
                f"{self.up_period_s}, {self.down_window_s}, {self.up_share} and {self.up_count}"
            )
        if not self.up_share and not self.up_count:
            raise ValueError("up_share and up_count are both 0: nothing could ever be added")


class Stabilizer:
    """Holds recommendations to a `Behavior`. Times must not go back."""

    def __init__(self, behavior: Behavior) -> None:
        self.behavior = behavior
        self._recommended: deque[tuple[float, int]] = deque()
        self._sizes: deque[tuple[float, int]] = deque()

    def settle(self, size: int, recommended: int, now: float) -> int:
        """How many there shall be, where there are `size` and a rule wants `recommended`."""
        own = self.behavior
        self._recommended.append((now, recommended))
        while self._recommended[0][0] < now - own.down_window_s:
            self._recommended.popleft()
        # A period that began just now has its own size; sums of intervals are rounded.
        while self._sizes and self._sizes[0][0] <= now - own.up_period_s * (1 - 1e-9):
            self._sizes.popleft()
        self._sizes.append((now, size))
        wanted = recommended
        if wanted < size:
            wanted = min(size, max(one for _, one in self._recommended))
        if wanted > size:
            start = min(one for _, one in self._sizes)
            wanted = max(size, min(wanted, start + max(own.up_count, math.ceil(start * own.up_share))))
        return wanted


class Capacity:
    """Requests that one replica ends in a second of work, learned from views: the most that it was seen to do lately.

    An engine that is not full takes more time a request than one that is, for steps are shared: of the rates that were
    seen, the high ones tell what it can do. A rate is of an interval with `least` ends or more; it is smoothed, and
    what was the most is forgotten with the half-life `half_life_s`.
    """

    def __init__(self, given: float | None = None, half_life_s: float = 1800.0, least: int = 5) -> None:
        self._given, self._half_life_s, self._least = given, half_life_s, least
        self._most: float | None = None
        self._ended = self._worked_s = 0.0

    def see(self, view: FleetView) -> None:
        if self._given is not None or view.interval_s <= 0:
            return
        if self._most is not None:
            self._most *= 0.5 ** (view.interval_s / self._half_life_s)
        self._ended += view.ended
        self._worked_s += view.busy * len(view.members) * view.interval_s
        if self._ended >= self._least and self._worked_s > 0:
            rate = self._ended / self._worked_s
            self._most = rate if self._most is None else max(rate, self._most)
            self._ended = self._worked_s = 0.0

    @property
    def rate(self) -> float | None:
        """Requests a second; None while nothing is known."""
        return self._given if self._given is not None else self._most
