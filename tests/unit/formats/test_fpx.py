"""Small floats: every code, every rounding, every byte; and a row's bits in any company."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from millstream.core import registry
from millstream.ops.cases.fpx import decoded
from millstream.ops.cpu import fpx as native
from millstream.ops.ref.fpx import encode, largest_of, pack_codes, step_of, unpack_codes, values_of
from millstream.ops.table import Ask

WIDTHS = [(3, 2), (2, 3), (2, 2)]
EVERY_WIDTH = pytest.mark.parametrize(("exponent", "mantissa"), WIDTHS)
NAMES = ["fp6-e3m2", "fp6-e2m3", "fp5-e2m2"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EVERY_WIDTH
def test_every_code_stands_for_what_its_bits_say(exponent, mantissa):
    codes = 1 << (1 + exponent + mantissa)
    want = [decoded(code, exponent, mantissa) for code in range(codes)]
    assert values_of(exponent, mantissa).tolist() == want
    assert min(value for value in want if value > 0) == step_of(exponent, mantissa)
    assert all(value / step_of(exponent, mantissa) == round(value / step_of(exponent, mantissa)) for value in want)


def test_the_largest_values_are_those_of_the_paper():
    assert (largest_of(3, 2), step_of(3, 2)) == (28.0, 0.0625)
    assert (largest_of(2, 3), largest_of(2, 2)) == (7.5, 7.0)


@EVERY_WIDTH
def test_a_weight_becomes_the_nearest_code_and_ties_the_even_one(exponent, mantissa):
    values = sorted(set(values_of(exponent, mantissa).tolist()))
    top = largest_of(exponent, mantissa)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    # The first makes the scale one, exactly.
    row = torch.tensor([top, *values, *middles, *(randn(300) * top / 3).clamp(-top, top).tolist()])
    codes, scale = encode(row[None], exponent, mantissa)
    assert scale.item() == 1.0
    found = values_of(exponent, mantissa)[codes[0].int()]
    for x, y, code in zip(row.tolist(), found.tolist(), codes[0].tolist(), strict=True):
        distance = min(abs(x - value) for value in values)
        assert abs(x - y) == pytest.approx(distance, rel=1e-6, abs=1e-9)
        if x in middles:
            assert code % 2 == 0


def test_rows_of_zeros_and_rows_beyond_half_precision_are_finite():
    weight = torch.zeros(3, 70)
    weight[1] = 1e-9
    weight[2] = randn(70) * 1e8
    codes, scale = encode(weight, 3, 2)
    assert not codes[:2].any() and torch.isfinite(scale.float()).all()
    assert values_of(3, 2)[codes[2].int()].abs().max() == 28.0


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 64), (33, 65), (576, 576), (7, 200), (100, 3)])
def test_packing_and_unpacking_is_the_identity(outputs, inputs, bits):
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    low, high = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(low, high, outputs, inputs), codes)
    padded = math.ceil(outputs / 32) * 32 * math.ceil(inputs / 64) * 64
    assert low.nbytes + high.nbytes == bits * padded // 8


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_takes_its_bits_and_a_scale_for_each_output(name):
    form = registry.make("weights", name)
    packed = form.pack(randn(1536, 576) * 0.1)
    bits = 1 + form.exponent + form.mantissa
    assert packed.nbytes == math.ceil(bits * 1536 * 576 / 8) + 2 * 1536


@pytest.mark.parametrize("name", NAMES)
def test_one_code_changes_one_output(name):
    form = registry.make("weights", name)
    packed = form.pack(randn(96, 128) * 0.1)
    x = randn(2, 128, seed=1)
    before = form.linear(x, packed)
    packed["low"].view(-1)[777] ^= 4
    changed = (form.linear(x, packed) != before).any(0)
    assert changed.sum() == 1


@pytest.fixture
def _native():
    refusal = native._accepts(Ask("cpu", torch.float32))
    if refusal is not None:
        pytest.skip(refusal.reason)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 576), (45, 130), (3, 5)])
def test_a_row_has_the_same_bits_in_any_company_by_either_way_and_on_any_threads(name, outputs, inputs):
    form = registry.make("weights", name)
    packed = form.pack(randn(outputs, inputs) * 0.1, randn(outputs, seed=1))
    x = randn(103, inputs, seed=2)
    parts = (packed["low"], packed["high"], packed["scale"], form.exponent, form.mantissa, packed["bias"])
    whole = native.linear_fpx_cpu(x, *parts)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for first, last in ((0, 1), (5, 7), (17, 22), (0, 64), (3, 103)):
                for direct in (0, 1000):
                    assert torch.equal(native.linear_fpx_cpu(x[first:last], *parts, direct), whole[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(bad):
    form = registry.make("weights", "fp6-e3m2")
    packed = form.pack(randn(64, 130) * 0.1)
    x = randn(5, 130, seed=3)
    clean = form.linear(x, packed)
    x[2, 129] = bad
    found = form.linear(x, packed)
    assert not torch.isfinite(found[2]).any()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.usefixtures("_native")
def test_inputs_of_any_size_keep_their_digits():
    form = registry.make("weights", "fp6-e3m2")
    packed = form.pack(randn(64, 192) * 0.1)
    for scale in (1e-25, 1e-10, 1.0, 1e10, 1e30):
        x = randn(2, 192, seed=4) * scale
        want = x.double() @ form.unpack(packed).double().T
        assert (form.linear(x, packed).double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.usefixtures("_native")
def test_what_does_not_fit_together_is_refused():
    packed = registry.make("weights", "fp6-e3m2").pack(randn(64, 64))
    with pytest.raises(ValueError, match="64 x 128"):
        native.linear_fpx_cpu(randn(1, 128), packed["low"], packed["high"], packed["scale"], 3, 2)
    with pytest.raises(ValueError, match="5 bits"):
        native.linear_fpx_cpu(randn(1, 64), packed["low"], packed["high"], packed["scale"], 2, 2)


@pytest.mark.parametrize("which", [[64], [-1]])
def test_a_row_beyond_the_matrix_is_an_error(which):
    form = registry.make("weights", "fp6-e3m2")
    with pytest.raises(IndexError, match="64"):
        form.rows(form.pack(randn(64, 64)), torch.tensor(which))
