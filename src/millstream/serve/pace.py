"""Whether a request with a deadline would end in time, told by how many requests end a second.

A server that takes in more than it can finish finishes nothing in time: everybody shares it, and all are late. So once
requests end close to their deadlines, a new one that has a deadline is let in only where as many as are inside, at the
rate at which they end, leave it time (Little's law). With fewer inside each is faster, and with each that is let in
they are slower, so the number inside settles where latency is `SHARE` of the deadline. Requests without a deadline are
counted and never refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# Of the deadline: ending later than this says that there are too many; a new one must be through within that.
LATE, SHARE = 0.85, 0.8
# For so long after it was last too full the number inside is bounded.
MEMORY_S = 10.0
# The rate is that of about so many seconds in which somebody was inside, and means nothing before so many have ended.
WINDOW_S, KNOWN = 4.0, 8


class Pace:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.inside = 0
        self._ended = self._busy_s = 0.0
        self._counted_at = now()
        self._full_at = -math.inf

    @property
    def rate(self) -> float:
        """Outputs that end a second; 0 while it is not known."""
        self._count()
        return self._ended / self._busy_s if self._ended >= KNOWN and self._busy_s > 0 else 0.0

    def late_s(self, requests: int, deadline_s: float) -> float | None:
        """How long so many more outputs would take, where that is too long for their deadline; else None."""
        if self._now() - self._full_at > MEMORY_S or not self.inside:
            return None
        rate = self.rate
        if rate > 0:
            took_s = (self.inside + requests) / rate
        else:
            # Nothing is known of a server that was too full from the start: a few find out.
            took_s = 0.0 if self.inside + requests <= KNOWN else deadline_s
        if took_s <= SHARE * deadline_s:
            return None
        self._full_at = self._now()
        return took_s

    def entered(self, requests: int) -> None:
        self._count()
        self.inside += requests

    def left(self, requests: int, took_s: float, deadline_s: float | None, began: bool) -> None:
        """`began`: it had a token. What had none, and what its deadline has ended, says nothing of the rate."""
        self._count()
        self.inside -= requests
        if began and (deadline_s is None or took_s < deadline_s):
            self._ended += requests
        if deadline_s is not None and took_s > LATE * deadline_s:
            self._full_at = self._now()

    def _count(self) -> None:
        now = self._now()
        passed = now - self._counted_at
        self._counted_at = now
        if self.inside <= 0 or passed <= 0:
            return
        fade = math.exp(-passed / WINDOW_S)
        self._ended *= fade
        self._busy_s = self._busy_s * fade + passed
