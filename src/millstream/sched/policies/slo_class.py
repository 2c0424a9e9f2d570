"""Classes by how soon a first token is wished for: the tight ones first, whoever waits long rises.

A request is of the first class whose limit its wish keeps (`ttft_s`, else `e2e_s`, else the last class). Inside a class
first come, first served. One that has waited `rise_s` seconds for its first token counts as one class higher, and one
more for each `rise_s` again, so that the last class is slow and not starved.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`limits_s`: the longest wish of each class but the last, ascending."""

    limits_s: tuple[float, ...] = (0.5, 2.0, 10.0)
    rise_s: float = 20.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits_s", tuple(self.limits_s))
        if not self.limits_s or list(self.limits_s) != sorted(set(self.limits_s)) or not self.limits_s[0] > 0:
            raise ValueError(f"limits_s must be ascending numbers above 0, got {self.limits_s}")
        if not self.rise_s > 0:
            raise ValueError(f"rise_s must be above 0, got {self.rise_s}")


class SloClass(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        slo, arrival, config = seq.slo, seq.arrival, self.config
        wish = slo.e2e_s if slo.ttft_s is None else slo.ttft_s
        place = len(config.limits_s) if wish is None else bisect_left(config.limits_s, wish)
        if place and seq.first_token is None and (waited := view.now - arrival) >= config.rise_s:
            place = max(0, place - int(waited / config.rise_s))
        return (float(place), arrival)


CARD = Card("slo-class", "classes by how soon a first token is wished for")
PLUGIN = SloClass
