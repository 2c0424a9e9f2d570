"""Timelines of requests, the composition of steps, and the bounds of what is kept."""

from __future__ import annotations

import sys

from watched_bench import WatchedBench

from millstream.core.events import Stepped
from millstream.serve.observatory import playground_state
from millstream.serve.timeline import ENTRY_BYTES, MAX_ENTRIES, Steps, Timelines


def entries(bench, call):
    return bench.watched.timelines.get(call.id).as_dict()["entries"]


def test_a_timeline_tells_queue_chunks_decoding_and_end_in_order():
    bench = WatchedBench(budget=8)
    call = bench.begin(list(range(1, 21)), 4)
    bench.finish()
    told = entries(bench, call)
    assert [entry["what"] for entry in told] == [
        "queued", "admitted", "prefill", "prefill", "prefill", "decode", "finished",
    ]  # fmt: skip
    assert told[0]["prompt_tokens"] == 20 and told[1]["cached_tokens"] == 0
    assert [(entry["start"], entry["tokens"]) for entry in told[2:5]] == [(0, 8), (8, 8), (16, 4)]
    assert [entry["at_s"] for entry in told[2:5]] == [1.0, 2.0, 3.0]
    assert told[5] == {
        "what": "decode", "at_s": 3.0, "index": 0, "tokens": 4, "until_s": 6.0, "longest_gap_s": 1.0,
    }  # fmt: skip
    assert told[6]["reason"] == "length" and told[6]["at_s"] == 6.0


def test_a_timeline_ends_with_what_the_client_saw():
    bench = WatchedBench()
    call = bench.begin([1, 2, 3], 3)
    assert bench.watched.timelines.get(call.id).as_dict()["status"] == "running"
    bench.finish()
    told = bench.watched.timelines.get(call.id).as_dict()
    assert told["status"] == "ended" and told["id"] == call.id
    assert told["summary"]["output_tokens"] == 3 and told["summary"]["finish"] == ["length"]
    assert told["summary"]["ttft_s"] == 1.0 and told["summary"]["total_s"] == 3.0


def test_cache_hits_and_preemptions_are_told():
    bench = WatchedBench(num_blocks=6)
    calls = [bench.begin([place, *range(7)], 10) for place in range(4)]
    bench.finish()
    preempted = [e for call in calls for e in entries(bench, call) if e["what"] == "preempted"]
    assert preempted and all(entry["how"] == "recompute" for entry in preempted)
    again = next(c for c in calls if any(e["what"] == "preempted" for e in entries(bench, c)))
    whats = [entry["what"] for entry in entries(bench, again)]
    assert "prefill" in whats[whats.index("preempted") :], "what it had to compute again is told"
    bench = WatchedBench()
    bench.begin([0, *range(7)], 2)
    bench.run()
    hit = bench.begin([0, *range(7)], 2)
    bench.finish()
    assert next(e for e in entries(bench, hit) if e["what"] == "admitted")["cached_tokens"] > 0


def test_outputs_of_one_request_have_entries_of_their_own():
    bench = WatchedBench()
    call = bench.begin([1, 2, 3, 4, 5], 3, n=3)
    bench.finish()
    decoded = [entry for entry in entries(bench, call) if entry["what"] == "decode"]
    assert sorted(entry["index"] for entry in decoded) == [0, 1, 2]
    assert all(entry["tokens"] == 3 for entry in decoded)


def test_only_the_owner_sees_a_timeline():
    bench = WatchedBench()
    call = bench.begin([1, 2, 3], 1, tenant="acme")
    bench.finish()
    timelines = bench.watched.timelines
    assert timelines.get(call.id, "acme") is not None
    assert timelines.get(call.id, "other") is None and timelines.get(call.id, "") is None
    assert timelines.get("unknown", "acme") is None


def test_what_is_kept_is_bounded_by_count_and_the_least_asked_for_goes_first():
    timelines = Timelines(max_requests=3)
    for place in range(3):
        timelines.open(f"r{place}", "me", (place,))
    timelines.get("r0")
    timelines.open("r3", "me", (3,))
    assert [timelines.get(f"r{place}") is not None for place in range(4)] == [True, False, True, True]
    assert len(timelines) == 3 and len(timelines._by_engine_id) == 3


def test_what_is_kept_is_bounded_by_bytes():
    bench = WatchedBench(num_blocks=64)
    timelines = bench.watched.timelines
    timelines.max_bytes = 20_000
    for place in range(40):
        bench.begin([place % 50, 1, 2], 2)
        bench.run()
        assert timelines.bytes <= 20_000
    kept = list(timelines._kept.values())
    assert 0 < len(kept) < 40 and timelines.bytes == sum(timeline.bytes for timeline in kept)
    assert len(timelines._by_engine_id) == len(kept), "what is let go is not found by another way either"


def test_the_estimate_of_an_entry_is_no_less_than_what_it_takes():
    bench = WatchedBench(budget=4)
    call = bench.begin(list(range(1, 31)), 4)
    bench.run()
    kept = bench.watched.timelines.get(call.id).entries
    for entry in kept:
        assert (
            sys.getsizeof(entry) + sum(sys.getsizeof(v) for v in entry.values() if isinstance(v, float)) <= ENTRY_BYTES
        )


def test_a_request_of_endless_chunks_keeps_its_first_entries_and_its_end():
    bench = WatchedBench(budget=1)
    calls = [bench.begin([1, 2, 3], 2)]
    timelines = bench.watched.timelines
    timeline = timelines.get(calls[0].id)
    timeline.entries += [{"what": "prefill", "at_s": 0.0, "index": 0}] * MAX_ENTRIES
    bench.run()
    told = timeline.as_dict()
    assert told["dropped_entries"] > 0
    assert told["entries"][-1]["what"] == "finished"
    assert len(told["entries"]) <= MAX_ENTRIES + 5


def test_a_restart_is_in_the_timeline_of_those_inside():
    bench = WatchedBench()
    inside, done = bench.begin([1, 2, 3], 4), bench.begin([4, 5], 1)
    bench.step()
    bench.step()
    done.end(200)
    bench.watched.restarted()
    assert "engine_restarted" in [entry["what"] for entry in entries(bench, inside)]
    assert "engine_restarted" not in [entry["what"] for entry in entries(bench, done)]


def test_steps_say_what_shared_them():
    bench = WatchedBench(budget=8)
    bench.begin([1, 2, 3], 20)
    bench.step()
    bench.begin(list(range(1, 20)), 2)
    bench.step()
    steps = bench.watched.steps.since(0)
    assert [(s["prefill_tokens"], s["prefill_rows"], s["decode_tokens"]) for s in steps] == [(3, 1, 0), (7, 1, 1)]
    assert [step["n"] for step in steps] == [1, 2]
    bench.finish()
    mixed = bench.samples()[("millstream_mixed_steps_total", ())]
    assert mixed == sum(s["prefill_tokens"] > 0 and s["decode_tokens"] > 0 for s in bench.watched.steps.since(0)) >= 3


def test_steps_are_bounded_and_told_once():
    now = [0.0]
    steps = Steps(keep=4, now=lambda: now[0])
    for place in range(10):
        now[0] += 1
        steps.hear(Stepped(0.0, place, 0.5, 2, 11, 10, 0, 2, 3, 0.001))
    assert [step["n"] for step in steps.since(0)] == [7, 8, 9, 10]
    assert [step["n"] for step in steps.since(9)] == [10] and steps.since(10) == []
    assert steps.since(0, most=2)[0]["n"] == 9
    # In the last two seconds: three steps, the first of which took half a second before it was heard of.
    assert steps.rates(2.0) == (30 / 2.5, 3 / 2.5)
    now[0] += 100
    assert steps.rates(2.0) == (0.0, 0.0)


def test_the_state_for_the_playground_holds_gauges_and_new_steps():
    bench = WatchedBench(num_blocks=16)
    bench.begin([1, 2, 3, 4, 5], 4)
    bench.step()
    state = playground_state(bench.watched, bench.engine.load(), True, 0)
    assert state["ready"] and state["running"] == 1 and state["waiting"] == 0
    assert state["kv"] == {"total": 16, "used": 2, "prefix": 0}
    assert state["last_step"] == 1 and len(state["steps"]) == 1
    assert playground_state(bench.watched, bench.engine.load(), True, 1)["steps"] == []
    # A page that outlived the server asks for steps that never were.
    assert len(playground_state(bench.watched, bench.engine.load(), True, 99)["steps"]) == 1
    assert not playground_state(bench.watched, None, True, 0)["ready"]


def test_news_of_the_engine_that_come_after_the_end_are_kept():
    bench = WatchedBench()
    late = []
    bench.engine.listeners[:] = [late.append]
    call = bench.begin([1, 2, 3], 2)
    bench.run()
    call.end(200)
    for event in late:
        bench.watched.hear(event)
    told = entries(bench, call)
    assert told[-1]["what"] == "finished" and [entry["what"] for entry in told].count("decode") == 1
