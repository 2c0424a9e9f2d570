"""The ops of a tiny model against ceilings measured beside them."""

from __future__ import annotations

import pytest
import torch

import tiny_model
from millstream.bench.ops import Shapes, Work, measure_ops, rows_of, sample
from millstream.core.errors import BadRequest
from millstream.models.decoder import Decoder, build
from millstream.models.program import Program
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import quantize
from millstream.ops import table
from millstream.ops.cpu import program
from millstream.ops.cpu.ceilings import KINDS, Ceilings, measure_ceilings

SHAPES = Shapes(rows=(1, 3), prefill=20, contexts=(16, 70))
SMALL = 1 << 20
CEILINGS = Ceilings(2, 10e9, 100, 20e9, {"int8": 1000e9, "float32": 100e9})


@pytest.fixture(autouse=True)
def _native():
    refusal = program.refusal()
    if refusal is not None:
        pytest.skip(refusal.reason)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Widths that the native program takes."""
    config = {**tiny_model.CONFIGS["llama"], "intermediate_size": 96}
    from millstream.models.families.protocol import find_family

    spec = find_family(config).spec(config)
    source = torch.Generator().manual_seed(0)
    tensors = {one.name: torch.randn(one.shape, generator=source) * 0.2 for one in spec.tensors()}
    made = build(*quantize(spec, tensors, Recipe.plain("block4")))
    assert isinstance(made.program, Program), made.program
    return made


@pytest.fixture(scope="module")
def found(decoder):
    return measure_ops(decoder, SHAPES, repeats=2, read_bytes=SMALL)


def test_ceilings_are_those_of_a_machine_of_this_century():
    one = measure_ceilings(1, SMALL, repeats=2, read_bytes=SMALL)
    assert 0.1e9 < one.read_bytes_per_s < 10e12
    assert {"int8", "float32"} <= set(one.ops_per_s) <= set(KINDS)
    for rate in one.ops_per_s.values():
        assert 0.1e9 < rate < 100e12
    with pytest.raises(BadRequest, match="threads"):
        measure_ceilings(0, SMALL)


def test_every_op_with_a_native_implementation_is_measured_beside_its_reference(found):
    # Of encoders, and calls of torch's own instead of kernels.
    others = {"activate", "layer_norm", "ragged_attention"}
    native = {name for name, op in table.ops().items() if "cpu" in op.implementations} - others
    for op in native:
        by = {row.implementation for row in found.rows if row.op == op}
        assert by == {"cpu", table.REFERENCE}, op
    by = {row.implementation for row in found.rows if row.op == "attention"}
    assert by == {"cpu-int8", "cpu-int4", "cpu-paged", "torch-ref"}
    assert {row.implementation for row in found.rows if row.op == "layers"} == {"program", "one by one"}
    assert not found.refused


def test_shares_are_those_of_the_bound(found):
    for row in found.rows:
        assert 0 < row.low <= row.seconds <= row.high
        limit = {"memory": row.gb_per_s * 1e9 / found.ceilings.read_bytes_per_s}
        if row.gop_per_s and row.bound != "memory":
            limit[row.bound] = row.gop_per_s * 1e9 / found.ceilings.ops_per_s[row.bound]
        assert row.share == pytest.approx(limit[row.bound])
        # Tiny operands lie in the nearest cache; nothing beyond that could be right.
        assert 0 < row.share < 50, row


def test_work_is_counted_once(decoder):
    found = measure_ops(decoder, SHAPES, repeats=1, only=("linear_blocks", "attention"), read_bytes=SMALL)
    rows = {(row.op, row.shape, row.implementation): row for row in found.rows}
    row = rows["linear_blocks", "mlp.down 48 x 96, 4 bits, 3 tokens", "cpu"]
    assert row.gop_per_s * row.seconds * 1e9 == pytest.approx(2 * 3 * 48 * 96)
    # 2 wide panels, 3 runs, codes and two half precision numbers an output; and floats in and out.
    stream = 2 * 3 * 32 * (16 + 4)
    assert row.gb_per_s * row.seconds * 1e9 == pytest.approx(stream + 4 * 3 * (48 + 96))
    row = rows["attention", "plain pages, prefill of 20", "torch-ref"]
    assert row.gop_per_s * row.seconds * 1e9 == pytest.approx(4 * 6 * 16 * (20 * 21 // 2))
    row = rows["attention", "plain pages, 3 rows over 70", "cpu-paged"]
    assert row.gb_per_s * row.seconds * 1e9 == pytest.approx(3 * 70 * 2 * 2 * 16 * 4 + 2 * 4 * 3 * 6 * 16)


@pytest.mark.parametrize(
    ("kind", "num_bytes", "num_ops", "bound"),
    [
        # Of 10 GB/s, and 100 and 1000 GOP/s: 1 us of memory against 10 and 1 us of products.
        ("float32", 10_000, 1_000_000, "float32"),
        ("int8", 20_000, 1_000_000, "memory"),
        ("int8", 5_000, 1_000_000, "int8"),
        ("bfloat16", 5_000, 1_000_000, "memory"),
    ],
)
def test_the_longer_of_two_limits_is_the_bound(kind, num_bytes, num_ops, bound):
    row = rows_of(Work("x", "", {}, num_bytes, num_ops, kind), {"cpu": [3e-5, 1e-5, 2e-5]}, CEILINGS)[0]
    assert row.bound == bound and (row.low, row.seconds, row.high) == (1e-5, 2e-5, 3e-5)
    assert row.share == pytest.approx(max(num_bytes / 10e9, num_ops / CEILINGS.ops_per_s.get(kind, 1e99)) / 2e-5)


def test_samples_of_all_arms_are_taken_in_turn_over_call_after_call():
    called = []
    arms = {name: lambda number, name=name: called.append((name, number)) for name in "ab"}
    found = sample(Work("x", "", arms, 1, 1), 3)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}
    assert [number for name, number in called if name == "a"][:4] == [0, 1, 0, 1]
    names = [name for name, _ in called]
    assert names.index("b") < len(names) - 1 - names[::-1].index("a")


def test_the_best_of_two_ceilings_is_kept():
    other = Ceilings(2, 5e9, 100, 30e9, {"int8": 1100e9, "float32": 90e9})
    assert CEILINGS.best(other) == Ceilings(2, 10e9, 100, 30e9, {"int8": 1100e9, "float32": 100e9})


def test_json_says_what_was_measured(found):
    value = found.as_json()
    assert set(value) == {"ceilings", "rows", "refused"}
    assert set(value["ceilings"]) == {
        "threads", "read_bytes_per_s", "resident_bytes", "resident_bytes_per_s", "ops_per_s",
    }  # fmt: skip
    assert set(value["rows"][0]) == {
        "op", "shape", "implementation", "seconds", "low", "high", "gb_per_s", "gop_per_s", "bound", "share",
    }  # fmt: skip


def test_what_cannot_be_measured_is_said(decoder):
    with pytest.raises(BadRequest, match="one of linear_blocks, linear, linear_channel"):
        measure_ops(decoder, SHAPES, only=("lineal",))
    with pytest.raises(BadRequest, match="repeats"):
        measure_ops(decoder, SHAPES, repeats=0)
    with pytest.raises(BadRequest, match="contexts up to 256"):
        measure_ops(decoder, Shapes(contexts=(1000,)))
