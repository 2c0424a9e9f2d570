"""Calibration: what is measured, what is held out, and that the model of times is told by what it was not shown."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from millstream.core.cache import CacheGroup
from millstream.core.errors import BadRequest, RequestFault
from millstream.core.plan import Settled, StepPlan, StepResult
from millstream.core.shape import StepShape, shape_of
from millstream.engine import calibrate
from millstream.engine.calibrate import Composition, Measured, Steps, grid, learn, measure
from millstream.runner.protocol import Capacity

SPEC = SimpleNamespace(vocab_size=100, groups=(CacheGroup("full"),))


def true_s(shape: StepShape) -> float:
    """A machine with a knee: 64 tokens cost little, what is beyond them costs more."""
    tokens = shape.tokens
    return 1e-3 + 2e-5 * min(tokens, 64) + 1e-4 * max(0, tokens - 64) + 1e-9 * shape.prefill_pairs


class FakeRunner:
    """Takes the time of `true_s` on a clock of its own, which the module under test reads."""

    def __init__(self, noise: float = 0.0, fault: str | None = None) -> None:
        self.now, self.noise, self.fault = 0.0, noise, fault
        self.draw = random.Random(1)
        self.plans: list[StepPlan] = []

    def capacity(self) -> Capacity:
        return Capacity(1, 16, {"full": 6000}, {"full": 0})

    def launch(self, plan: StepPlan) -> StepPlan:
        self.plans.append(plan)
        return plan

    def collect(self, plan: StepPlan) -> StepResult:
        if plan.extends:
            self.now += true_s(shape_of(plan)) * self.draw.lognormvariate(0.0, self.noise)
        settled = tuple(Settled(extend.seq, len(extend.tokens), (1,), fault=self.fault) for extend in plan.extends)
        return StepResult(plan.id, 0.0, settled)


@pytest.fixture
def runner(monkeypatch):
    made = FakeRunner()
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: made.now)
    return made


def test_every_composition_has_blocks_of_its_own(runner) -> None:
    steps = Steps(runner, SPEC, "autoregressive")
    shape, seconds = steps.seconds(Composition(prefill=20, start=30, rows=3, context=40))
    assert shape == StepShape(1, 20, 20 * 30 + 210, 3, 3 * 40, 0, 4) and seconds == pytest.approx(true_s(shape))
    (plan,) = runner.plans
    blocks = [block for extend in plan.extends for block in extend.holdings[0].blocks]
    assert len(blocks) == len(set(blocks)) == 4 + 3 * 3
    steps.seconds(Composition(rows=1, context=8))
    assert runner.plans[1].forgotten == tuple(extend.seq for extend in plan.extends)
    steps.forget()
    assert runner.plans[2].forgotten == (runner.plans[1].extends[0].seq,)


def test_only_what_fits_is_measured() -> None:
    assert max(one.tokens for one in grid(20_000, 2048, 16)) <= 20_000
    assert not any(one.start + one.prefill >= 1024 for one in grid(20_000, 1024, 16))
    with pytest.raises(BadRequest, match="KV cache of 500 tokens"):
        grid(500, 2048, 16)
    with pytest.raises(BadRequest, match="repeats"):
        measure(Steps(FakeRunner(), SPEC, "x"), [Composition(2)], 2, 0, None)


def test_the_knee_is_learnt_and_told_by_held_out_compositions(runner) -> None:
    runner.noise = 0.02
    compositions = grid(90_000, 4096, 16)
    seen = []
    measured = measure(Steps(runner, SPEC, "autoregressive"), compositions, 3, 0, lambda: seen.append(1))
    assert len(seen) == 4 * len(compositions) and len(measured) == len(compositions)
    found = learn(measured, (5e-4, 1e-5))
    assert found.best == "piecewise" and found.errors["piecewise"] < found.target < found.errors["linear"]
    assert 0.005 < found.noise < 0.03
    shape = StepShape(1, 200, 20_000, 4, 1000, 0, 5)
    assert found.cost.seconds(shape) == pytest.approx(true_s(shape) + 5e-4 + 5e-5, rel=0.06)


def test_regions_are_held_out_whole() -> None:
    compositions = grid(90_000, 4096, 16)
    held = [one for one in compositions if one.held_out]
    assert held and len(held) < len(compositions) / 3
    assert {one.rows for one in held if one.rows and one.prefill} == {16}
    assert not any(one.rows == 16 and one.prefill and not one.held_out for one in compositions)
    # A model that was shown nothing of them is wrong about them where they are unlike all else.
    odd = [
        Measured(one, shape_of_one(one), true_s(shape_of_one(one)) * (3.0 if one.held_out else 1.0), 0.0)
        for one in compositions
    ]
    assert min(learn(odd, (0.0, 0.0)).errors.values()) > 0.4


def shape_of_one(one: Composition) -> StepShape:
    pairs = one.prefill * one.start + one.prefill * (one.prefill + 1) // 2
    rows = int(one.prefill > 0)
    return StepShape(rows, one.prefill, pairs, one.rows, one.rows * one.context, 0, one.rows + rows)


def test_a_step_that_fails_is_told(monkeypatch) -> None:
    with pytest.raises(RequestFault, match="not finite"):
        Steps(FakeRunner(fault="not finite"), SPEC, "x").seconds(Composition(4))
