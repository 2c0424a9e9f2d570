"""What the comparison with other engines makes of seconds: rates, ratios, tables, and who is left out."""

from __future__ import annotations

import random

import pytest
from peers import report
from peers.measures import Results, Task, run_rounds, tasks, windows
from peers.protocol import WorkerFailed

POOL = list(range(1000))


class Fake:
    """A worker whose prefill takes a microsecond a token and whose step takes a millisecond, told, not waited for."""

    def __init__(self, slower: float = 1.0, fails_at: int | None = None, short: bool = False) -> None:
        self.slower, self.fails_at, self.short = slower, fails_at, short
        self.asked: list[list[list[int]]] = []
        self.closed = False

    def ask(self, limit_s: float = 600.0, **what):
        self.asked.append(what["prompts"])
        if self.fails_at is not None and len(self.asked) > self.fails_at:
            raise WorkerFailed("it broke")
        made = what["output_len"] - self.short
        seconds = 1e-6 * sum(map(len, what["prompts"])) + 1e-3 * (what["output_len"] - 1)
        return {"seconds": self.slower * seconds, "outputs": [[ids[-1]] * made for ids in what["prompts"]]}

    def cpu_s(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


def test_rates_are_those_of_the_definitions():
    rates = Task(8, 128, 5).rates(first_s=2.0, whole_s=4.0)
    assert rates == {"prefill 128 x 8": 512.0, "decode 8": 8 * 4 / 2.0, "total 8": 8 * 133 / 4.0}
    assert Task(2, 512, 1).rates(0.5, 0.0) == {"prefill 512 x 2": 2048.0}


def test_a_difference_that_is_noise_gives_no_rate():
    assert "decode 1" not in Task(1, 8, 2).rates(first_s=1.0, whole_s=0.9)


def test_a_prefill_that_a_batch_measures_anyway_is_not_asked_twice():
    assert tasks([1, 8], 128, 4, [(512, 1), (128, 1)]) == [Task(1, 512, 1), Task(1, 128, 4), Task(8, 128, 4)]


def test_every_engine_gets_the_same_prompts_and_other_ones_each_time():
    ours, theirs, results = Fake(), Fake(slower=2.0), Results()
    run_rounds({"ours": ours, "theirs": theirs}, [Task(2, 16, 3), Task(1, 32, 1)], POOL, 3, results)
    assert ours.asked == theirs.asked
    # Two runs of the first task and one of the second, in each of four rounds.
    assert len(ours.asked) == 4 * 3
    assert len({tuple(map(tuple, prompts)) for prompts in ours.asked}) == len(ours.asked)
    assert {name: len(values) for name, values in results.values["ours"].items()} == {
        "prefill 16 x 2": 3, "decode 2": 3, "total 2": 3, "prefill 32 x 1": 3,
    }  # fmt: skip
    assert results.values["ours"]["decode 2"] == pytest.approx([2000.0] * 3)
    assert results.values["theirs"]["decode 2"] == pytest.approx([1000.0] * 3)
    # Both answer with the prompt's last token, three prompts a round, in the warm-up too.
    assert results.agreed == {"theirs": [12, 12]}


@pytest.mark.parametrize("broken", [Fake(fails_at=3), Fake(short=True)])
def test_an_engine_that_fails_is_left_out_with_its_reason_and_the_rest_goes_on(broken):
    ours, results = Fake(), Results()
    workers = {"ours": ours, "broken": broken}
    run_rounds(workers, [Task(2, 16, 3)], POOL, 2, results)
    assert list(workers) == ["ours"] and broken.closed
    assert "failed in round" in results.absent["broken"]
    assert len(results.values["ours"]["decode 2"]) == 2


def test_windows_are_pieces_of_the_text():
    found = windows(POOL, 5, 10, random.Random(1))
    assert all(ids == list(range(ids[0], ids[0] + 10)) for ids in found)
    with pytest.raises(ValueError, match="1000 tokens"):
        windows(POOL, 1, 1000, random.Random(1))


@pytest.fixture
def results() -> Results:
    return Results(
        values={
            "ours": {"total 8": [30.0], "decode 8": [90.0, 100.0, 120.0], "prefill 16 x 8": [2000.0]},
            "theirs": {"decode 8": [50.0, 40.0, 60.0]},
        },
        starts={
            "ours": [{"total_s": 9.0, "imports_s": 1.0}, {"total_s": 3.0, "imports_s": 1.0}],
            "theirs": [{"total_s": 6.0, "imports_s": 2.0}],
        },
        told={"ours": {"engine": "ours", "version": "1", "precision": "int4", "set": "nothing"}},
        absent={"third": "its environment is not there"},
        agreed={"theirs": [3, 4]},
        idle={"theirs": [0.5, 10.0], "ours": [0.0, 10.0]},
        perplexity={"ours": 23.7},
        perplexity_tokens=1023,
    )


def test_the_table_has_medians_ranges_and_ratios(results):
    made = report.rows(results, ["ours", "theirs", "third"])
    assert [row.measure for row in made] == [
        "decode 8", "prefill 16 x 8", "total 8", report.START, report.AFTER_IMPORTS,
    ]  # fmt: skip
    titles, lines = report.table(made, ["ours", "theirs", "third"])
    assert titles == ["", "unit", "ours", "theirs"]
    assert lines[0] == ["decode 8", "tokens/s", "100.0 (90.0 to 120.0)", "50.0 (40.0 to 60.0), 2.00x"]
    assert lines[1][2:] == ["2000", "-"]
    # Seconds are better when fewer; the first of several starts does not count.
    assert lines[3] == [report.START, "s", "3.00", "6.00, 2.00x"]
    assert lines[4] == [report.AFTER_IMPORTS, "s", "2.00", "4.00, 2.00x"]
    text = report.markdown(titles, lines).splitlines()
    assert text[1] == "| --- | --- | --- | --- |" and len(text) == 2 + len(lines)


def test_the_footnotes_say_who_is_missing_and_who_did_not_sit_still(results):
    notes = "\n".join(report.footnotes(results, ["ours", "theirs", "third"]))
    assert "third: not measured, its environment is not there" in notes
    assert "3 of 4 first output tokens are those of ours" in notes
    assert "theirs: took 5% of a core" in notes and "ours: took" not in notes
    assert "1023 tokens in windows of 1,024: ours 23.700" in notes


def test_json_has_every_value(results):
    made = report.rows(results, ["ours", "theirs", "third"])
    value = report.as_json(results, made, model="m")
    assert value["model"] == "m" and value["values"] == results.values and value["absent"] == results.absent
    assert value["rows"][0]["engines"]["theirs"] == {
        "median": 50.0, "low": 40.0, "high": 60.0, "count": 3, "ratio": 2.0,
    }  # fmt: skip


def test_without_the_first_engine_there_are_no_ratios(results):
    made = report.rows(results, ["third", "theirs"])
    assert made[0].cells["theirs"].ratio is None
