"""Requests with deadlines at a server that gets too many of them: what it takes in, it finishes in time."""

from __future__ import annotations

from typing import Any

from millstream.serve.pace import Pace


class Machine:
    """A batching engine: `rate` outputs a second end when `width` or more are inside, proportionally fewer below."""

    def __init__(self, rate: float, width: int, deadline_s: float | None, asked_per_s: float) -> None:
        self.at = 0.0
        self.pace = Pace(lambda: self.at)
        self.rate, self.width, self.deadline_s, self.asked = rate, width, deadline_s, asked_per_s
        self.inside: list[list[float]] = []  # [work left, arrived]
        self.good = self.late = self.refused = 0
        self.limit = True

    def run(self, seconds: float) -> float:
        """Outputs a second that ended in time."""
        end, step, credit = self.at + seconds, 0.01, 0.0
        good = self.good
        while self.at < end:
            self.at += step
            credit += self.asked * step
            while credit >= 1:
                credit -= 1
                if self.limit and self.deadline_s is not None and self.pace.late_s(1, self.deadline_s) is not None:
                    self.refused += 1
                    continue
                self.pace.entered(1)
                self.inside.append([1.0, self.at])
            count = len(self.inside)
            done = self.rate * min(1.0, count / self.width) * step
            for one in self.inside:
                one[0] -= done / count
            for one in [one for one in self.inside if one[0] <= 0 or self._over(one)]:
                self.inside.remove(one)
                took = self.at - one[1]
                self.pace.left(1, took, self.deadline_s, True)
                fine = one[0] <= 0 and (self.deadline_s is None or took <= self.deadline_s)
                self.good += fine
                self.late += not fine
        return (self.good - good) / seconds

    def _over(self, one: list[float]) -> bool:
        return self.deadline_s is not None and self.at - one[1] > self.deadline_s


def machine(asked_per_s: float, **given: Any) -> Machine:
    return Machine(**{"rate": 40.0, "width": 16, "deadline_s": 2.0, "asked_per_s": asked_per_s, **given})


def test_what_is_below_capacity_is_never_refused():
    one = machine(35.0)
    assert one.run(60) > 34 and one.refused == one.late == 0


def test_ten_times_too_many_cost_little_of_what_is_finished_in_time():
    one = machine(400.0)
    one.run(10)
    assert one.run(30) > 0.9 * 40 and one.refused > 300 * 30
    open_to_all = machine(400.0)
    open_to_all.limit = False
    assert open_to_all.run(30) < 0.2 * 40


def test_it_holds_at_all_loads_between():
    for asked in (45.0, 60.0, 100.0, 200.0):
        one = machine(asked)
        one.run(20)
        assert one.run(30) > 0.88 * 40, asked


def test_when_the_rush_is_over_everybody_is_let_in_again():
    one = machine(400.0)
    one.run(10)
    one.asked = 30.0
    one.run(12)
    refused = one.refused
    assert one.run(20) > 29 and one.refused == refused


def test_without_deadlines_nobody_is_refused():
    one = machine(38.0, deadline_s=None)
    one.run(20)
    assert one.pace.late_s(1, 1e-3) is None and one.refused == 0


def test_a_few_slow_ones_close_to_their_deadline_shut_nobody_out():
    one = machine(0.5, rate=40.0, width=80)
    one.run(60)
    assert one.refused == 0
