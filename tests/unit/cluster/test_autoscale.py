"""Rules for the number of replicas."""

from __future__ import annotations

import pytest

from millstream.cluster.fleet import Fleet
from millstream.cluster.protocol import Done, FleetView, Member
from millstream.cluster.scaling import Behavior, Capacity, Stabilizer
from millstream.core import registry
from millstream.core.errors import ConfigError, MillstreamError
from millstream.core.registry import Choice
from millstream.core.request import Request, Tokens

RULES = registry.names("autoscaler")


def rule(name, **options):
    return registry.make("autoscaler", Choice(name, options))


def view(now=0.0, ready=1, waiting=0, running=0, busy=0.0, attainment=None, starting=0, oldest=0.0, **more):
    members = [Member(place, f"engine {place}") for place in range(ready)]
    return FleetView(now, members, waiting, running, oldest, busy, attainment, starting, **more)


def wanted(one, found):
    return one.target(found, found.now)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_answers_any_view_with_a_number_and_has_a_pace(name):
    one = rule(name)
    assert one.interval_s > 0
    for step, ready in enumerate((0, 1, 3, 1)):
        found = view(15.0 * step, ready, 5 * step, 3, 0.5, 0.9, step % 2, 1.0, arrived=10, ended=9, interval_s=15.0)
        got = wanted(one, found)
        assert isinstance(got, int) and got >= 0


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_function_of_the_views_that_it_was_shown(name):
    def run():
        one = rule(name)
        return [
            wanted(one, view(15.0 * step, 2, step % 7, 4, 0.6, 1.0, arrived=30 + step, ended=30, interval_s=15.0))
            for step in range(40)
        ]

    assert run() == run()


def test_hpa_takes_as_many_as_bring_the_metric_to_its_target():
    assert wanted(rule("hpa", metric="busy", target=0.5), view(ready=4, busy=0.8)) == 7  # ceil(4 * 1.6)
    assert wanted(rule("hpa", metric="queue", target=2.0), view(ready=2, waiting=9)) == 5  # ceil(9 / 2)
    assert wanted(rule("hpa", metric="inside", target=4.0), view(ready=2, waiting=2, running=10)) == 3
    assert wanted(rule("hpa", metric="kv", target=0.5), view(ready=2, kv=0.75)) == 3


def test_of_several_metrics_the_one_that_wants_the_most_decides():
    one = rule("hpa", metric="kv", target=0.5, also={"queue": 2.0, "busy": 0.8})
    assert wanted(one, view(0.0, ready=2, kv=0.75, waiting=2, busy=0.8)) == 3
    assert wanted(one, view(400.0, ready=2, kv=0.75, waiting=9, busy=0.8)) == 5
    # One that is within its tolerance wants what there is, however little the others want.
    assert wanted(one, view(800.0, ready=4, kv=0.1, waiting=0, busy=0.8)) == 4


def test_hpa_lets_be_what_is_within_its_tolerance():
    one = rule("hpa", metric="inside", target=10.0)
    assert wanted(one, view(ready=1, running=11)) == 1
    assert wanted(one, view(1.0, ready=1, running=12)) == 2
    assert wanted(rule("hpa", metric="busy", target=0.5, down_window_s=0.0), view(ready=10, busy=0.455)) == 10
    assert wanted(rule("hpa", metric="busy", target=0.5, down_window_s=0.0), view(ready=10, busy=0.4)) == 8


def test_hpa_does_not_order_twice_what_starts_yet():
    one = rule("hpa", metric="inside", target=4.0)
    assert wanted(one, view(0.0, ready=1, running=8)) == 2
    assert wanted(one, view(15.0, ready=1, running=8, starting=1)) == 2
    assert wanted(one, view(30.0, ready=1, running=12, starting=1)) == 3


def test_hpa_leaves_all_as_it_is_where_nobody_is_ready_to_tell_a_metric():
    assert wanted(rule("hpa"), view(ready=0, waiting=50, starting=2)) == 2


def test_scale_up_is_at_most_double_or_four_more_in_a_period():
    hold = Stabilizer(Behavior())
    assert hold.settle(1, 100, 0.0) == 5
    assert hold.settle(5, 100, 7.0) == 5, "of the number at the begin of the period"
    assert hold.settle(5, 100, 15.0) == 10
    assert hold.settle(10, 100, 30.0) == 20


def test_scale_down_waits_for_the_most_that_was_recommended_in_the_window():
    hold = Stabilizer(Behavior())
    assert hold.settle(6, 6, 0.0) == 6
    assert hold.settle(6, 2, 15.0) == 6
    assert hold.settle(6, 4, 150.0) == 6
    assert hold.settle(6, 1, 300.0) == 6, "the window holds what is just as old as it is long"
    assert hold.settle(6, 1, 301.0) == 4
    assert hold.settle(4, 1, 451.0) == 1
    assert Stabilizer(Behavior(down_window_s=0.0)).settle(6, 1, 0.0) == 1


def test_a_sawtooth_flaps_without_a_window_and_does_not_with_one():
    def changes(window_s):
        one, size, count = rule("hpa", metric="inside", target=2.0, down_window_s=window_s), 1, 0
        for step in range(80):
            load = 8 if step % 8 < 4 else 1
            got = max(1, wanted(one, view(15.0 * step, size, running=load)))
            count += got != size
            size = got
        return count

    assert changes(300.0) <= 2
    assert changes(0.0) >= 18


def test_static_is_always_the_same():
    assert {wanted(rule("static", n=3), view(float(now), ready=now + 1, waiting=now)) for now in range(5)} == {3}


def test_slo_learns_what_a_replica_can_do_and_takes_enough_for_what_comes():
    one = rule("slo", ttft_s=1.0, use=1.0, down_window_s=0.0)
    got = [
        wanted(one, view(15.0 * step, 4, busy=0.5, arrived=60, ended=60, interval_s=15.0, attainment=1.0))
        for step in range(1, 9)
    ]
    # 4 requests a second; one replica ends 2 in a second of work.
    assert got[-1] == 2


def test_slo_works_off_what_waits_too_long_and_adds_one_where_promises_are_broken():
    def late(**changes):
        one = rule("slo", ttft_s=2.0, use=1.0, capacity=1.0)
        return wanted(one, view(15.0, 2, arrived=30, ended=30, interval_s=15.0, **changes))

    assert late() == 2
    assert late(waiting=8, oldest=5.0) == 6
    assert late(attainment=0.5) == 3
    assert late(attainment=0.5, starting=1) == 3, "one is on its way"


def test_slo_waits_until_what_it_added_can_have_helped():
    one = rule("slo", ttft_s=2.0, use=1.0, capacity=1.0, patience_s=60.0)
    size, got = 1, []
    for step in range(1, 9):
        size = wanted(one, view(15.0 * step, size, arrived=15, ended=15, interval_s=15.0, attainment=0.5))
        got.append(size)
    assert got == [2, 2, 2, 2, 3, 3, 3, 3]


def test_a_forecast_sees_a_ramp_one_start_ahead():
    def at_the_end(**options):
        one = rule("predictive", capacity=1.0, use=1.0, up_count=100, **options)
        for step in range(1, 9):
            got = wanted(one, view(15.0 * step, 1, arrived=15 * step, ended=0, interval_s=15.0))
        return got

    # 8 requests a second in the last interval, one more each interval.
    assert at_the_end(cold_start_s=60.0) > at_the_end(cold_start_s=0.0) > 8


def test_a_forecast_knows_the_hour_once_it_has_seen_a_day():
    one = rule("predictive", capacity=1.0, use=1.0, period_s=150.0, cold_start_s=15.0, down_window_s=0.0, up_count=99)
    counts = [15, 15, 15, 15, 150, 150, 15, 15, 15, 15]
    got = {}
    for step in range(1, 36):
        now, came = 15.0 * step, counts[(step - 1) % 10]
        got[step] = wanted(one, view(now, 2, arrived=came, ended=0, interval_s=15.0))
    assert got[33] >= 9, "ten times as much is about to come, as on the days before"
    assert got[31] <= 3


def test_an_oracle_is_ready_when_it_must_be_and_not_before():
    one = rule("oracle", times=(0.0, 100.0, 200.0), rates=(1.0, 5.0, 1.0), capacity=1.0, cold_start_s=20.0)
    assert [one.target(view(now), now) for now in (0.0, 60.0, 75.0, 150.0, 200.0)] == [1, 1, 5, 5, 1]


def test_capacity_is_the_most_that_was_seen_and_is_forgotten_in_time():
    one = Capacity(half_life_s=100.0)
    assert one.rate is None
    one.see(view(10.0, 2, busy=0.5, ended=20, interval_s=10.0))
    assert one.rate == pytest.approx(2.0)
    one.see(view(20.0, 2, busy=1.0, ended=5, interval_s=10.0))
    assert one.rate == pytest.approx(2.0 * 0.5**0.1)
    assert Capacity(3.0).rate == 3.0


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("static", {"n": 0}, "n is 1 or more"),
        ("hpa", {"metric": "cpu"}, "metric is one of busy, queue, inside, kv"),
        ("hpa", {"target": 0}, "target is above 0"),
        ("hpa", {"also": {"gpu": 0.5}}, "metric is one of busy, queue, inside, kv"),
        ("hpa", {"also": {"queue": 0.0}}, "target is above 0"),
        ("hpa", {"tolerance": -1}, "tolerance is 0 or more"),
        ("hpa", {"down_window_s": -1.0}, "down_window_s"),
        ("hpa", {"up_share": 0.0, "up_count": 0}, "nothing could ever be added"),
        ("hpa", {"metrik": "busy"}, "the nearest is 'metric'"),
        ("slo", {"goal": 1.5}, "goal and use"),
        ("slo", {"ttft_s": 0.0}, "ttft_s is above 0"),
        ("predictive", {"period_s": 10.0}, "4 intervals or more"),
        ("predictive", {"cold_start_s": -1.0}, "cold_start_s 0 or more"),
        ("oracle", {"times": (5.0, 0.0), "rates": (1.0, 1.0)}, "in order"),
        ("oracle", {"capacity": 0.0}, "capacity and interval_s are above 0"),
    ],
)
def test_bad_options_are_told(name, options, said):
    with pytest.raises(ConfigError, match=name) as error:
        rule(name, **options)
    assert said in str(error.value)


def test_who_drains_gets_nothing_more_and_leaves_when_it_is_empty():
    fleet = Fleet(registry.make("router", "least-work"))
    for number in range(2):
        fleet.add(f"engine {number}")
    for number in range(4):
        fleet.send(Request(number, (Tokens((1, 2, 3)),)), 0.0)
    assert [member.requests for member in fleet.members] == [2, 2]
    assert not fleet.drain(0)
    with pytest.raises(MillstreamError, match="engine 0 cannot leave: 2 requests are inside"):
        fleet.leave(0)
    for number in range(4, 8):
        assert fleet.send(Request(number, (Tokens((1, 2, 3)),)), 1.0)[1] == 1
    for number in fleet.inside(0):
        fleet.ended(number, Done(1), 2.0)
    fleet.leave(0)
    assert fleet.add("engine 2").place == 2, "places are never used again"
    assert [member.place for member in fleet.up] == [1, 2]
