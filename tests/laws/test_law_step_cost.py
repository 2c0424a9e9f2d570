"""What every model of step times keeps: it learns what it is shown, more work never takes less, and it can be kept."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core import registry
from millstream.core.errors import BadRequest, MillstreamError
from millstream.core.shape import StepShape

NAMES = registry.names("step-cost")
SHAPES = st.builds(
    lambda rows, tokens, context, decoding, keys: StepShape(
        min(rows, tokens), tokens, tokens * context, decoding, decoding * keys, 0, min(rows, tokens) + decoding
    ),
    st.integers(0, 8),
    st.integers(0, 600),
    st.integers(1, 2000),
    st.integers(0, 128),
    st.integers(1, 4000),
)


def true_s(shape: StepShape) -> float:
    return 2e-3 + 1e-4 * shape.prefill_tokens + 2e-4 * shape.decode_rows + 3e-8 * shape.decode_keys


def some(seed: int, count: int = 150) -> list[tuple[StepShape, float]]:
    draw = random.Random(seed)
    shapes = []
    for _ in range(count):
        rows, decoding = draw.randint(0, 3), draw.choice((0, 1, 4, 16, 64))
        tokens = sum(draw.randint(2, 200) for _ in range(rows))
        keys = decoding * draw.randint(10, 1000)
        if tokens + decoding:
            shapes.append(StepShape(rows, tokens, tokens * 100, decoding, keys, 0, rows + decoding))
    return [(shape, true_s(shape)) for shape in shapes]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_what_it_is_shown(name):
    cost = registry.make("step-cost", name)
    cost.fit(some(1))
    assert cost.residual() < 0.02
    for shape, seconds in some(2):
        assert cost.seconds(shape) == pytest.approx(seconds, rel=0.08)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, more=SHAPES)
def test_more_work_never_takes_less(name, shape, more):
    cost = fitted(name)
    fields = ("prefill_rows", "prefill_tokens", "prefill_pairs", "decode_rows", "decode_keys", "sampled")
    both = StepShape(**{field: getattr(shape, field) + getattr(more, field) for field in fields})
    assert 0 <= cost.seconds(shape) <= cost.seconds(both) + 1e-15


def test_sharing_is_free_of_charge_only_where_that_was_seen():
    """Where no step shared anything, rows are priced as if each read alone; else by what steps that share took."""
    alone, shared = StepShape(decode_rows=8, decode_keys=8000), StepShape(0, 0, 0, 8, 8000, 6000, 0)
    cost = fitted("piecewise")
    assert cost.seconds(shared) == cost.seconds(alone)
    samples = some(1)
    for rows in (2, 4, 8, 16, 32, 64):
        for keys in (300, 1000):
            shape = StepShape(0, 0, 0, rows, rows * keys, (rows - 1) * keys // 2, rows)
            samples.append((shape, true_s(shape) - 2e-8 * shape.shared_keys))
    cost = registry.make("step-cost", "piecewise")
    cost.fit(samples)
    assert cost.seconds(alone) - cost.seconds(shared) == pytest.approx(2e-8 * 6000, rel=0.1)
    # A profile from before keys that are shared had a price.
    state = json.loads(json.dumps(cost.state()))
    del state["coefficients"]["shared_keys"]
    cost.restore(state)
    assert cost.seconds(shared) == cost.seconds(alone) == pytest.approx(true_s(alone), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_kept(name):
    cost, other = fitted(name), registry.make("step-cost", name)
    other.restore(json.loads(json.dumps(cost.state())))
    assert all(other.seconds(shape) == cost.seconds(shape) for shape, _ in some(3))
    assert other.residual() == cost.residual()
    for wrong in ({}, {"coefficients": {}}, {**cost.state(), "coefficients": {"constant": 1.0}}):
        with pytest.raises(ValueError):
            registry.make("step-cost", name).restore(wrong)
    broken = json.loads(json.dumps(cost.state()))
    broken["coefficients"]["constant"] = -1.0
    with pytest.raises(ValueError, match="negative"):
        registry.make("step-cost", name).restore(broken)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_lacks(name):
    cost = registry.make("step-cost", name)
    with pytest.raises(MillstreamError, match="fitted"):
        cost.seconds(StepShape(decode_rows=1, decode_keys=1))
    with pytest.raises(BadRequest, match="samples"):
        cost.fit(some(1, 3))
    with pytest.raises(BadRequest, match="seconds"):
        cost.fit([(shape, 0.0) for shape, _ in some(1)])


_fitted: dict[str, object] = {}


def fitted(name):
    if name not in _fitted:
        _fitted[name] = registry.make("step-cost", name)
        _fitted[name].fit(some(1))
    return _fitted[name]
