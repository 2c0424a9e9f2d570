"""Traces and what is made of them."""

from __future__ import annotations

import itertools

import pytest
from sim_bench import rows

from millstream.core.errors import BadFile, BadRequest, DownloadError, UnknownName
from millstream.sim import data, traces, workload
from millstream.sim.traces import Row
from millstream.sim.workload import TEXT, Source, calls


def test_arrivals_and_lengths_are_apart() -> None:
    base = rows(50)
    recorded = calls([Source(base)], 4096)
    faster = calls([Source(base, rate=100.0)], 4096)
    poisson = calls([Source(base, rate=100.0, burstiness=1.0)], 4096, seed=3)
    for found in (faster, poisson):
        assert [one.num_prompt for one in found] == [one.num_prompt for one in recorded]
        assert found[-1].at_s == pytest.approx(0.5, rel=0.05)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(faster)]
    assert max(gaps) == pytest.approx(min(gaps)), "recorded gaps are stretched"
    assert calls([Source(base, speed=2.0)], 4096)[-1].at_s == pytest.approx(recorded[-1].at_s / 2)
    mixed = workload.mixed(base, 1)
    assert [row.at_s for row in mixed] == [row.at_s for row in base]
    assert sorted(row.num_prompt for row in mixed) == sorted(row.num_prompt for row in base)
    assert [row.num_prompt for row in mixed] != [row.num_prompt for row in base]


def test_tenants_and_what_is_cut() -> None:
    found = calls([Source(rows(10), "a", count=25), Source(rows(10), "b", seconds=0.2)], 4096)
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    assert sum(one.tenant == "a" for one in found) == 25, "a short trace begins anew"
    assert sum(one.tenant == "b" for one in found) == 5
    assert len({one.prompt[0] for one in found}) == len(found), "no two begin alike"


def test_prompts_share_what_the_trace_says() -> None:
    made = [Row(0.0, 1300, 1, (1, 2, 3)), Row(1.0, 1300, 1, (1, 2, 4)), Row(2.0, 600, 1, (1, 9))]
    one, two, three = (call.prompt for call in calls([Source(made)], 4096))
    assert one[:1024] == two[:1024] and one[1024] != two[1024]
    assert one[:512] == three[:512] and one[512] != three[512]
    other = calls([Source(made), Source(made)], 4096)
    assert not set(other[0].prompt) & set(other[1].prompt), "tenants share no text"


def test_long_requests_are_cut_to_the_context() -> None:
    (one,) = calls([Source([Row(0.0, 10_000, 10_000)])], 512)
    assert one.num_prompt + one.num_output <= 512 and one.num_prompt >= 1
    assert TEXT > 512


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Source([Row(0.0, 1, 1)], speed=0.0), "speed"),
        (Source([Row(0.0, 1, 1), Row(1.0, 1, 1)], rate=-1.0), "rate"),
        (Source([Row(0.0, 1, 1)], count=0), "requests"),
        (Source([]), "trace"),
    ],
)
def test_wrong_sources_are_told(source, said) -> None:
    with pytest.raises(BadRequest, match=said):
        calls([source], 512)


def test_a_trace_of_ones_own(tmp_path) -> None:
    good = tmp_path / "own.csv"
    good.write_text("arrival_s,prompt_tokens,output_tokens,tenant,blocks\n5,100,7,a,\n2,2000,3,b,4 5\n")
    found = workload.load(str(good))
    assert found == [Row(0.0, 2000, 3, (4, 5), "b"), Row(3.0, 100, 7, (), "a")]
    for text, said in (
        ("arrival_s,prompt_tokens\n1,2\n", "no column output_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n1,x,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,2\n1,0,2\n", "line 3"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text(text)
        with pytest.raises(BadFile, match=said):
            workload.load(str(bad))
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"timestamp": 1000, "input_length": 5, "output_length": 2}\nnot json\n')
    with pytest.raises(BadFile, match="line 2"):
        workload.load(str(lines))
    with pytest.raises(BadFile, match=r"none\.csv: cannot be read: No such file"):
        workload.load(str(tmp_path / "none.csv"))
    with pytest.raises(UnknownName, match="azure-conv"):
        workload.load("azure-com")


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "\ufeffTimestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AGENT = '{"session_id": 1, "end_time_s": 9, "duration_ms": 2000, "input_tokens": %s, "output_tokens": 4}\n'


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("azure.csv", AZURE + "2023-11-16 18:15:46.6805900,9,4\n", "2023-11-16 18:15:49,0,4"),
        ("2024.csv", AZURE + "2024-05-10 00:00:00.000000+00:00,9,4\n", "yesterday,9,4"),
        ("burst.csv", BURST + "5,m,9,4,13,API log\n", "5,m,9"),
        ("vidur.csv", "arrived_at, num_prefill_tokens, num_decode_tokens\n0.5,9,4\n", "0.5,9,-1"),
        (
            "mooncake.jsonl",
            '{"timestamp": 7, "input_length": 9, "output_length": 4, "hash_ids": [46]}\n',
            '{"timestamp": 7}',
        ),
        ("agents.jsonl", AGENT % 9, AGENT % -9),
        ("coding.jsonl", '{"session_id": "a", "think_time_s": null, "input_tokens": 9, "output_tokens": 4}\n', "[]"),
        (
            "flows.jsonl",
            '\n{"calls": [{"step": "a", "input_length": 9, "output_length": 4}]}\n',
            '{"calls": [{"step": "a", "input_length": 0, "output_length": 4}]}',
        ),
    ],
)
def test_a_trace_of_ones_own_may_have_a_published_form(tmp_path, name, good, bad) -> None:
    path = tmp_path / name
    path.write_text(good)
    (row,) = workload.load(str(path))
    assert (row.at_s, row.num_prompt, row.num_output) == (0.0, 9, 4)
    path.write_text(good + bad)
    with pytest.raises(BadFile, match=rf"line {len(good.splitlines()) + 1}\b"):
        workload.load(str(path))


def test_arrivals_of_ones_own_take_lengths_from_elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "lengths", lambda name: [(7, 3), (5, 2)])
    (tmp_path / "times.txt").write_text("2.5\n1\n4e0\n")
    rows = workload.load(str(tmp_path / "times.txt"))
    assert [(row.at_s, row.num_prompt) for row in rows] == [(0.0, 5), (1.5, 7), (3.0, 7)]
    for text, said in (
        ("1\nx\n", "line 2"),
        ("[1]\n", "line 1: is neither"),
        ("hello\n", "line 1"),
        ("1\nnan\n", "line 2"),
    ):
        (tmp_path / "times.txt").write_text(text)
        with pytest.raises(BadFile, match=said):
            workload.load(str(tmp_path / "times.txt"))


def test_agents_think_between_their_calls(tmp_path) -> None:
    path = tmp_path / "agents.jsonl"
    path.write_text(
        '{"session_id": "s", "end_time_s": 110, "duration_ms": 10000, "input_tokens": 100, "output_tokens": 5}\n'
        '{"session_id": "s", "end_time_s": 125, "duration_ms": 10000, "input_tokens": 0, "output_tokens": 1}\n'
        '{"session_id": "s", "end_time_s": 150, "duration_ms": 20000, "input_tokens": 300, "output_tokens": 9}\n'
    )
    first, second = traces._agents(path)
    assert (first.at_s, first.think_s, first.session) == (100.0, 0.0, "s")
    assert (second.num_prompt, second.think_s) == (300, 5.0)


def test_clients_of_servegen_come_at_their_rates(tmp_path) -> None:
    path = tmp_path / "clients.jsonl"
    window = "0,2.0,1.0,Gamma,1,1\\n600,0.0,1.0,Gamma,1,1\\n"
    lengths = '{"0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{3: 1.0}"}}'
    path.write_text(f'{{"client": 4, "trace_csv": "{window}", "dataset": {lengths}}}\n')
    found = list(traces._servegen(path))
    assert 1000 < len(found) < 1400 and {row.num_prompt for row in found} == {10, 20}
    assert {row.tenant for row in found} == {"client-4"} and all(row.at_s < 600 for row in found)
    assert found == list(traces._servegen(path)), "the same each time"


@pytest.mark.parametrize("name", traces.UNTIMED)
def test_public_sessions_and_lengths_are_read(name) -> None:
    try:
        data.find(traces.UNTIMED[name][0], download=False)
        found = traces.load(name)
    except DownloadError:
        pytest.skip("the trace is not on this machine")
    assert len(found) > 90 and all(row.num_prompt > 0 and row.num_output > 0 for row in found)
    if name.startswith("agents"):
        assert 5 < len({row.session for row in found}) < len(found) / 10 and any(row.think_s > 1 for row in found)
    elif name.startswith("hexgen"):
        assert all(row.wave is not None and row.stage for row in found) and found[-1].at_s > 0
    else:
        assert {row.at_s for row in found} == {0.0}
