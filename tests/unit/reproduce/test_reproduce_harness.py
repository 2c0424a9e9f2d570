from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
from synthetic_experiment import COPIES, REPLICAS, TIME, Synthetic

from millstream.core.errors import ConfigError, ModelError
from millstream.reproduce import harness, ledger, machine
from millstream.reproduce.protocol import Arm, CheckResult, CheckRow, Of, Required, module_files


def test_a_passing_experiment_works(tmp_path: Path) -> None:
    experiment = Synthetic(tmp_path)
    record = harness.run(experiment, root=tmp_path)
    assert (record.verdict, record.why) == ("works", ())
    assert [row.outcome for row in record.required] == ["passed", "passed"]
    assert record.required[0].value == 3.0
    figure = record.figures[0]
    assert (figure.low, figure.high, figure.ours) == (2.0, 4.0, 3.0)
    assert experiment.calls[:2] == ["open", "check"]
    assert experiment.calls[-1] == "close"
    # sha256 of b"abc", from FIPS 180-2.
    assert record.inputs["prompts"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_arms_interleave_and_the_order_rotates(tmp_path: Path) -> None:
    experiment = Synthetic(tmp_path)
    record = harness.run(experiment, root=tmp_path)
    assert record.order == (
        ("slow", "fast", "odd"),
        ("fast", "odd", "slow"),
        ("odd", "slow", "fast"),
        ("slow", "fast", "odd"),
        ("fast", "odd", "slow"),
    )
    recorded = [arm for repeat, arm in experiment.measured if repeat >= 0]
    assert recorded == [arm for arms in record.order for arm in arms]
    assert Counter(arm for repeat, arm in experiment.measured if repeat < 0) == {"slow": 1, "fast": 1, "odd": 1}
    assert len(record.arms[0].metrics["time_s"].values) == 5


def test_two_arms_alternate_who_goes_first() -> None:
    arms = (Arm("a", ""), Arm("b", ""))
    assert ["".join(arm.name for arm in harness.rotated(arms, repeat)) for repeat in range(4)] == [
        "ab",
        "ba",
        "ab",
        "ba",
    ]


def test_a_failed_check_voids_and_nothing_is_measured(tmp_path: Path) -> None:
    rows = CheckResult((CheckRow("same tokens", True), CheckRow("no leak", False, "3 blocks")))
    experiment = Synthetic(tmp_path, check=lambda ctx: rows)
    record = harness.run(experiment, root=tmp_path)
    assert record.verdict == "void"
    assert record.why == ("no leak: 3 blocks",)
    assert experiment.measured == []
    assert {row.outcome for row in record.required} == {"failed"}
    assert "close" in experiment.calls


def test_an_assertion_in_the_check_voids(tmp_path: Path) -> None:
    def check(ctx: object) -> CheckResult:
        raise AssertionError("token 7 differs")

    record = harness.run(Synthetic(tmp_path, check=check), root=tmp_path)
    assert (record.verdict, record.why) == ("void", ("check: token 7 differs",))


def test_checking_nothing_is_no_pass(tmp_path: Path) -> None:
    record = harness.run(Synthetic(tmp_path, check=lambda ctx: CheckResult(())), root=tmp_path)
    assert record.verdict == "void"


@pytest.mark.parametrize("way", ["assert", "expect"])
def test_a_wrong_answer_while_measuring_voids_and_stops(tmp_path: Path, way: str) -> None:
    class Drifting(Synthetic):
        def measure(self, ctx, arm):  # type: ignore[no-untyped-def]
            ctx.expect("same tokens in every run", way == "assert" or ctx.repeat < 2 or arm.name != "fast", arm.name)
            if way == "assert":
                assert ctx.repeat < 2 or arm.name != "fast", "tokens differ"
            return super().measure(ctx, arm)

    record = harness.run(Drifting(tmp_path), root=tmp_path)
    assert record.verdict == "void"
    # Repeats 0 and 1 were whole; the broken third one leaves nothing behind.
    assert len(record.order) == 2
    assert {len(arm.metrics["time_s"].values) for arm in record.arms} == {2}
    assert {row.outcome for row in record.required} == {"failed"}


def test_a_missed_row_fails_and_says_what_was_found(tmp_path: Path) -> None:
    record = harness.run(Synthetic(tmp_path, times=lambda arm, repeat: 1.0), root=tmp_path)
    assert (record.verdict, record.why) == ("failed", ("twice as fast: 1",))


def test_a_row_out_of_reach_makes_partly_with_its_reason(tmp_path: Path) -> None:
    class Partly(Synthetic):
        required = (TIME, COPIES)

    record = harness.run(Partly(tmp_path), root=tmp_path)
    assert record.verdict == "partly"
    assert record.why == ("copies no bytes: the native op is not here yet",)


def test_a_reason_does_not_excuse_another_row(tmp_path: Path) -> None:
    class Partly(Synthetic):
        required = (TIME, COPIES)

    record = harness.run(Partly(tmp_path, times=lambda arm, repeat: 1.0), root=tmp_path)
    assert record.verdict == "failed"


def test_a_row_out_of_reach_that_holds_counts_as_passed(tmp_path: Path) -> None:
    class Reached(Synthetic):
        required = (dataclasses.replace(TIME, out_of_reach="too few cores"),)

    assert harness.run(Reached(tmp_path), root=tmp_path).verdict == "works"


def test_a_row_measured_elsewhere_does_not_hold_back_works(tmp_path: Path) -> None:
    class Elsewhere(Synthetic):
        required = (TIME, REPLICAS)

    record = harness.run(Elsewhere(tmp_path), root=tmp_path)
    assert record.verdict == "works"
    assert record.required[1].outcome == "elsewhere"
    assert record.required[1].value is None


def test_a_row_that_was_not_measured_fails(tmp_path: Path) -> None:
    class Unmeasured(Synthetic):
        required = (dataclasses.replace(REPLICAS, elsewhere=""),)

    record = harness.run(Unmeasured(tmp_path), root=tmp_path)
    assert (record.verdict, record.why) == ("failed", ("linear in replicas: not measured",))


def test_every_means_each_repeat(tmp_path: Path) -> None:
    def times(arm: str, repeat: int) -> float:
        return 1.9 if (arm, repeat) == ("slow", 3) else {"slow": 3.0, "fast": 1.0, "odd": 1.0}[arm]

    class Every(Synthetic):
        required = (dataclasses.replace(TIME, how="every"),)

    record = harness.run(Every(tmp_path, times=times), root=tmp_path)
    assert record.verdict == "failed"
    assert record.required[0].value == pytest.approx(1.9)
    assert harness.run(Synthetic(tmp_path, times=times), root=tmp_path).verdict == "works"


def test_paired_ratios_cancel_drift(tmp_path: Path) -> None:
    """The machine slows down fourfold during the run; repeat by repeat the ratio stays exactly 2.5."""

    def times(arm: str, repeat: int) -> float:
        return {"slow": 2.5, "fast": 1.0, "odd": 1.0}[arm] * (1 + repeat if repeat >= 0 else 1)

    class Paired(Synthetic):
        required = (dataclasses.replace(TIME, how="paired"),)

    row = harness.run(Paired(tmp_path, times=times), root=tmp_path).required[0]
    assert row.value == pytest.approx(2.5)
    assert row.repeats is not None
    assert row.repeats.q3 - row.repeats.q1 == pytest.approx(0.0)


def test_a_spread_larger_than_the_effect_is_a_warning(tmp_path: Path) -> None:
    def times(arm: str, repeat: int) -> float:
        return (0.6, 1.0, 1.5, 1.0, 2.0, 1.0)[repeat] if arm == "slow" else 1.0

    record = harness.run(Synthetic(tmp_path, times=times), root=tmp_path)
    assert any(text.startswith("noise: twice as fast: the spread") for text in record.warnings)
    assert any(text.startswith("noise: time_s of slow") for text in record.warnings)
    steady = harness.run(Synthetic(tmp_path), root=tmp_path)
    assert not any(text.startswith("noise") for text in steady.warnings)


def test_a_close_pass_says_how_many_repeats_miss(tmp_path: Path) -> None:
    def times(arm: str, repeat: int) -> float:
        return (2.0, 2.1, 1.9, 2.2, 1.8, 2.0)[repeat] if arm == "slow" else 1.0

    record = harness.run(Synthetic(tmp_path, times=times), root=tmp_path)
    assert record.verdict == "works"
    assert "close: twice as fast: 2 of 5 repeats miss the bound" in record.warnings


def test_quartiles_are_those_of_linear_interpolation() -> None:
    taken = harness.spread([4.0, 1.0, 3.0, 2.0])
    assert (taken.median, taken.q1, taken.q3, taken.low, taken.high) == (2.5, 1.75, 3.25, 1.0, 4.0)
    assert taken.values == (4.0, 1.0, 3.0, 2.0)
    assert harness.spread([5.0]).q1 == 5.0


def test_a_missing_model_is_an_error_not_a_verdict(tmp_path: Path) -> None:
    class Missing(Synthetic):
        def open(self, ctx):  # type: ignore[no-untyped-def]
            raise ModelError("smollm2-135m is not here")

    experiment = Missing(tmp_path)
    with pytest.raises(ModelError):
        harness.run(experiment, root=tmp_path)
    assert experiment.calls == ["close"]


def test_undeclared_and_infinite_metrics_are_refused(tmp_path: Path) -> None:
    class Undeclared(Synthetic):
        def measure(self, ctx, arm):  # type: ignore[no-untyped-def]
            return {"tmie_s": 1.0}

    with pytest.raises(ConfigError, match="tmie_s"):
        harness.run(Undeclared(tmp_path), root=tmp_path)
    with pytest.raises(ConfigError, match="finite"):
        harness.run(Synthetic(tmp_path, times=lambda arm, repeat: math.nan), root=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("arms", (Arm("slow", ""),), "two arms"),
        ("required", (), "no required row"),
        ("required", (Required("x", of=Of("fats", "time_s"), at_least=1.0),), "fats"),
        ("required", (Required("x", of=Of("fast", "time_s")),), "no bound"),
        ("repeats", 4, "at least 5"),
    ],
)
def test_a_contradictory_experiment_is_refused(tmp_path: Path, field: str, value: object, said: str) -> None:
    wrong = type("Wrong", (Synthetic,), {field: value})
    with pytest.raises(ConfigError, match=said):
        harness.run(wrong(tmp_path), root=tmp_path)


def test_repeats_cannot_be_cut_below_five(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        harness.run(Synthetic(tmp_path), repeats=3, root=tmp_path)
    assert len(harness.run(Synthetic(tmp_path), repeats=7, root=tmp_path).order) == 7
    assert len(harness.run(Synthetic(tmp_path), quick=True, root=tmp_path).order) == 3


def test_progress_counts_every_run(tmp_path: Path) -> None:
    ticks: list[harness.Tick] = []
    harness.run(Synthetic(tmp_path), root=tmp_path, progress=ticks.append)
    assert {tick.total for tick in ticks} == {18}
    assert [tick.done for tick in ticks if tick.stage in ("warm-up", "measure")] == list(range(19))


def test_the_record_is_valid_json_and_reads_back(tmp_path: Path) -> None:
    record = harness.run(Synthetic(tmp_path), root=tmp_path)
    path = tmp_path / "records" / "pagedattention.json"
    ledger.write(record, path)
    plain = json.loads(path.read_text())
    assert plain["schema"] == ledger.SCHEMA
    assert plain["verdict"] == "works"
    assert ledger.read(path) == record
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_the_record_holds_no_private_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "brewster-laptop")
    monkeypatch.setattr("getpass.getuser", lambda: "ebrewster")
    monkeypatch.setenv("HOME", "/somewhere/ebrewster")

    def check(ctx: object) -> CheckResult:
        detail = f"{Path.home()}/m.gguf, {tmp_path}, {Path.cwd()}/x, /home/other/y, ebrewster@brewster-laptop"
        return CheckResult((CheckRow("read", True, detail),))

    record = harness.run(Synthetic(tmp_path, check=check), root=tmp_path)
    text = ledger.encode(record).decode()
    for private in ("brewster", "/somewhere", str(Path.cwd()), "/home/", str(Path(sys.prefix))):
        assert private not in text
    assert json.loads(text)["checks"][0]["detail"].startswith("<home>/m.gguf, ")


def test_the_machine_is_described() -> None:
    found = machine.describe(0.5)
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_bytes is None or found.memory_bytes > 1 << 28
    assert found.python == ".".join(map(str, sys.version_info[:3]))


def test_files_are_the_experiment_its_plugins_and_its_sources() -> None:
    class Hashed(Synthetic):
        arms = (Arm("a", "", ("meter:splitfuse",)), Arm("b", ""))
        sources = ("millstream.core.clock", "millstream.reproduce")

        def files(self) -> tuple[Path, ...]:
            return super(Synthetic, self).files()

    names = set(ledger.hash_files(Hashed.files(Hashed.__new__(Hashed))))
    assert {"millstream/sched/meters/splitfuse.py", "millstream/core/clock.py", "millstream/reproduce/plot.py"} <= names
    assert any(name.endswith("test_reproduce_harness.py") for name in names)


def test_a_source_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"millstream\.sched\.nothing"):
        module_files("millstream.sched.nothing")
    with pytest.raises(ConfigError, match=r"none\.cpp"):
        module_files("millstream.ops.cpu/none.cpp")
    assert [path.name for path in module_files("millstream.ops.cpu/paged_attention.cpp")] == ["paged_attention.cpp"]
