"""Abort at every scheduler step: whoever is aborted, and whenever, the others come to their own tokens."""

from __future__ import annotations

import pytest
from harness import Bench

from millstream.core.cache import CacheGroup, Keep
from millstream.core.registry import Choice
from millstream.core.request import Kind
from millstream.core.sequence import Finish

SHARED = [7, 7, 3, 1, 9, 2, 8]

CONFIGS = {
    "roomy": {"num_blocks": 40},
    "tight": {"num_blocks": 5},
    "tight-swap": {"num_blocks": 5, "preemption": "swap", "host_blocks": 6},
    "tight-no-prefix": {"num_blocks": 5, "prefix": "none"},
    "window": {"num_blocks": 6, "groups": (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 5))},
    "shortest": {"num_blocks": 5, "policies": ("shortest-remaining",)},
}


def build(config, plans):
    bench = Bench(plans=plans, **CONFIGS[config])
    bench.add(SHARED, 4)
    bench.add([*SHARED, 4, 4], 3, params={"n": 2, "temperature": 1.0, "seed": 5})
    bench.add([*SHARED, 6], 1, kind=Kind.SCORE, params={"prompt_logprobs": 0})
    bench.add([2], 6)
    bench.add([3, 3, 1], 3, decode=Choice("beam", {"width": 2}))
    return bench


def outcome(bench, request):
    """All that a client was told of a request, however it was cut into chunks."""
    told = []
    for (request_id, index), chunks in sorted(bench.chunks.items()):
        if request_id == request.id:
            last = chunks[-1]
            told.append((index, bench.output(request, index), last.finish, last.cumulative_logprob))
    return told


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
def test_aborting_anybody_at_any_step_changes_nothing_for_the_others(config, plans):
    whole = build(config, plans)
    num_steps = whole.run(2000)
    whole.clean()
    want = {request.id: outcome(whole, request) for request in whole.requests.values()}
    for request in whole.requests.values():
        if request.kind is Kind.GENERATE and request.decode is None:
            assert [told[1] for told in want[request.id]] == [
                whole.truth(request, index) for index in range(request.params.n)
            ]
    for victim in want:
        for step in range(num_steps + 1):
            bench = build(config, plans)
            for _ in range(step):
                bench.clock.advance(1.0)
                bench.engine.step()
            bench.engine.abort(victim)
            bench.run(num_steps * 2 + 50)
            bench.clean()
            for request in bench.requests.values():
                got = outcome(bench, request)
                if request.id != victim:
                    assert got == want[request.id], f"request {request.id} changed when {victim} ended at {step}"
                    continue
                for told, whole_told in zip(got, want[victim], strict=True):
                    assert told[2] in (Finish.ABORT, whole_told[2])
                    assert told[1] == whole_told[1][: len(told[1])]


def test_an_abort_gives_exactly_one_last_chunk_to_each_output():
    bench = build("roomy", 2)
    bench.step()
    bench.step()
    bench.engine.abort(1)
    bench.engine.abort(1)
    bench.engine.abort(999)
    bench.run()
    for (request_id, _), chunks in bench.chunks.items():
        assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert (chunks[-1].finish is Finish.ABORT) == (request_id == 1)
        assert chunks[-1].usage is not None and chunks[-1].metrics is not None


def test_an_aborted_prompt_is_remembered_for_the_next_one():
    bench = Bench(num_blocks=32)
    first = bench.add(range(20), 4)
    for _ in range(3):
        bench.step()
    bench.engine.abort(first.id)
    again = bench.add(range(20), 4)
    bench.run()
    assert bench.output(again) == bench.truth(again)
    assert bench.chunks[(again.id, 0)][-1].usage.cached_tokens >= 12


def test_an_abort_before_the_first_step_leaves_no_trace():
    bench = Bench()
    request = bench.add([1, 2, 3])
    bench.engine.abort(request.id)
    assert not bench.engine.busy and bench.output(request) == []
    metrics = bench.chunks[(request.id, 0)][0].metrics
    assert metrics.queue_s is None and metrics.ttft_s is None
    bench.clean()
