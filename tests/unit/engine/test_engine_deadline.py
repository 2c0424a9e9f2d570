"""A request ends at its deadline, wherever it is: with nothing before its first token, with what it said after it."""

from __future__ import annotations

import time

import pytest
from harness import Bench

from millstream.core.errors import BadRequest
from millstream.core.events import Computed, Finished
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Slo, Tokens
from millstream.core.sequence import Finish

PROMPT = list(range(20))


def last(bench, request, index=0):
    return bench.chunks[(request.id, index)][-1]


@pytest.mark.parametrize("plans", [1, 2])
def test_the_text_is_cut_at_the_deadline_whenever_it_falls(plans):
    whole = Bench(plans=plans)
    truth = whole.add(PROMPT, 8)
    steps = whole.run()
    for deadline_s in range(1, steps + 3):
        bench = Bench(plans=plans)
        computed = []
        bench.engine.listeners.append(lambda e, into=computed: into.append(e) if isinstance(e, Computed) else None)
        request = bench.add(PROMPT, 8, slo=Slo(deadline_s=float(deadline_s)))
        other = bench.add([9, 9], 12)
        bench.run()
        bench.clean()
        chunk = last(bench, request)
        output = bench.output(request)
        assert output == whole.output(truth)[: len(output)]
        assert bench.output(other) == bench.truth(other) and bench.finish(other) is Finish.LENGTH
        if chunk.finish is Finish.LENGTH:
            assert len(output) == 8
            continue
        assert chunk.finish is Finish.TIMEOUT and chunk.error is None and len(output) < 8
        # The step that was under way when it passed is the last that knows of it.
        assert chunk.metrics.total_s <= deadline_s + 1 and bench.engine.counters["timeouts"] == 1
        assert all(e.now < deadline_s for e in computed if e.seq.request_id == request.id)
        assert chunk.usage.output_tokens == len(output)


def test_a_request_that_waits_is_ended_without_ever_running():
    bench = Bench(meters=(Choice("splitfuse", {"budget": 8}), Choice("seats", {"max_rows": 1}), "kv-blocks"))
    bench.add(list(range(12)), 8)
    late = bench.add(list(range(30, 42)), 4, slo=Slo(deadline_s=3.0))
    finished = []
    bench.engine.listeners.append(lambda event: finished.append(event) if isinstance(event, Finished) else None)
    bench.run()
    assert last(bench, late).finish is Finish.TIMEOUT and bench.output(late) == []
    assert last(bench, late).metrics.queue_s is None
    assert [event.reason for event in finished if event.seq.request_id == late.id] == [Finish.TIMEOUT]


@pytest.mark.parametrize("decode", [None, Choice("beam", {"width": 3})])
def test_all_outputs_of_a_request_end_at_once(decode):
    bench = Bench()
    params = {"n": 3, "temperature": 1.0, "seed": 4} if decode is None else {}
    request = bench.add(PROMPT, 30, params=params, slo=Slo(deadline_s=6.5), decode=decode)
    bench.run()
    assert [last(bench, request, index).finish for index in range(3)] == [Finish.TIMEOUT] * 3
    bench.clean()


def test_one_that_was_late_when_it_came_never_runs():
    bench = Bench()
    bench.clock.advance(100.0)
    chunks = []
    request = Request(5, (Tokens((1, 2)),), SamplingParams(max_tokens=3), arrival=10.0, slo=Slo(deadline_s=50.0))
    bench.engine.submit(request, chunks.append)
    bench.engine.step()
    assert [chunk.finish for chunk in chunks] == [Finish.TIMEOUT] and chunks[0].tokens == ()
    assert chunks[0].metrics.total_s == 90.0 and not bench.engine.busy


def test_an_id_that_is_used_again_is_not_ended_by_its_forerunners_deadline():
    bench = Bench()
    chunks = []
    short = Request(5, (Tokens((1, 2)),), SamplingParams(max_tokens=1, temperature=0.0), slo=Slo(deadline_s=4.0))
    bench.engine.submit(short, chunks.append)
    bench.step()
    assert chunks[-1].finish is Finish.LENGTH
    again = Request(5, (Tokens((1, 2)),), SamplingParams(max_tokens=20, temperature=0.0), slo=Slo(deadline_s=400.0))
    bench.engine.submit(again, chunks.append)
    bench.run()
    assert chunks[-1].finish is Finish.LENGTH


def test_deadlines_of_requests_that_ended_are_not_kept():
    bench = Bench()
    for n in range(500):
        bench.add([n % 40], 1, slo=Slo(deadline_s=1e6))
        bench.run()
    assert len(bench.engine._deadlines) < 100 and not bench.engine._deadline_of


def test_wall_clock_jumps_change_nothing(monkeypatch):
    """Only a monotonic clock is read: a wall clock that is put forward and back by an hour ends nobody early."""
    jumps = iter([0.0, 3600.0, -3600.0] * 10_000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    from millstream.core.clock import WallClock

    bench = Bench()
    bench.engine.clock = WallClock()
    chunks = []
    now = bench.engine.clock.now()
    request = Request(1, (Tokens((1, 2)),), SamplingParams(max_tokens=20, temperature=0.0), arrival=now)
    bench.engine.submit(request, chunks.append)
    slow = Request(
        2, (Tokens((3,)),), SamplingParams(max_tokens=20, temperature=0.0), arrival=now, slo=Slo(deadline_s=30.0)
    )
    bench.engine.submit(slow, chunks.append)
    while bench.engine.step():
        pass
    ended = [chunk for chunk in chunks if chunk.finish is not None]
    assert [chunk.finish for chunk in ended] == [Finish.LENGTH] * 2
    assert all(0 <= chunk.metrics.queue_s <= chunk.metrics.ttft_s <= chunk.metrics.total_s < 30 for chunk in ended)


def test_an_arrival_in_the_future_gives_no_negative_times():
    bench = Bench()
    chunks = []
    bench.engine.submit(Request(1, (Tokens((1,)),), SamplingParams(max_tokens=2), arrival=1e6), chunks.append)
    bench.run()
    metrics = chunks[-1].metrics
    assert 0 <= metrics.queue_s <= metrics.ttft_s <= metrics.total_s < 10


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "5", True, 1e12])
def test_a_deadline_is_a_positive_number(value):
    with pytest.raises(BadRequest, match="deadline_s"):
        Slo(deadline_s=value)
