"""Tables, SLOs, fairness, capacity, plans and pictures of simulations."""

from __future__ import annotations

import itertools
import json

import pytest
from sim_bench import profile, rows, simulate, traffic

from millstream.cli.main import main
from millstream.cli.plan import smallest
from millstream.core.errors import BadFile, BadRequest, UnknownName
from millstream.sched import profiles
from millstream.sim import report
from millstream.sim.metrics import lines


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A profile in a cache folder of this test's, and a trace in a file."""
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    path = profiles.save(profile(), tmp_path / "toy.json")
    trace = tmp_path / "trace.csv"
    body = "".join(f"{row.at_s},{row.num_prompt},{row.num_output},{'ab'[i % 2]}\n" for i, row in enumerate(rows(40)))
    trace.write_text("arrival_s,prompt_tokens,output_tokens,tenant\n" + body)
    return ["--profile", str(path), "--trace", str(trace), "--requests", "40"]


def test_the_table_has_the_numbers_of_the_run() -> None:
    result = simulate(traffic(rows()))
    found = report.found_of(result, ("ttft", "tpot", "itl"), [50, 99], {"ttft": 1.0})
    assert found["completed"] == 60 and found["failed"] == 0
    assert found["total_output_tokens"] == sum(one.call.num_output for one in result.served)
    ttft = sorted(one.times_s[0] - one.arrival_s for one in result.served)
    assert found["mean_ttft_ms"] == pytest.approx(1000 * sum(ttft) / 60)
    assert found["slo_attainment"] == pytest.approx(sum(one <= 1.0 for one in ttft) / 60)
    text = "\n".join(lines(found, ("ttft", "tpot"), [99], None, 20.0))
    assert "Successful requests:                     60" in text and "P99 TTFT (ms):" in text
    with pytest.raises(BadRequest, match="metrics"):
        report.found_of(result, ("speed",), [99], {})


def test_limits_are_read_and_wrong_ones_told() -> None:
    assert report.parse_slo("ttft:0.5, tpot:0.05") == {"ttft": 0.5, "tpot": 0.05}
    for wrong in ("ttft", "ttft:x", "ttft:-1", "itl:1"):
        with pytest.raises(BadRequest, match="slo"):
            report.parse_slo(wrong)


def test_fairness() -> None:
    assert report.jain([1, 1, 1]) == 1 and report.jain([1, 0, 0, 0]) == 0.25 and report.jain([]) == 1


@pytest.mark.parametrize("step", [1.1, 2.0])
@pytest.mark.parametrize("low", [0.3, 5.0, 70.0])
def test_the_largest_value_is_found_from_below_and_from_above(low: float, step: float) -> None:
    asked: list[float] = []

    def keeps(value: float) -> bool:
        asked.append(value)
        return value <= 5.0

    assert 5.0 / 1.03 <= report.largest(keeps, low, step=step) <= 5.0
    assert max(asked) <= max(low, 5.0 * step), "nothing far beyond it is tried"


def test_capacity_is_the_largest_rate_that_holds() -> None:
    asked = []

    def run(rate: float):
        asked.append(rate)
        return simulate(traffic(rows(60), rate=rate))

    slo = {"ttft": 0.3}
    found = report.capacity(run, slo, 0.9, 1.0)
    assert report.attainment(run(found), slo) >= 0.9 > report.attainment(run(found * 1.1), slo)
    assert report.capacity(run, slo, 0.9, 64.0) == pytest.approx(found, rel=0.05)
    assert report.capacity(run, {"ttft": 1e-6}, 0.9, 1.0) == 0.0


def test_the_fewest_replicas() -> None:
    assert smallest(lambda count: min(1.0, count / 11), 0.99, 64) == (11, 1.0)
    assert smallest(lambda count: 1.0, 0.99, 64) == (1, 1.0)
    assert smallest(lambda count: count / 1000, 0.99, 64) == (None, 0.064)


def test_a_trace_to_look_at() -> None:
    result = simulate(traffic(rows(10)), keep_steps=True)
    told = report.chrome_trace(result)["traceEvents"]
    steps = [event for event in told if event["ph"] == "X"]
    assert len(steps) == result.steps and {event["name"] for event in steps} <= {"prefill", "decode", "mixed"}
    for one, other in itertools.pairwise(steps):
        assert one["ts"] + one["dur"] <= other["ts"] + 1e-3, "steps of one engine do not overlap"
    json.dumps(told)


def test_the_command(own, capsys, tmp_path) -> None:
    assert main(["sim", *own, "--slo", "ttft:0.5", "--chrome", str(tmp_path / "t.json")]) == 0
    said = capsys.readouterr().out
    assert "Successful requests:                     40" in said and "SLO attainment" in said
    assert "Jain's index of service" in said and "fingerprint" in said
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert main(["sim", *own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 40 and {row["tenant"] for row in found["tenants"]} == {"a", "b"}
    assert main(["sim", *own, "--rates", "5,50", "--slo", "ttft:0.5"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3
    assert main(["sim", *own, "--find-capacity", "--slo", "ttft:0.5"]) == 0
    assert "99 % of requests within ttft:0.5" in capsys.readouterr().out
    assert main(["sim", *own, "--find-step-time", "--slo", "tpot:0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] > 0
    stacks = ["--compare", "fcfs", "--compare", "vtc,fcfs", "--compare", "srpt"]
    assert main(["sim", *own, *stacks, "--slo", "ttft:0.5", "--plot", str(tmp_path / "all.svg"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["fcfs", "vtc,fcfs", "srpt"] and (tmp_path / "all.svg").is_file()
    assert all(0 < row["token_mean_s"] <= row["token_p99_s"] and 0 <= row["within"] <= 1 for row in rows)
    assert main(["sim", "--list"]) == 0
    assert "azure-code" in capsys.readouterr().out


def test_a_scenario_in_a_file(own, capsys, tmp_path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(
        f'trace = "{own[3]}"\nprofiles = ["{own[1]}"]\nreplicas = 2\nrequests = 30\npolicies = ["vtc"]\n'
        '[[tenants]]\nname = "x"\nrate = 20.0\n[[tenants]]\nname = "y"\nrate = 5.0\n'
        "[[failures]]\nreplica = 0\nat_s = 0.5\nfor_s = 1.0\n"
    )
    assert main(["sim", "--config", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 60 and [row["tenant"] for row in found["tenants"]] == ["x", "y"]
    assert len(found["busy"]) == 2
    file.write_text('tracee = "x"\n')
    assert main(["sim", "--config", str(file)]) == 1
    assert "tracee" in capsys.readouterr().err


def test_a_plan(own, capsys) -> None:
    kind = f"{own[1]}=3"
    assert main(["plan", *own[2:], "--rate", "300", "--slo", "ttft:0.15", "--kind", kind, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["kinds"]
    assert row["replicas"] > 1 and row["cost"] == 3 * row["replicas"] and row["attainment"] >= 0.99


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "fcsf"], "fcfs"),
        (["--router", "round"], "round-robin"),
        (["--find-capacity"], "slo"),
        (["--find-step-time"], "slo"),
        (["--replicas", "x"], "--replicas"),
        (["--rates", "1,x"], "--rates"),
        (["--preemption", "drop"], "recompute"),
        (["--slo", "ttft=1"], "slo"),
        (["--plot", "x.pdf"], ".png"),
    ],
)
def test_wrong_words_are_told(own, capsys, words, said) -> None:
    assert main(["sim", *own, *words]) == 1
    assert said in capsys.readouterr().err


def test_profiles_are_kept_and_damaged_ones_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    path = profiles.save(profile(name="mine"))
    assert profiles.load("mine") == profile(name="mine") and profiles.kept() == ["mine"]
    with pytest.raises(UnknownName, match="mine"):
        profiles.load("mien")
    tree = json.loads(path.read_text())
    for change, said in (
        ({"version": 9}, "version"),
        ({"blocks": 0}, "blocks"),
        ({"cost": "liner"}, "linear"),
        ({"state": {}}, "coefficients"),
        ({"more": 1}, "more"),
    ):
        path.write_text(json.dumps({**tree, **change}))
        with pytest.raises(BadFile, match=said):
            profiles.load("mine")
    path.write_text("{")
    with pytest.raises(BadFile, match="is no profile"):
        profiles.load("mine")
