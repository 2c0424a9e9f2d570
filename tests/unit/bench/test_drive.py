"""The driver sends as asked and keeps the times of what it saw."""

from __future__ import annotations

import pytest
from tests.unit.engine.harness import Bench

from millstream.bench.drive import drive
from millstream.core.clock import WallClock
from millstream.core.errors import BadRequest
from millstream.core.request import Request, SamplingParams, Tokens


def requests(count: int, max_tokens: int = 4, **given: float) -> list[Request]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return [Request(i, (Tokens((i + 1, i + 2, i + 3)),), params, **given) for i in range(count)]  # type: ignore[arg-type]


def bench() -> Bench:
    made = Bench()
    made.engine.clock = WallClock()
    return made


def test_a_closed_loop_never_has_more_inside_than_clients() -> None:
    made, most = bench(), 0

    def after_step() -> None:
        nonlocal most
        most = max(most, len(made.engine.scheduler.live))

    run = drive(made.engine, requests(7), clients=2, after_step=after_step)
    assert most == 2
    assert run.output_tokens == 7 * 4 and all(t.finished is not None for t in run.timelines)
    made.clean()


def test_open_arrivals_wait_for_their_time() -> None:
    made = bench()
    run = drive(made.engine, [*requests(1), Request(9, (Tokens((1,)),), SamplingParams(max_tokens=1), arrival=0.05)])
    late = next(t for t in run.timelines if t.request.id == 9)
    assert late.sent == 0.05 and late.ttft_s >= 0 and run.seconds >= 0.05


def test_steps_and_tokens_are_those_of_the_engine() -> None:
    made = bench()
    run = drive(made.engine, requests(2))
    assert len(run.step_s) == len(run.rows) == made.engine.num_steps
    # Three prompt tokens each, and every output but the last is computed too.
    assert sum(run.tokens) == 2 * (3 + 3)
    assert len(run.gaps_s) == 2 * 3
    assert not made.engine.listeners


def test_a_request_that_cannot_be_served_raises_and_leaves_no_listener() -> None:
    made = bench()
    with pytest.raises(BadRequest):
        drive(made.engine, [Request(0, (Tokens((10_000,)),), SamplingParams())])
    assert not made.engine.listeners
