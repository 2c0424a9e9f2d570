"""The phases of a start."""

from __future__ import annotations

import sys
import time

import pytest

from millstream.cli.timing import StartUp, process_age_s


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process was started")
def test_the_age_of_this_process_grows_with_the_clock():
    first = process_age_s()
    time.sleep(0.05)
    second = process_age_s()
    assert first is not None and second is not None
    assert 0.03 < second - first < 5


def test_the_phases_add_up_to_the_total(monkeypatch, tmp_path):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    start = StartUp(time.perf_counter())
    start.lap("one")
    time.sleep(0.02)
    start.add({"two": 0.005, "three": 0.01})
    start.lap("four")
    assert list(start.phases)[-5:] == ["one", "two", "three", "rest of loading", "four"]
    assert sum(start.phases.values()) == pytest.approx(start.total_s, abs=1e-6)


def test_a_start_that_made_something_is_cold(monkeypatch, tmp_path):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    start = StartUp(time.perf_counter())
    start.look()
    assert start.state == "warm"
    (tmp_path / "converted" / "abc-float32").mkdir(parents=True)
    assert start.state == "cold (converted made by this start)"
