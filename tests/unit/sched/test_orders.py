"""The small orders: by true length, by service, by due times, by classes, by a score."""

from __future__ import annotations

import pytest
from harness import Bench

from millstream.core import registry
from millstream.core.registry import Choice
from millstream.core.request import Hints, Slo


def engine(policy, seats=1, **options):
    return Bench(
        policies=(Choice(policy, options), "fcfs"),
        meters=(Choice("splitfuse", {"budget": 64}), Choice("seats", {"max_rows": seats}), "kv-blocks"),
        num_blocks=200,
    )


def order(bench, requests):
    bench.run()
    for request in bench.requests.values():
        assert bench.output(request) == bench.truth(request)
    bench.clean()
    return sorted(range(len(requests)), key=lambda n: bench.chunks[(requests[n].id, 0)][-1].metrics.total_s)


def test_by_true_length_the_shortest_ends_first_and_takes_the_place_of_a_long_one():
    bench = engine("srpt", margin=4)
    long = bench.add([1], 40, hints=Hints(oracle=40))
    bench.step()
    short = bench.add([2], 4, hints=Hints(oracle=4))
    near = bench.add([3], 38, hints=Hints(oracle=38))
    # The long one lost its place to the short one only; of what is left then the near one has a token less.
    assert order(bench, [long, short, near]) == [1, 2, 0]
    assert bench.chunks[(long.id, 0)][-1].metrics.preemptions == 1


def test_by_true_length_without_an_oracle_the_request_is_told_so():
    bench = engine("srpt")
    request = bench.add([1], 4)
    bench.run()
    assert "oracle" in bench.chunks[(request.id, 0)][-1].error


def test_by_levels_a_newcomer_passes_who_was_served_much_and_nobody_knows_lengths():
    bench = engine("mlfq", quantum=4)
    old = bench.add([1], 60)
    for _ in range(30):
        bench.step()
    new = bench.add([2], 5)
    assert order(bench, [old, new]) == [1, 0]
    assert bench.chunks[(new.id, 0)][-1].metrics.ttft_s <= 2


def test_by_levels_one_that_waited_long_rises():
    def took(aging_s):
        bench = engine("mlfq", quantum=2, aging_s=aging_s)
        old = bench.add([1], 20)
        for _ in range(10):
            bench.step()
        for number in range(200):
            bench.add([number % 50], 1)
            bench.step()
            if bench.finish(old) is not None:
                break
        bench.run()
        return bench.chunks[(old.id, 0)][-1].metrics.total_s

    assert took(10.0) < 150 < took(1e6)


def test_by_due_times_the_tighter_wish_goes_first_and_late_ones_may_go_last():
    for late_last, expected in ((False, [0, 1, 2]), (True, [1, 2, 0])):
        bench = engine("edf", late_last=late_last)
        blocker = bench.add([9], 10, slo=Slo(ttft_s=0.5))
        bench.step()
        late = bench.add([1], 3, slo=Slo(ttft_s=1.0))
        soon = bench.add([2], 3, slo=Slo(ttft_s=30.0))
        whole = bench.add([3], 3, slo=Slo(e2e_s=50.0))
        for _ in range(3):
            bench.step()
        bench.run()
        firsts = [bench.first_token_at(one) for one in (late, soon, whole)]
        assert sorted(range(3), key=firsts.__getitem__) == expected
        assert bench.finish(blocker) is not None


def test_by_classes_a_tight_wish_passes_none_and_who_waits_rises():
    bench = engine("slo-class", limits_s=[1.0, 10.0], rise_s=1000.0)
    bench.add([9], 10)
    bench.step()
    none, loose, tight = bench.add([1], 3), bench.add([2], 3, slo=Slo(ttft_s=5)), bench.add([3], 3, slo=Slo(ttft_s=1))
    assert order(bench, [none, loose, tight]) == [2, 1, 0]
    bench = engine("slo-class", limits_s=[1.0], rise_s=10.0)
    patient = bench.add([1], 3)
    for number in range(60):
        bench.add([number % 50], 3, slo=Slo(ttft_s=1))
        bench.step()
    bench.run()
    assert bench.chunks[(patient.id, 0)][-1].metrics.ttft_s < 40


def test_by_score_the_higher_goes_first_and_one_passed_over_too_often_is_raised():
    bench = engine("ltr", margin=0.5)
    running = bench.add([9], 30, hints=Hints(score=0.0))
    bench.step()
    low, high = bench.add([1], 3, hints=Hints(score=-2.0)), bench.add([2], 3, hints=Hints(score=3.0))
    near = bench.add([3], 3, hints=Hints(score=0.4))
    assert order(bench, [low, high, near, running])[0] == 1
    assert bench.first_token_at(high) < bench.first_token_at(near) < bench.first_token_at(low)
    assert bench.chunks[(running.id, 0)][-1].metrics.preemptions == 1, "for a score better by over the margin only"

    def waited(threshold):
        bench = engine("ltr", threshold=threshold, period=5)
        poor = bench.add([1], 4, hints=Hints(score=-5.0))
        for number in range(150):
            bench.add([number % 50], 1, hints=Hints(score=1.0))
            bench.step()
        bench.run()
        return bench.chunks[(poor.id, 0)][-1].metrics.total_s

    assert waited(20) < 80 < waited(0)


def test_without_a_score_an_expected_length_orders_and_without_both_the_average():
    bench = engine("ltr", margin=-1.0, average=100.0)
    bench.add([9], 20)
    bench.step()
    long = bench.add([1], 3, hints=Hints(expected_output_len=300))
    plain = bench.add([2], 3)
    short = bench.add([3], 3, hints=Hints(expected_output_len=20))
    assert order(bench, [long, plain, short]) == [2, 1, 0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("srpt", {"margin": 0}),
        ("mlfq", {"quantum": 0}),
        ("mlfq", {"aging_s": 0}),
        ("edf", {"default_s": 0}),
        ("slo-class", {"limits_s": [2.0, 1.0]}),
        ("slo-class", {"rise_s": 0}),
        ("ltr", {"threshold": -1}),
        ("ltr", {"average": 0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name, bad):
    with pytest.raises(Exception, match=next(iter(bad))):
        registry.make("policy", Choice(name, bad))


def test_a_rank_that_never_changes_is_asked_for_once_and_orders_as_it_would_each_time(monkeypatch):
    plain, asked = registry.get("policy", "fcfs").rank, []
    monkeypatch.setattr(
        registry.get("policy", "fcfs"), "rank", lambda self, *given: asked.append(1) or plain(self, *given)
    )
    ends = []
    for constant in (True, False):
        monkeypatch.setattr(registry.get("policy", "fcfs"), "constant_rank", constant)
        bench = Bench(num_blocks=12, preemption="recompute")
        requests = [bench.add([n, 2, 3], 12) for n in range(6)]
        bench.run()
        if constant:
            assert len(asked) == len(requests) and any(
                bench.chunks[(one.id, 0)][-1].metrics.preemptions for one in requests
            )
        ends.append([bench.chunks[(one.id, 0)][-1].metrics for one in requests])
        bench.clean()
    assert ends[0] == ends[1]
