"""Several policies as one, and what single plug-ins of the room decide."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from harness import Bench

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.events import Preempted
from millstream.core.registry import Choice
from millstream.core.request import Hints, Slo
from millstream.core.sequence import State
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


@dataclass
class Asks(Says):
    """Ranks by what the policies below say, as one does that shares out among groups."""

    below: object = None

    def atop(self, below):
        self.below = below

    def rank(self, seq, view):
        return (-self.below.rank(seq, view)[0],)


@dataclass
class Counts(Says):
    constant_rank: bool = False
    preemptive: bool = False
    asked: int = 0

    def rank(self, seq, view):
        self.asked += 1
        return (seq.arrival,)


@pytest.mark.parametrize("constant", [False, True])
def test_who_ranks_below_is_asked_once_for_both(constant):
    counts = Counts(constant_rank=constant)
    stack = PolicyStack([Asks(), counts, Says((5,))])
    seqs = [Seen(number, float(number)) for number in range(4)]
    for plan in range(3):
        view = LoadView(float(plan), 1, 1, seqs, [])
        assert [stack.rank(seq, view) for seq in seqs] == [(-seq.arrival, seq.arrival, 5, seq.id) for seq in seqs]
    # Says has ranks that may change, whatever the other's do.
    assert counts.asked == 3 * len(seqs)


def test_a_rank_that_never_changes_is_asked_for_once_and_forgotten_with_its_sequence():
    counts = Counts(constant_rank=True)
    stack = PolicyStack([Asks(), counts])
    (below,) = [policy.below for policy in stack.policies if isinstance(policy, Asks)]
    for plan in range(100):
        seqs = [Seen(number, float(number)) for number in range(plan, plan + 4)]
        view = LoadView(float(plan), 1, 1, seqs, [])
        for seq in seqs:
            assert stack.rank(seq, view) == (-seq.arrival, seq.arrival, seq.id)
        assert len(below._ranks) <= 3 * len(seqs)
    assert counts.asked < 2 * 103, "once each, but for some where those that had gone were forgotten"


def test_the_largest_goes_first_until_patience_ends_and_what_ran_counts_its_output_anew():
    policy = registry.make("policy", Choice("s3", {"patience_s": 50.0}))

    def seen(number, tokens, arrival=90.0, state=State.WAITING, **more):
        hints = type("Hints", (), {"expected_output_len": tokens})()
        found = Seen(number, arrival, hints=hints, max_len=1000, **more)
        found.state, found.preemptions = state, 0
        return found

    assert policy.rank(seen(1, 30), VIEW) == policy.rank(seen(1, 30), VIEW) == (2.0, -34.0)
    assert policy.rank(seen(2, 60), VIEW) < policy.rank(seen(1, 30), VIEW) < policy.rank(seen(3, 20), VIEW)
    assert policy.rank(seen(1, 30, arrival=10.0), VIEW) == (1.0, 10.0)
    assert policy.rank(seen(4, 30, state=State.RUNNING), VIEW) == (0.0, 90.0)
    outgrew = seen(1, 30, num_output=80)
    outgrew.preemptions = 1
    policy.observe(Preempted(0.0, outgrew, "swap"))
    assert policy.rank(outgrew, VIEW) == (2.0, -85.0)
    outgrew.num_output = 81
    assert policy.rank(outgrew, VIEW) == (2.0, -86.0)


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


def _plans(policies, blocks, queues):
    """Who took part in each step of a crowd behind three places; what each says in it is what it says alone."""
    bench = Bench(
        policies=policies,
        meters=(Choice("splitfuse", {"budget": 12}), Choice("seats", {"max_rows": 3}), "kv-blocks"),
        num_blocks=blocks,
    )
    scheduler = bench.engine.scheduler
    assert scheduler.policy._queues
    scheduler.policy._queues = queues
    told, plan = [], scheduler.plan

    def planned(now):
        found = plan(now)
        told.append([] if found is None else [(extend.seq, len(extend.tokens)) for extend in found.extends])
        return found

    scheduler.plan = planned
    draw = random.Random(7)
    for number in range(24):
        hints = Hints(draw.randint(1, 20), draw.random())
        prompt = [draw.randrange(40) for _ in range(draw.randint(1, 20))]
        slo = Slo(ttft_s=draw.uniform(1.0, 30.0))
        bench.add(prompt, draw.randint(1, 12), tenant=f"t{number % 3}", hints=hints, slo=slo)
    bench.run()
    for request in bench.requests.values():
        assert bench.output(request) == bench.truth(request)
    bench.clean()
    return told


@pytest.mark.parametrize("policies", [("shortest-remaining",), ("vtc", "fcfs"), ("edf",), ("slo-class",)])
def test_while_all_places_are_taken_who_waits_need_not_be_ranked(policies):
    assert _plans(policies, 64, queues=True) == _plans(policies, 64, queues=False)
    _plans(policies, 12, queues=True)


def test_nobody_who_waits_is_asked_for_a_rank_while_all_places_are_taken():
    counts = Counts()
    stack = PolicyStack([counts])
    waits, runs = Seen(1), Seen(2)
    waits.state, runs.state = State.WAITING, State.RUNNING
    view = LoadView(0.0, 1, 1, [waits], [runs])
    assert stack.rank(waits, view) < stack.rank(runs, view) and counts.asked == 2
    view.full = True
    assert stack.rank(runs, view) < stack.rank(waits, view) and counts.asked == 3
    assert stack.admit(waits, view) is Verdict.HOLD
    taker = PolicyStack([Counts(preemptive=True)])
    assert taker.rank(waits, view) < taker.rank(runs, view), "it may take the place of one that runs"
    assert taker.admit(waits, view) is Verdict.ADMIT
