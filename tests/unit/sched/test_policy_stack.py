"""Several policies as one, and what single plug-ins of the room decide."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.registry import Choice
from millstream.sched.protocol import Budget, LoadView, Policy, Verdict
from millstream.sched.stack import PolicyStack


@dataclass
class Seen:
    """As much of a sequence as a policy of these tests looks at."""

    id: int
    arrival: float = 0.0
    request_id: int = 0
    left: int = 1
    first_token: float | None = None
    max_len: int = 20
    num_prompt: int = 4
    num_output: int = 0
    hints: object = field(default_factory=lambda: type("Hints", (), {"expected_output_len": None})())


@dataclass
class Says(Policy):
    ranked: tuple = (0,)
    verdict: Verdict = Verdict.ADMIT
    most: Budget = field(default_factory=Budget)
    chosen: object = None
    told: list = field(default_factory=list)

    def rank(self, seq, view):
        return self.ranked

    def admit(self, seq, view):
        return self.verdict

    def budget(self, view):
        return self.most

    def victim(self, running, view):
        return self.chosen

    def observe(self, event):
        self.told.append(event)


VIEW = LoadView(100.0, 1, 1, [], [])


def test_ranks_concatenate_and_end_by_id():
    assert PolicyStack([Says((1, 2)), Says((0,))]).rank(Seen(7), VIEW) == (1, 2, 0, 7)


def test_all_must_admit_and_the_first_that_does_not_says_how():
    assert PolicyStack([Says(), Says()]).admit(Seen(1), VIEW) is Verdict.ADMIT
    assert PolicyStack([Says(), Says(verdict=Verdict.HOLD)]).admit(Seen(1), VIEW) is Verdict.HOLD
    assert PolicyStack([Says(verdict=Verdict.SKIP), Says(verdict=Verdict.HOLD)]).admit(Seen(1), VIEW) is Verdict.SKIP


def test_the_smallest_budget_wins_part_by_part():
    stack = PolicyStack([Says(most=Budget(tokens=9)), Says(most=Budget(tokens=4, rows=3)), Says()])
    assert stack.budget(VIEW) == Budget(tokens=4, rows=3)
    assert PolicyStack([Says()]).budget(VIEW) == Budget()


def test_the_first_victim_named_wins_and_everybody_hears_of_events():
    first, second = Says(), Says(chosen="b")
    stack = PolicyStack([first, second, Says(chosen="c")])
    assert stack.victim([], VIEW) == "b"
    stack.observe("event")
    assert first.told == second.told == ["event"]


def test_fcfs_goes_by_arrival():
    fcfs = registry.make("policy", "fcfs")
    assert fcfs.rank(Seen(2, 1.0, 5), VIEW) < fcfs.rank(Seen(1, 2.0, 4), VIEW)
    assert fcfs.victim(["a", "b"], VIEW) is None, "the last in rank"


def test_shortest_remaining_goes_by_hint_less_what_is_made_until_patience_ends():
    policy = registry.make("policy", Choice("shortest-remaining", {"patience_s": 50.0}))
    hint = type("Hints", (), {"expected_output_len": 6})()
    assert policy.rank(Seen(1, 90.0, hints=hint), VIEW)[1] == 6
    assert policy.rank(Seen(1, 90.0, hints=hint, num_output=4), VIEW)[1] == 2
    assert policy.rank(Seen(1, 90.0, hints=hint, num_output=40), VIEW)[1] == 1
    assert policy.rank(Seen(1, 90.0), VIEW)[1] == 16
    assert policy.rank(Seen(1, 10.0), VIEW) < policy.rank(Seen(2, 90.0, hints=hint), VIEW)
    assert policy.rank(Seen(1, 10.0, first_token=20.0), VIEW)[0] == 1.0


@pytest.mark.parametrize(
    ("meter", "options"),
    [
        ("splitfuse", {"budget": 0}),
        ("seats", {"max_rows": 0}),
        ("kv-blocks", {"watermark": 1.0}),
        ("kv-blocks", {"watermark": -0.1}),
    ],
)
def test_meters_refuse_options_that_cannot_be(meter, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        registry.options("meter", Choice(meter, options))
