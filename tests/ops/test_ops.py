"""Every op over its case table: every implementation against a float64 formula that shares no code with it."""

from __future__ import annotations

import pytest
import torch

from millstream.ops import cases, table
from millstream.ops.cpu import kv_write as _kv_write  # noqa: F401 - registers

TABLES = cases.tables()
CALLS = [
    pytest.param(TABLES[name], implementation, case, id=f"{name}-{implementation}-{case.name}")
    for name in sorted(TABLES)
    for implementation in TABLES[name].op.implementations
    for case in TABLES[name].cases
]


@pytest.mark.parametrize(("op_table", "implementation", "case"), CALLS)
def test_every_implementation_agrees_with_the_float64_formula(op_table, implementation, case):
    args = case.args()
    chosen = op_table.op.implementations[implementation]
    refusal = chosen.accepts(op_table.op.ask(*args))
    if refusal is not None:
        pytest.skip(f"{implementation} refuses: {refusal.reason}")
    got = op_table.outcome(chosen.function, args)
    expected = op_table.exact(*case.args())
    assert len(got) == len(expected)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.shape == exact.shape
        torch.testing.assert_close(mine.double(), exact.double(), atol=case.atol, rtol=case.rtol, equal_nan=True)


@pytest.mark.parametrize(("op_table", "implementation", "case"), CALLS)
def test_no_implementation_writes_to_what_it_reads(op_table, implementation, case):
    args = case.args()
    chosen = op_table.op.implementations[implementation]
    if chosen.accepts(op_table.op.ask(*args)) is not None:
        pytest.skip("refused")
    op_table.outcome(chosen.function, args)
    for mine, fresh in zip(_tensors(args), _tensors(case.args()), strict=True):
        assert torch.equal(mine, fresh)


def test_every_op_has_a_case_table():
    assert set(table.ops()) >= set(TABLES)
    shipped = {
        name for name, op in table.ops().items() if (op.reference.__module__ or "").startswith("millstream.ops.ref")
    }
    assert shipped == set(TABLES)


@pytest.mark.parametrize("name", ["ref", "cpu"])
def test_a_slot_beyond_the_pages_is_an_error_and_writes_nothing(name):
    op = TABLES["kv_write"].op
    implementation = op.implementations[name]
    k_pages, v_pages = torch.zeros(2, 1, 8, 16), torch.zeros(2, 1, 16, 8)
    if implementation.accepts(op.ask(k_pages)) is not None:
        pytest.skip("refused")
    with pytest.raises(IndexError, match="32"):
        implementation.function(k_pages, v_pages, torch.tensor([0, 32]), torch.ones(2, 1, 8), torch.ones(2, 1, 8))
    assert not k_pages.any() and not v_pages.any()


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
