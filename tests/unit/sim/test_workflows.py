"""Workflows of calls: how they are read, sent and judged, and options tuned by replaying them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
from sim_bench import STATE, profile, rows, simulate

from millstream.cli.main import main
from millstream.core.errors import BadFile, BadRequest, ConfigError, DownloadError, UnknownName
from millstream.core.registry import Choice
from millstream.sched import profiles
from millstream.sim import data, report, traces, tune, workload
from millstream.sim.scenario import Scenario
from millstream.sim.simulate import Simulation
from millstream.sim.traces import Row
from millstream.sim.workload import Source, calls


def step(name, prompt=10, output=2):
    return {"step": name, "input_length": prompt, "output_length": output}


def write(path, *queries):
    path.write_text("".join(json.dumps({"calls": query}) + "\n" for query in queries))
    return path


CANDIDATE = "generate_candidate_llama-agent"


# -- reading


def test_calls_of_a_step_run_side_by_side_only_where_the_workflow_has_them_so(tmp_path):
    query = [*map(step, ("Information Retriever", "Information Retriever", CANDIDATE, CANDIDATE, "revise", "revise"))]
    query += [*map(step, ("unit_tester", "evaluate", "evaluate", "evaluate", "unit_tester"))]
    found = list(traces._workflows(write(tmp_path / "q.jsonl", query, query[:1])))
    assert [row.wave for row in found] == [0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 7, 0]
    assert len({row.session for row in found}) == 2 and found[-1].at_s == traces.WORKFLOW_GAP_S


@pytest.mark.parametrize(
    "wrong",
    [
        '{"calls": []}',
        '{"steps": []}',
        "[1]",
        "not json",
        json.dumps({"calls": [step("revise", 0)]}),
        json.dumps({"calls": [step("revise", "many")]}),
        json.dumps({"calls": [{"step": "revise", "input_length": 3}]}),
    ],
)
def test_what_is_no_workflow_is_refused_by_its_line(tmp_path, wrong):
    path = write(tmp_path / "q.jsonl", [step("revise")])
    path.write_text(path.read_text() + "\n" + wrong + "\n")
    with pytest.raises(BadFile, match="line 3"):
        list(traces._workflows(path))


def test_the_public_file_becomes_the_lines_that_are_read():
    public = json.dumps([{"Text2SQLRequest": [step("revise")]}] * 70).encode()
    lines = data.SETS["hexgen-financial"].convert(public).decode().splitlines()
    assert len(lines) == 60 and json.loads(lines[0]) == {"calls": [step("revise")]}


def test_the_released_workflows_are_those_that_the_paper_counts():
    try:
        data.find("hexgen-financial", download=False)
        found = traces.load("hexgen-financial")
    except DownloadError:
        pytest.skip("the trace is not on this machine")
    queries = Counter(row.session for row in found)
    assert len(queries) == 60 and len(found) == 964
    candidates = [row for row in found if row.stage == CANDIDATE]
    assert 9000 < sum(row.num_prompt for row in candidates) / len(candidates) < 13000


# -- sending


def two_queries():
    """Four waves and two, each in 10 s."""
    first = [("a", 0), ("b", 1), ("b", 1), ("c", 2), ("a", 3)]
    return [
        *(Row(0.0, 100, 5, session="one", stage=stage, wave=wave) for stage, wave in first),
        *(Row(10.0, 100, 5, session="two", stage=stage, wave=wave) for stage, wave in (("a", 0), ("b", 1))),
    ]


def test_a_wave_waits_for_all_of_the_one_before():
    found = calls([Source(two_queries())], 4096)
    assert [call.after for call in found] == [(), (1,), (1,), (2, 3), (4,), (), (6,)]
    assert [call.thread for call in found[:4]] == [0, 0, 1, 0]
    served = simulate(found, replicas=2).served
    for one in served:
        for before in one.call.after:
            assert one.arrival_s >= served[before - 1].ended_s


def test_only_calls_of_one_step_of_one_query_begin_alike():
    one, two, three, four, five, six, _ = (call.prompt for call in calls([Source(two_queries())], 4096))
    assert two[:90] == three[:90] and two[90] != three[90]
    assert one[:90] == five[:90]
    for other in (two, four, six):
        assert not set(one) & set(other)


def test_queries_come_at_random_with_a_rate_of_queries_and_are_taken_whole():
    made = [Row(0.0, 50, 2, session=f"s{n}", stage="x", wave=wave) for n in range(10) for wave in range(3)]
    found = calls([Source(made, rate=2.0, count=100)], 4096)
    assert len(found) == 102, "34 queries of three calls have a hundred between them"
    heads = [call.at_s for call in found if not call.after]
    assert len(heads) == 34 and heads[-1] == pytest.approx(17, rel=0.05)
    assert len({round(b - a, 6) for a, b in itertools.pairwise(heads)}) > 20
    assert len({call.session for call in found}) == 34, "one that comes again is another one"
    assert {len([call for call in found if call.session == name]) for name in {c.session for c in found}} == {3}
    with pytest.raises(BadRequest, match="requests"):
        calls([Source(made, count=0)], 4096)


def test_workflows_are_shuffled_as_wholes():
    made = two_queries()
    mixed = workload.mixed(made, 3)
    assert Counter(row.session for row in mixed) == Counter(row.session for row in made)
    for name in ("one", "two"):
        waves = [row.wave for row in mixed if row.session == name]
        assert waves == sorted(waves) and len({row.at_s for row in mixed if row.session == name}) == 1


@pytest.mark.parametrize("policy", ["fcfs", "urgency"])
@pytest.mark.parametrize("router", ["round-robin", "hexgen"])
def test_leaps_beside_engines_that_may_end_something_change_nothing(router, policy):
    made = []
    for n in range(12):
        made += [Row(0.0, 40 + 31 * n % 200, 30 + 17 * n % 90, session=f"s{n}", stage="a", wave=0)]
        made += [Row(0.0, 60, 5 + 40 * k % 70, session=f"s{n}", stage="b", wave=1) for k in range(1 + n % 3)]
        made += [Row(0.0, 300, 20, session=f"s{n}", stage="c", wave=2)]
    found = calls([Source(made, rate=3.0)], 4096)
    from millstream.core import registry
    from millstream.sim.replica import EngineSetting

    prints = []
    for leaps in (True, False):
        kinds = [("a", profile()), ("b", profile(max_rows=2)), ("c", profile(step_tokens=32))]
        setting = EngineSetting((Choice(policy),))
        run = Simulation(found, kinds, setting, registry.make("router", router), leaps=leaps).run()
        prints.append((run.fingerprint, run.steps, [round(busy, 6) for busy in run.busy_s]))
    assert prints[0] == prints[1]


# -- judging


def test_a_workflow_is_judged_by_its_last_call():
    result = simulate(calls([Source(two_queries())], 4096))
    one, two = report.workflows(result)
    last = max(served.ended_s for served in result.served if served.call.session == "one")
    assert (one.session, one.calls, one.seconds) == ("one", 5, pytest.approx(last))
    assert two.arrival_s == 10.0 and two.seconds < one.seconds
    between = (one.seconds + two.seconds) / 2
    assert report.attainment(result, {"workflow": between}) == 0.5
    assert report.attainment(result, {"workflow": between, "ttft": 1e-9}) == 0.0
    found = report.found_of(result, ["ttft"], [99], report.parse_slo(f"workflow:{between}"))
    assert found["workflows"] == 2 and found["slo_attainment"] == 0.5 and found["median_workflow_s"] > 0


def test_a_workflow_with_a_call_that_failed_never_ended():
    result = simulate(calls([Source(two_queries())], 4096))
    result.served[-1].finish = "error"
    assert report.workflows(result)[1].seconds == float("inf")
    assert report.attainment(result, {"workflow": 1e9}) == 0.5


# -- tuning


def test_of_values_the_best_is_that_with_the_most_in_time_then_the_lowest_p95():
    found = calls([Source(rows(40))], 4096)
    results = {n: simulate(found, replicas=n) for n in (1, 2, 4)}
    tuned = tune.grid(results.__getitem__, (1, 2, 4), {"ttft": 0.2})
    assert tuned.best.value == 4 and [trial.value for trial in tuned.trials] == [1, 2, 4]
    trials = [tune.Trial("a", 0.9, 1, 5), tune.Trial("b", 0.9, 1, 4), tune.Trial("c", 0.8, 1, 1)]
    assert tune.Tuned(tuple(trials)).best.value == "b"
    with pytest.raises(BadRequest, match="tune"):
        tune.grid(results.__getitem__, (), {})


def test_an_option_of_any_plug_in_or_number_can_be_changed():
    base = Scenario(router=Choice("hexgen"), policies=(Choice("vtc"), Choice("urgency")))
    assert tune.with_option(base, "router.alpha", 0.3).router == Choice("hexgen", {"alpha": 0.3})
    changed = tune.with_option(base, "policy.urgency.patience_s", 5.0)
    assert changed.policies == (Choice("vtc"), Choice("urgency", {"patience_s": 5.0}))
    assert tune.with_option(base, "step_tokens", 256).step_tokens == 256
    assert base.router == Choice("hexgen")


@pytest.mark.parametrize(
    ("option", "value", "error", "said"),
    [
        ("router.alpah", 0.3, ConfigError, "nearest is 'alpha'"),
        ("router.alpha", 3, ConfigError, "alpha"),
        ("policy.patience_s", 3, ConfigError, "policy.urgency.patience_s"),
        ("policy.fcfs.x", 3, UnknownName, "fcfs"),
        ("ruoter.alpha", 3, UnknownName, "router"),
        ("trace", 3, UnknownName, "rate"),
        ("step_tokens", 2.5, ConfigError, "integer"),
        ("rate", "fast", ConfigError, "number"),
        ("meter.budget", 3, ConfigError, "none"),
    ],
)
def test_options_that_there_are_not_are_refused(option, value, error, said):
    base = Scenario(router=Choice("hexgen"), policies=(Choice("vtc"), Choice("urgency")))
    with pytest.raises(error, match=said):
        tune.with_option(base, option, value)


def test_options_are_written_with_their_values():
    assert tune.parse_option("router.alpha=0, 0.5,1") == ("router.alpha", [0, 0.5, 1])
    assert tune.parse_option("router.work=outstanding,cumulative")[1] == ["outstanding", "cumulative"]
    for wrong in ("router.alpha", "=1", "router.alpha=", "router.alpha=1,,2"):
        with pytest.raises(ConfigError, match="no option with values"):
            tune.parse_option(wrong)


def test_a_recent_window_has_whole_workflows_from_second_zero():
    made = [Row(10.0 * n, 50, 2, session=f"s{n}", stage="x", wave=wave) for n in range(10) for wave in range(3)]
    found = calls([Source(made)], 4096)
    window = tune.recent(found, 85.0, 30.0)
    assert {call.session for call in window} == {"s6", "s7", "s8"} and len(window) == 9
    assert min(call.at_s for call in window) == pytest.approx(5.0)
    assert len(simulate(window).served) == 9
    assert tune.lengths(window) == {"x": (50.0, 2.0)}


def test_it_is_tuned_anew_when_the_mix_of_steps_has_shifted_and_not_before():
    (call,) = calls([Source([Row(0.0, 10, 1)])], 4096)
    seen = []
    tuner = tune.Retuner(lambda window: seen.append(tune.mix(one.stage for one in window)) or len(seen), 20, 0.32)
    for n in range(100):
        tuner.ended(replace(call, stage="ab"[n % 2]))
    assert tuner.times == 1 and tuner.value == 1 and seen == [{"a": 0.5, "b": 0.5}]
    shifted = [tuner.ended(replace(call, stage="c")) for _ in range(20)]
    assert shifted.index(True) == 6, "seven of twenty are others"
    assert tuner.value == tuner.times == 1 + sum(shifted)
    assert tune.distance({"a": 1.0}, {"b": 1.0}) == 1 and tune.distance(seen[0], {"a": 0.25, "b": 0.75}) == 0.25
    for wrong in ({"window": 0}, {"shift": 0.0}):
        with pytest.raises(BadRequest, match=next(iter(wrong))):
            tune.Retuner(lambda window: None, **wrong)


def toy_scenario(tmp_path):
    slow = {"coefficients": {name: 5 * value for name, value in STATE["coefficients"].items()}, "residual": 0.0}
    profiles.save(profile(name="slow", state=slow), tmp_path / "slow.json")
    profiles.save(profile(name="fast"), tmp_path / "fast.json")
    path = tmp_path / "trace.csv"
    lines = [f"{n // 3 * 0.2},{30 + n % 7 * 40},{5 + n % 5},s{n // 3}" for n in range(60)]
    path.write_text("arrival_s,prompt_tokens,output_tokens,session\n" + "\n".join(lines) + "\n")
    return [
        "sim",
        "--trace",
        str(path),
        *(arg for kind in ("slow", "fast") for arg in ("--profile", str(tmp_path / f"{kind}.json"))),
    ]


def test_the_command_tunes_an_option_and_says_which_value_is_best(tmp_path, capsys):
    base = [*toy_scenario(tmp_path), "--requests", "60", "--router", "hexgen", "--policy", "urgency", "--e2e", "1"]
    assert main([*base, "--slo", "workflow:0.5", "--tune", "router.alpha=0,0.5,1"]) == 0
    out = capsys.readouterr().out
    assert "router.alpha" in out and "best: router.alpha=" in out and len(out.splitlines()) >= 5
    assert main([*base, "--slo", "workflow:0.5", "--tune", "router.alpha=0,0.5,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [trial["value"] for trial in found["trials"]] == [0, 0.5, 1]
    assert found["best"] in (0, 0.5, 1)
    assert main([*base, "--tune", "router.alpha=0,1"]) != 0, "there is nothing to judge by"
    assert main([*base, "--set", "router.alpha=0,1"]) != 0


def test_the_command_sets_an_option_and_tells_of_workflows(tmp_path, capsys):
    base = [*toy_scenario(tmp_path), "--requests", "60", "--router", "hexgen", "--slo", "workflow:0.5", "--json"]
    prints = set()
    for alpha in ("0", "1"):
        assert main([*base, "--set", f"router.alpha={alpha}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["workflows"] == 20 and found["p95_workflow_s"] > 0
        prints.add(found["fingerprint"])
    assert len(prints) == 2
