"""The stage that experiments share: outputs end where their calls say, and preemption swaps where that is asked for."""

from __future__ import annotations

import random

import pytest
from tests.real import model_path

from millstream.bench.stage import Setting, Stage
from millstream.core.registry import Choice
from millstream.core.request import SamplingParams
from millstream.sim.workload import TEXT, Call

MLFQ = Choice("mlfq", {"quantum": 4.0})


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(str(model_path("smollm2-135m")), bytes="128MiB")


def calls(count: int = 8) -> list[Call]:
    draw = random.Random(0)
    return [
        Call(number, 0.01 * number, tuple(range((number + 1) * TEXT, (number + 1) * TEXT + 20)), draw.randint(6, 24))
        for number in range(count)
    ]


def test_outputs_end_where_calls_say_however_they_are_preempted(stage: Stage) -> None:
    asked = calls()
    plain = stage.live(asked, Setting((Choice("fcfs"),)))
    assert [len(plain.tokens[call.id]) for call in asked] == [call.num_output for call in asked]
    assert {one.finish for one in plain.served} == {"stop"} and not plain.preemptions
    moved = stage.model.built.runner.counters
    for preemption in ("recompute", "swap"):
        before = moved.moves
        # Without an index of prefixes no block is copied but by swapping.
        setting = Setting((MLFQ, Choice("fcfs")), seats=2, preemption=preemption, prefix=Choice("none"))
        played = stage.live(asked, setting)
        assert played.preemptions and played.tokens == plain.tokens
        assert (moved.moves > before) == (preemption == "swap")


def test_with_answers_the_model_ends_them(stage: Stage) -> None:
    asked = [Call(0, 0.0, (5, 6, 7), 3), Call(1, 0.0, (8, 9), 3)]
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    played = stage.live(asked, Setting((Choice("fcfs"),)), answers={call.id: params for call in asked})
    assert [len(played.tokens[call.id]) for call in asked] == [9, 9]
