"""The order of budgets: least time to spare first."""

from __future__ import annotations

import itertools

import pytest
from harness import Bench

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Slo, Tokens
from millstream.core.sequence import Sequence, Stamps, State
from millstream.sched.protocol import LoadView


def sequence(number, arrival=0.0, budget=None, expected=None, state=State.WAITING):
    request = Request(
        number,
        (Tokens((1, 2, 3)),),
        SamplingParams(max_tokens=4),
        arrival=arrival,
        slo=Slo(e2e_s=budget),
        hints=Hints(expected_s=expected),
    )
    method = registry.make("decode", "autoregressive")
    choice = Choice("autoregressive")
    seq = Sequence(number, request, 0, [1, 2, 3], 3, 7, 0, frozenset(), choice, method, Stamps(arrival))
    seq.state = state
    return seq


def order(seqs, now=10.0, **options):
    policy = registry.make("policy", Choice("urgency", options))
    view = LoadView(now, 10, 10, [], [])
    return [seq.id for seq in sorted(seqs, key=lambda seq: policy.rank(seq.view, view))]


def urgency(seq, now):
    """The paper's formula."""
    return seq.view.hints.expected_s - (seq.view.slo.e2e_s - (now - seq.view.arrival))


def test_the_order_is_that_of_the_papers_urgency_at_any_time():
    seqs = [sequence(n, 0.7 * n % 5, 1 + 3.3 * n % 7, 0.4 * n % 2) for n in range(1, 40)]
    for now in (5.0, 50.0):
        urgencies = [urgency(seqs[number - 1], now) for number in order(seqs, now)]
        assert all(before >= after - 1e-9 for before, after in itertools.pairwise(urgencies))


def test_a_long_call_goes_before_a_short_one_with_the_same_budget():
    assert order([sequence(1, 0.0, 10.0, 1.0), sequence(2, 0.1, 10.0, 8.0)]) == [2, 1]


def test_what_runs_keeps_its_place():
    assert order([sequence(1, 0.0, 0.1, 5.0), sequence(2, 9.0, 100.0, 1.0, State.RUNNING)]) == [2, 1]


def test_without_budgets_it_is_first_come_first_served():
    seqs = [sequence(n, (7 * n) % 11 / 2, None, float(n)) for n in range(11)]
    assert order(seqs) == [seq.id for seq in sorted(seqs, key=lambda seq: seq.view.arrival)]

    def finished(policy):
        bench = Bench(policies=(policy,), num_blocks=8)
        for n in range(12):
            bench.add([n] * (1 + n % 5), 2 + n % 6)
            bench.step()
        bench.run()
        return [bench.first_token_at(request) for request in bench.requests.values()]

    assert finished("urgency") == finished("fcfs")


def test_a_budget_counts_for_so_much_and_no_more():
    patient, urgent = sequence(1, 0.0, 1e6, 0.0), sequence(2, 25.0, 0.001, 50.0)
    assert order([patient, urgent], 30.0, patience_s=10.0) == [1, 2]
    assert order([patient, urgent], 30.0, patience_s=100.0) == [2, 1]


def test_nobody_starves_beside_newcomers_that_are_late_already():
    bench = Bench(policies=(Choice("urgency", {"patience_s": 20.0}),), num_blocks=24)
    patient = bench.add(range(12), 6, slo=Slo(e2e_s=1e6))
    for n in range(120):
        bench.add([n % 50, 3, 4], 3, slo=Slo(e2e_s=1e-6), hints=Hints(expected_s=1e6))
        bench.step()
        if bench.chunks.get((patient.id, 0)):
            break
    assert n < 90, "it waits at most twice its patience, and for those before it"
    bench.run()


def test_wrong_patience_is_refused():
    for wrong in (0, -1.0, "long", True):
        with pytest.raises(ConfigError, match="patience_s"):
            registry.make("policy", Choice("urgency", {"patience_s": wrong}))
