"""Background work takes nothing from anybody: not a step, not a seat, not a block."""

from __future__ import annotations

import pytest
from harness import Bench
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest
from millstream.core.events import Preempted
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 13 + i * 7 + 1) % 48 for i in range(length)]


def run(bench: Bench, plan: list[tuple[int, int, int]], background: int) -> list[tuple[float, float]]:
    """Times of (first, last) token of requests (arrives at step, prompt, output) beside `background` long ones."""
    behind = [bench.add(prompt(100 + i, 9), 20, background=True) for i in range(background)]
    waiting = sorted(enumerate(plan), key=lambda pair: pair[1][0])
    requests: dict[int, Request] = {}
    step = 0
    while waiting or bench.engine.busy:
        while waiting and waiting[0][1][0] <= step:
            place, (_, length, output) = waiting.pop(0)
            requests[place] = bench.add(prompt(place, length), output)
        bench.step()
        step += 1
        assert step < 5000, "no end in sight"
    for request in (*behind, *requests.values()):
        assert bench.output(request) == bench.truth(request) and bench.finish(request) is Finish.LENGTH
    bench.clean()
    times = []
    for place in range(len(plan)):
        metrics = bench.chunks[(requests[place].id, 0)][-1].metrics
        times.append((metrics.ttft_s, metrics.total_s))
    return times


PLAN = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(PLAN, st.integers(1, 6), st.sampled_from([1, 2]), st.sampled_from(["recompute", "swap"]), st.integers(1, 4))
@example([(1, 38, 12), (1, 4, 11)], 1, 1, "swap", 2)
def test_foreground_times_are_those_without_background(plan, background, plans, preemption, rows):
    """Every seat and block is taken by background when they arrive; a step that is in flight is all that they wait.

    With steps in flight they come together: those that are late by a step may be preempted at other moments than else.
    """
    if plans > 1:
        plan = [(plan[0][0], length, output) for _, length, output in plan]
    meters = (Choice("splitfuse", {"budget": 8}), Choice("seats", {"max_rows": rows}), "kv-blocks")

    def bench() -> Bench:
        return Bench(meters=meters, prefix="none", plans=plans, preemption=preemption, num_blocks=16, host_blocks=4)

    alone, beside = run(bench(), plan, 0), run(bench(), plan, background)
    late = [b - a for one, other in zip(alone, beside, strict=True) for a, b in zip(one, other, strict=True)]
    # What was launched before they arrived comes back first.
    assert max(late) <= plans - 1


def test_background_goes_on_when_nobody_else_is_there():
    bench = Bench()
    behind = bench.add(prompt(1, 6), 12, background=True)
    for _ in range(4):
        bench.step()
    told = len(bench.output(behind))
    front = bench.add(prompt(2, 6), 5)
    for _ in range(3):
        bench.step()
    assert len(bench.output(behind)) <= told + 1 and len(bench.output(front)) >= 2
    bench.run()
    assert bench.output(behind) == bench.truth(behind)
    bench.clean()


def test_background_keeps_what_it_holds_while_there_is_room():
    bench = Bench(num_blocks=32)
    moved: list[Preempted] = []
    bench.engine.listeners.append(lambda event: moved.append(event) if isinstance(event, Preempted) else None)
    behind = bench.add(prompt(1, 6), 12, background=True)
    bench.step()
    bench.add(prompt(2, 6), 5)
    bench.run()
    assert not moved and bench.output(behind) == bench.truth(behind)


def test_background_of_several_outputs_survives_being_put_aside():
    bench = Bench(num_blocks=10)
    behind = bench.add(prompt(1, 9), 6, background=True, params={"n": 3, "temperature": 1.0, "seed": 5})
    bench.step()
    for i in range(3):
        bench.add(prompt(2 + i, 12), 6)
        bench.step()
    bench.run()
    for index in range(3):
        assert bench.output(behind, index) == bench.truth(behind, index)
    bench.clean()


def test_background_is_true_or_false():
    bench = Bench()
    request = Request(0, (Tokens((1, 2)),), SamplingParams(max_tokens=1), background=1)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="background"):
        bench.engine.submit(request, lambda chunk: isinstance(chunk, Chunk))


def test_a_lower_priority_number_goes_first_and_gives_way_last():
    bench = Bench(policies=("priority", "fcfs"), meters=(Choice("splitfuse", {"budget": 4}), "seats", "kv-blocks"))
    late = bench.add(prompt(1, 8), 4, priority=5)
    early = bench.add(prompt(2, 8), 4, priority=-5)
    plain = bench.add(prompt(3, 8), 4)
    bench.run()
    first = [bench.first_token_at(request) for request in (early, plain, late)]
    assert first == sorted(first) and len(set(first)) == 3
