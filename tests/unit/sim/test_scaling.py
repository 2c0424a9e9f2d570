"""Replicas that come and go in a simulation."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import pytest
from sim_bench import profile, rows, simulate, traffic

from millstream.cli.main import main
from millstream.cluster.protocol import Autoscaler
from millstream.config.load import build
from millstream.core import registry
from millstream.core.errors import BadRequest, ConfigError, UnknownName
from millstream.core.registry import Choice
from millstream.core.request import Slo
from millstream.sched import profiles
from millstream.sim import report
from millstream.sim.arrivals import Bursts, Diurnal, RateCurve
from millstream.sim.scaling import BACKOFF_S
from millstream.sim.scenario import Prepared, Scenario
from millstream.sim.simulate import Failure
from millstream.sim.tandem import Job, tandem
from millstream.sim.traces import Row


class Script(Autoscaler):
    """Wants what it is told to want, look after look; the last one from then on. Keeps what it saw."""

    def __init__(self, *wanted: int, interval_s: float = 1.0) -> None:
        self.interval_s, self.wanted, self.seen = interval_s, list(wanted), []

    def target(self, fleet, now):
        self.seen.append(fleet)
        return self.wanted.pop(0) if len(self.wanted) > 1 else self.wanted[0]


def scaled(found=None, rule=None, **given):
    given = {"cold_start_s": 2.0, "max_replicas": 6, **given}
    return simulate(found or traffic(rows(300, 0.05)), autoscaler=rule or Script(3), **given)


def whole(result) -> bool:
    return all(len(one.times_s) == one.call.num_output and one.finish == "stop" for one in result.served)


def test_a_rule_that_changes_nothing_changes_no_fingerprint() -> None:
    found = traffic(rows())
    plain = simulate(found, replicas=2)
    assert plain.scaling is None
    assert simulate(found, replicas=2, autoscaler=Script(2), max_replicas=2).fingerprint == plain.fingerprint


@pytest.mark.parametrize("leaps", [True, False])
def test_a_scaled_run_is_a_function_of_its_inputs_with_leaps_and_without(leaps) -> None:
    found = traffic(rows(200, 0.03))
    runs = [scaled(found, Script(4, 1, 3, 2), leaps=one) for one in (True, leaps)]
    assert runs[0].fingerprint == runs[1].fingerprint
    assert runs[0].scaling.replica_seconds == runs[1].scaling.replica_seconds


def test_an_added_replica_gets_traffic_when_its_cold_start_is_over_and_not_before() -> None:
    result = scaled(rule=Script(3), cold_start_s=4.0)
    added = [span for span in result.scaling.spans if span.place]
    assert [(span.started_s, span.ready_s) for span in added] == [(1.0, 5.0), (1.0, 5.0)]
    for place in (1, 2):
        own = [one for one in result.served if one.replica == place]
        assert own and min(one.arrival_s for one in own) >= 5.0
    assert whole(result)


def test_cold_starts_cost_time() -> None:
    found = traffic(rows(400, 0.02))
    waits = []
    for cold_start_s in (0.0, 5.0):
        result = scaled(found, Script(4), cold_start_s=cold_start_s)
        waits.append(sum(one.times_s[0] - one.arrival_s for one in result.served))
    assert waits[1] > 1.2 * waits[0]


def test_draining_loses_nothing_and_ends_when_it_is_empty() -> None:
    found = traffic(rows(400, 0.02))
    result = scaled(found, Script(4, 4, 1, 1), replicas=4, router=registry.make("router", "round-robin"))
    assert whole(result) and len(result.served) == len(found) and not any(one.retries for one in result.served)
    drained = [span for span in result.scaling.spans if span.drained_s is not None]
    assert len(drained) == 3
    busy = 0
    for span in drained:
        own = [one for one in result.served if one.replica == span.place]
        assert max(one.arrival_s for one in own) <= span.drained_s, "nothing new"
        assert span.ended_s == pytest.approx(max([one.ended_s for one in own] + [span.drained_s]))
        busy += span.ended_s > span.drained_s
        assert result.replicas[span.place].engine.scheduler.ledger.free() == 400
    assert busy, "some had requests inside when they were told to drain"


def test_what_is_paid_for_is_from_the_begin_of_the_cold_start_to_the_end_of_the_drain() -> None:
    result = scaled(traffic([Row(0.0, 20, 5), Row(10.0, 20, 5)]), Script(2, 2, 2, 1), cold_start_s=1.5)
    log = result.scaling
    # The second from 1 to 4 (it was empty when it was told to go), the first all the time.
    assert log.replica_seconds == pytest.approx(3.0 + log.end_s)
    assert (log.peak, log.reversals, [change[1:] for change in log.changes]) == (2, 1, [(1, 2), (2, 1)])


def test_what_starts_yet_is_what_goes_first() -> None:
    result = scaled(rule=Script(1, 4, 2), cold_start_s=60.0, replicas=1)
    gone = [span for span in result.scaling.spans if span.drained_s is not None]
    assert {span.place for span in gone} == {2, 3}
    assert all(span.ready_s is None and span.ended_s == span.drained_s == 3.0 for span in gone)


def test_whatever_a_rule_wants_the_bounds_hold() -> None:
    rule = Script(100, 0, -5, 100, 1)
    result = scaled(rule=rule, min_replicas=2, max_replicas=4, replicas=2, cold_start_s=0.5)
    assert {look.wanted for look in result.scaling.looks} == {2, 4}
    assert result.scaling.peak <= 8 and whole(result)
    assert all(2 <= seen.size <= 4 for seen in rule.seen)


def test_a_crash_looping_replica_gets_no_traffic_until_a_start_is_well() -> None:
    found = traffic(rows(600, 0.05))
    result = scaled(found, Script(2), cold_start_s=1.0, failures=[Failure(1, 0.0, 0.0, crashes=2)])
    (span,) = [span for span in result.scaling.spans if span.place == 1]
    assert span.failed_starts == 2
    assert span.ready_s == pytest.approx(1.0 + 3 * 1.0 + BACKOFF_S + 2 * BACKOFF_S)
    own = [one for one in result.served if one.replica == 1]
    assert min((one.arrival_s for one in own), default=math.inf) >= span.ready_s
    assert whole(result)


def test_a_replica_that_falls_into_a_crash_loop_gives_up_what_it_has_and_counts_as_starting() -> None:
    found = traffic(rows(600, 0.05))
    rule = Script(2)
    result = scaled(found, rule, replicas=2, cold_start_s=1.0, failures=[Failure(0, 3.0, 1.0, crashes=1)])
    assert any(one.retries for one in result.served) and whole(result)
    until = 3.0 + 1.0 + 2 * 1.0 + BACKOFF_S
    assert not any(one.replica == 0 and 3.0 < one.arrival_s < until for one in result.served)
    assert any(one.replica == 0 and one.arrival_s > until for one in result.served)
    down = [seen for seen in rule.seen if 3.0 < seen.now < until]
    assert down and all((len(seen.members), seen.starting) == (1, 1) for seen in down)
    assert len(result.scaling.spans) == 2, "it is not replaced: it will be back"


def test_a_replica_that_is_lost_while_it_drains_is_gone_and_its_requests_are_not() -> None:
    found = traffic(rows(200, 0.005))
    plain = scaled(found, Script(1), replicas=2)
    (place,) = [span.place for span in plain.scaling.spans if span.drained_s is not None]
    result = scaled(found, Script(1), replicas=2, failures=[Failure(place, 1.01, 5.0)])
    span = result.scaling.spans[place]
    assert span.drained_s == 1.0 and span.ended_s == pytest.approx(1.01) and whole(result)
    assert plain.scaling.spans[place].ended_s > 1.01
    assert any(one.retries for one in result.served)


def test_a_run_without_any_replica_up_waits_for_one() -> None:
    found = traffic(rows(40, 0.2))
    rule = Script(1)
    result = scaled(found, rule, failures=[Failure(0, 1.0, 3.0)], cold_start_s=1.0)
    assert whole(result)
    # What waits for a replica is seen, and for how long.
    assert max(seen.oldest_wait_s for seen in rule.seen if not seen.members) == pytest.approx(2.0, abs=0.3)


def test_a_rule_sees_what_came_ended_and_kept_its_promise() -> None:
    found = traffic(rows(200, 0.05))
    rule = Script(1)
    result = scaled(found, rule, promise=Slo(ttft_s=1e-6))
    assert sum(seen.arrived for seen in rule.seen) == pytest.approx(len(found), abs=25)
    assert all(0 <= seen.busy <= 1 and 0 <= seen.kv <= 1 for seen in rule.seen)
    assert {seen.attainment for seen in rule.seen if seen.ended} == {0.0}
    busy = sum(seen.busy * seen.interval_s for seen in rule.seen)
    assert busy == pytest.approx(result.busy_s[0], rel=0.1)
    kind = Script(1)
    scaled(found, kind, promise=Slo(ttft_s=1e6))
    assert {seen.attainment for seen in kind.seen if seen.ended} == {1.0}
    blind = Script(1)
    scaled(found, blind)
    assert {seen.attainment for seen in blind.seen} == {None}


@pytest.mark.parametrize("name", ["hpa", "slo", "predictive"])
def test_rules_follow_a_load_that_rises_and_falls(name) -> None:
    found = traffic([*rows(100, 0.2), *(Row(20 + 0.01 * i, 100, 20) for i in range(1500)), Row(80.0, 20, 5)])
    options = {"interval_s": 1.0, "down_window_s": 10.0, "up_period_s": 1.0}
    if name == "hpa":
        options |= {"metric": "inside", "target": 4.0}
    result = scaled(found, registry.make("autoscaler", Choice(name, options)), promise=Slo(ttft_s=1.0))
    wanted = [look.wanted for look in result.scaling.looks]
    assert whole(result) and wanted[0] == 1 and max(wanted) >= 3 and wanted[-1] == 1


def test_a_sawtooth_flaps_without_a_stabilization_window() -> None:
    teeth = [Row(20 * tooth + 0.01 * i, 100, 20) for tooth in range(4) for i in range(800)]
    counts = []
    for window_s in (0.0, 300.0):
        options = {"metric": "inside", "target": 4.0, "interval_s": 1.0, "down_window_s": window_s}
        counts.append(len(scaled(traffic(teeth), registry.make("autoscaler", Choice("hpa", options))).scaling.changes))
    assert counts[0] >= 2 * counts[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cold_start_s": -1.0}, "cold_start_s"),
        ({"min_replicas": 0}, "min_replicas"),
        ({"min_replicas": 4, "max_replicas": 2}, "max_replicas"),
        ({"replicas": 7}, "replicas"),
        ({"failures": [Failure(-1, 0.0, 1.0)]}, "failure"),
        ({"failures": [Failure(0, 0.0, 1.0, -1)]}, "crashes"),
    ],
)
def test_what_cannot_be_scaled_is_told(given, said) -> None:
    with pytest.raises(BadRequest) as error:
        scaled(**given)
    assert error.value.param == said


def test_crash_loops_need_an_autoscaler() -> None:
    with pytest.raises(BadRequest, match="with an autoscaler"):
        simulate(traffic(rows(5)), failures=[Failure(0, 0.0, 1.0, crashes=1)])


# -- days and bursts


def test_the_rate_of_a_day_has_its_mean_and_its_extremes() -> None:
    day = Diurnal(1000.0, 0.2)
    levels = [day.level(second) for second in range(1000)]
    assert sum(levels) / 1000 == pytest.approx(1.0, rel=1e-3)
    assert (min(levels), max(levels)) == (levels[0], levels[500]) and max(levels) == day.most
    assert levels[0] / levels[500] == pytest.approx(0.2)
    assert day.level(1250.0) == pytest.approx(day.level(250.0))


def test_a_day_of_points_goes_in_lines_and_back_to_its_begin() -> None:
    day = Diurnal(100.0, points=((0.0, 0.0), (0.5, 2.0)))
    assert [day.level(at) for at in (0.0, 25.0, 50.0, 75.0)] == pytest.approx([0.0, 1.0, 2.0, 1.0])
    late = Diurnal(100.0, points=((0.25, 1.0), (0.75, 3.0)))
    assert [late.level(at) for at in (0.0, 25.0, 75.0)] == pytest.approx([1.0, 0.5, 1.5])


def test_arrivals_come_at_the_rate_of_the_hour() -> None:
    curve = RateCurve(20.0, Diurnal(400.0, 0.25), seed=3)
    times = list(itertools.takewhile(lambda at: at < 4000.0, curve.arrivals()))
    assert times == sorted(times) and len(times) == pytest.approx(20.0 * 4000, rel=0.02)
    for quarter in range(4):
        begin, end = 100.0 * quarter, 100.0 * (quarter + 1)
        got = sum(begin <= at % 400.0 < end for at in times) / 1000.0
        meant = sum(curve.at(begin + second) for second in range(100)) / 100
        assert got == pytest.approx(meant, rel=0.06)


def test_bursts_last_and_multiply_as_they_are_told_and_come_at_random() -> None:
    curve = RateCurve(5.0, bursts=Bursts(200.0, 40.0, 3.0), seed=7)
    rates = [curve.at(float(second)) for second in range(20000)]
    assert set(rates) == {5.0, 15.0} and max(rates) == curve.most
    runs = [len(list(group)) for rate, group in itertools.groupby(rates) if rate == 15.0]
    # Two may follow each other at once.
    assert statistics.median(runs) == pytest.approx(40, abs=1) and min(runs) >= 39
    assert sum(runs) / len(rates) == pytest.approx(40 / 200, rel=0.15)
    gaps = [len(list(group)) for rate, group in itertools.groupby(rates) if rate == 5.0]
    assert min(gaps) < 60 and max(gaps) > 300


def test_a_curve_is_a_function_of_its_seed_and_bursts_do_not_depend_on_the_rate() -> None:
    def first(seed, mean=4.0):
        curve = RateCurve(mean, Diurnal(100.0), Bursts(50.0, 5.0), seed)
        return list(itertools.islice(curve.arrivals(), 200)), [curve.at(at / 2) / mean for at in range(400)]

    assert first(1) == first(1) and first(1)[0] != first(2)[0]
    assert first(1)[1] == pytest.approx(first(1, 40.0)[1])


def test_what_an_oracle_is_told_is_never_below_what_comes() -> None:
    curve = RateCurve(4.0, Diurnal(300.0), Bursts(100.0, 20.0), 5)
    times, rates = curve.sampled(300.0, 10.0)
    assert len(times) == 30
    assert all(curve.at(at / 4) <= rates[int(at / 4 / 10)] * 1.02 for at in range(1200) if at % 40)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Diurnal(0.0), "diurnal"),
        (lambda: Diurnal(10.0, 1.5), "diurnal"),
        (lambda: Diurnal(10.0, points=((0.5, 1.0), (0.2, 1.0))), "points"),
        (lambda: Diurnal(10.0, points=((0.0, 0.0),)), "points"),
        (lambda: Bursts(10.0, 20.0), "bursts"),
        (lambda: Bursts(10.0, 5.0, 0.0), "bursts"),
        (lambda: RateCurve(0.0), "rate"),
    ],
)
def test_impossible_days_are_told(make, param) -> None:
    with pytest.raises(BadRequest) as error:
        make()
    assert error.value.param == param


# -- scenarios and the command line


def test_a_scenario_has_all_of_it() -> None:
    tree = {
        "rate": 3.0,
        "requests": 300,
        "profiles": ["vidur-a100-llama3-8b-tp1"],
        "diurnal": {"period_s": 60, "points": [[0, 1], [0.5, 3]]},
        "bursts": {"every_s": 30, "for_s": 5},
        "autoscaler": {"name": "hpa", "metric": "busy", "interval_s": 5.0},
        "cold_start_s": 5.0,
        "max_replicas": 3,
        "failures": [{"replica": 1, "at_s": 0.0, "for_s": 1.0, "crashes": 1}],
    }
    scenario = build(Scenario, tree)
    assert scenario.autoscaler == Choice("hpa", {"metric": "busy", "interval_s": 5.0})
    assert scenario.diurnal.points == ((0, 1), (0.5, 3))


@pytest.mark.parametrize(
    ("tree", "kind", "said"),
    [
        ({"autoscaler": "hpb"}, UnknownName, "the nearest is 'hpa'"),
        ({"autoscaler": {"name": "hpa", "target": -1}}, ConfigError, "target is above 0"),
        ({"min_replicas": 3, "max_replicas": 2}, ConfigError, "from 1 to max_replicas (2)"),
        ({"cold_start_s": -2.0}, ConfigError, "cold_start_s"),
        ({"autoscaler": "hpa", "profiles": ["a", "b"], "replicas": [1, 1]}, ConfigError, "one where an autoscaler"),
        ({"diurnal": {"period_s": -1.0}}, BadRequest, "a period above 0"),
        ({"diurnal": {"period_s": 5.0, "points": [[0.1]]}}, BadRequest, "pairs"),
        ({"bursts": {"every_s": 10.0}}, BadRequest, "below the 10 between bursts"),
    ],
)
def test_bad_scenarios_are_told(tree, kind, said) -> None:
    with pytest.raises(kind) as error:
        build(Scenario, tree)
    assert said in str(error.value)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(
            json.dumps({"timestamp": 1000 * i, "input_length": 200 + i, "output_length": 20}) + "\n" for i in range(50)
        )
    )
    return path


@pytest.fixture
def kind(tmp_path) -> str:
    """A profile that needs no data set."""
    return str(profiles.save(profile(), tmp_path / "toy.json"))


def test_the_command_line_scales_and_draws(trace, kind, tmp_path, capsys) -> None:
    plot = tmp_path / "replicas.svg"
    flags = [
        "--profile",
        kind,
        "--autoscaler",
        "hpa",
        "--cold-start",
        "5",
        "--min-replicas",
        "1",
        "--max-replicas",
        "4",
        "--json",
    ]
    flags += ["--diurnal", "120,0.1", "--bursts", "60,10,4", "--rate", "20", "--requests", "800", "--slo", "ttft:1"]
    assert main(["sim", "--trace", str(trace), *flags, "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["replica_seconds"] > 0 and found["peak_replicas"] <= 4 and plot.read_text().startswith("<?xml")
    assert main(["sim", "--trace", str(trace), *flags]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fingerprint"] == found["fingerprint"] and again["scale_changes"] == found["scale_changes"]


def test_the_command_line_tells_what_it_does_not_understand(trace, capsys) -> None:
    for flags, said in (
        (["--autoscaler", "hbt"], "there is no autoscaler 'hbt'"),
        (["--diurnal", "x"], "--diurnal x: up to 2 numbers"),
        (["--bursts", "1,2,3,4"], "--bursts 1,2,3,4: up to 3 numbers"),
        (["--min-replicas", "9", "--autoscaler", "hpa"], "min_replicas: got 9"),
    ):
        assert main(["sim", "--trace", str(trace), *flags]) != 0
        assert said in capsys.readouterr().err


def test_reports_have_replicas_only_where_somebody_scaled(trace, kind) -> None:
    plain = Prepared(Scenario(trace=str(trace), profiles=(kind,), requests=20)).run()
    assert "replica_seconds" not in report.found_of(plain, (), (), {})
    scaled_run = Scenario(
        trace=str(trace), profiles=(kind,), requests=20, autoscaler=Choice("static", {"n": 2}), replicas=(2,)
    )
    found = report.found_of(Prepared(scaled_run).run(), (), (), {})
    assert found["mean_replicas"] == pytest.approx(2.0) and found["scale_changes"] == 0


# -- groups of layers


def test_a_tandem_passes_each_step_through_all_stages() -> None:
    passed = tandem([Job(1.0, (4.0, 2.0, 2.0))], (0.75, 0.25), (1, 1))
    assert passed.first_s == [5.0] and passed.ended_s == [9.0]
    assert passed.worked_s == pytest.approx([6.0, 2.0])


def test_more_servers_help_at_the_slow_stage_and_not_at_the_fast_one() -> None:
    jobs = [Job(0.8 * i, (1.0,)) for i in range(100)]

    def end(servers):
        return max(tandem(jobs, (0.9, 0.1), servers).ended_s)

    assert end((1, 2)) == pytest.approx(end((1, 1)))
    assert end((2, 1)) < 0.95 * end((1, 1))


def test_a_rule_at_each_stage_grows_the_slow_one_and_shrinks_it_again() -> None:
    jobs = [Job(0.5 * i, (1.0,)) for i in range(200)] + [Job(1000.0 + 10 * i, (1.0,)) for i in range(5)]
    options = {"metric": "busy", "target": 0.7, "down_window_s": 60.0}

    def servers(found):
        rules = [registry.make("autoscaler", Choice("hpa", options)) for _ in range(2)]
        passed = tandem(found, (0.9, 0.1), (1, 1), rules, cold_start_s=5.0)
        assert len(passed.ended_s) == len(found) and min(passed.ended_s) > 0
        return passed.servers

    assert servers(jobs[:200])[0] >= 2 and servers(jobs[:200])[1] == 1
    assert servers(jobs) == [1, 1]


@pytest.mark.parametrize(
    "given",
    [((0.5, 0.6), (1, 1)), ((0.5, 0.5), (1,)), ((0.5, 0.5), (0, 1)), ((0.5, 0.5), (9, 1))],
)
def test_impossible_stages_are_told(given) -> None:
    with pytest.raises(BadRequest):
        tandem([Job(0.0, (1.0,))], *given)
    with pytest.raises(BadRequest):
        tandem([Job(0.0, ())], (1.0,), (1,))
