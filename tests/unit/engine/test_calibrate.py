"""Calibration: what is measured, what is held out, and that the model of times is told by what it was not shown."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from millstream.core.cache import CacheGroup
from millstream.core.errors import BadRequest, RequestFault
from millstream.core.plan import Extend, Holding, Settled, StepPlan, StepResult
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
            self.now += true_s(shape_of(plan, 16)) * self.draw.lognormvariate(0.0, self.noise)
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
    assert runner.plans[3].forgotten == (runner.plans[1].extends[0].seq,)


def test_rows_that_decode_are_timed_where_they_have_decoded_before(runner) -> None:
    shape, seconds = Steps(runner, SPEC, "autoregressive").seconds(Composition(rows=2, context=33))
    before, timed = runner.plans
    assert shape == StepShape(0, 0, 0, 2, 2 * 33, 0, 2) == shape_of(timed, 16)
    assert seconds == pytest.approx(true_s(shape))
    for one, other in zip(before.extends, timed.extends, strict=True):
        assert (one.seq, one.start + 1, one.holdings) == (other.seq, other.start, other.holdings)
    assert not timed.forgotten and len({extend.seq for extend in timed.extends}) == 2


def test_rows_of_a_composition_share_the_blocks_that_it_says(runner) -> None:
    steps = Steps(runner, SPEC, "autoregressive")
    one = Composition(rows=3, context=40 + 32, shared=32)
    shape, _ = steps.seconds(one)
    assert shape == StepShape(0, 0, 0, 3, 3 * 72, 2 * 32, 3)
    tables = [extend.holdings[0].blocks for extend in runner.plans[0].extends]
    assert {table[:2] for table in tables} == {(0, 1)}
    own = [block for table in tables for block in table[2:]]
    assert len(own) == len(set(own)) and not {0, 1} & set(own)
    # What it says to need is what it takes, but for the last block of each row.
    assert one.tokens == 32 + 3 * 41 and len(own) + 2 == math.ceil(32 / 16) + 3 * math.ceil(41 / 16)


def test_what_rows_share_is_counted_once(runner) -> None:
    def shape(tables: list[tuple[int, ...]], starts: list[int]) -> StepShape:
        extends = tuple(
            Extend(number, start, (1,), (Holding("full", table, start + 1),))
            for number, (table, start) in enumerate(zip(tables, starts, strict=True))
        )
        return shape_of(StepPlan(0, extends), 16)

    assert shape([(1, 2), (3, 4)], [20, 20]).shared_keys == 0
    # One block of all four, one more of two: a trie of 16 + 16 + what each has alone.
    tables = [(9, 5, 7), (9, 6), (9, 5, 1), (9, 8)]
    assert shape(tables, [40, 20, 40, 25]).shared_keys == 3 * 16 + 16
    # A prefix that is held whole, and one that is no longer than a row has computed.
    assert shape([(9, 5), (9, 5, 7)], [31, 33]).shared_keys == 32
    assert shape([(9, 5), (9, 5, 7)], [19, 33]).shared_keys == 20
    prompts = Extend(7, 16, (1, 1), (Holding("full", (9, 5), 18),))
    plan = StepPlan(0, (prompts, Extend(8, 16, (1,), (Holding("full", (9, 5), 17),))))
    assert shape_of(plan, 16).shared_keys == 0
    # Groups that forget where rows began say nothing.
    held = [(Holding("window", (-1, one), 20), Holding("full", (4, one), 20)) for one in (5, 6)]
    plan = StepPlan(0, tuple(Extend(number, 19, (1,), both) for number, both in enumerate(held)))
    assert shape_of(plan, 16).shared_keys == 16
    assert shape_of(StepPlan(0, (Extend(0, 3, (1,), ()), Extend(1, 3, (1,), ()))), 16).shared_keys == 0


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
