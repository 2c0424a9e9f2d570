"""Every op over its case table: every implementation against a float64 formula that shares no code with it."""

from __future__ import annotations

import pytest
import torch

from millstream.ops import cases, table
from millstream.ops.cpu import blocks as _blocks  # noqa: F401 - registers
from millstream.ops.cpu import channel as _channel  # noqa: F401 - registers
from millstream.ops.cpu import elementwise as _elementwise  # noqa: F401 - registers
from millstream.ops.cpu import fpx as _fpx  # noqa: F401 - registers
from millstream.ops.cpu import fused as _fused  # noqa: F401 - registers
from millstream.ops.cpu import kv_write as _kv_write  # noqa: F401 - registers
from millstream.ops.cpu import kv_write_codes as _kv_write_codes  # noqa: F401 - registers
from millstream.ops.cpu import linear as _linear  # noqa: F401 - registers
from millstream.ops.cpu import sampling as _sampling  # noqa: F401 - registers

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


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 64), (37, 11), (3, 1), (130, 4097)])
def test_the_native_product_gives_a_row_the_same_bits_in_any_company(inputs, outputs):
    native = TABLES["linear"].op.implementations["cpu"]
    generator = torch.Generator().manual_seed(inputs)
    x, weight = torch.randn(257, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    if native.accepts(TABLES["linear"].op.ask(x, weight)) is not None:
        pytest.skip("refused")
    whole = native.function(x, weight)
    for first, last in ((0, 1), (5, 7), (100, 105), (17, 30), (0, 64), (3, 257)):
        assert torch.equal(native.function(x[first:last], weight), whole[first:last])


def test_the_native_product_refuses_what_does_not_fit_together():
    native = TABLES["linear"].op.implementations["cpu"]
    x = torch.ones(2, 8)
    if native.accepts(TABLES["linear"].op.ask(x)) is not None:
        pytest.skip("refused")
    for weight, bias in (
        (torch.ones(3, 9), None),
        (torch.ones(3, 8).double(), None),
        (torch.ones(3, 8), torch.ones(4)),
    ):
        with pytest.raises(ValueError, match="linear"):
            native.function(x, weight, bias)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


OF_BYTES = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in ("linear_blocks", "linear_channel")
    for case in TABLES[name].cases
]


@pytest.mark.parametrize(("name", "case"), OF_BYTES)
def test_a_product_of_bytes_gives_a_row_the_same_bits_in_any_company(name, case):
    native = TABLES[name].op.implementations["cpu"]
    x, *rest = case.args()
    if native.accepts(table.Ask("cpu", x.dtype)) is not None:
        pytest.skip("no native product here")
    whole = native.function(x, *rest)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for row in range(min(x.shape[0], 13)):
                assert torch.equal(native.function(x[row : row + 1], *rest)[0], whole[row])
            assert torch.equal(native.function(x[: x.shape[0] // 2], *rest), whole[: x.shape[0] // 2])
        finally:
            torch.set_num_threads(before)


def test_a_stream_gives_back_what_was_packed():
    from millstream.ops.ref.blocks import pack_stream, rows_of, unpack_stream, weights_of

    generator = torch.Generator().manual_seed(3)
    for outputs, inputs, bits in ((32, 64, 4), (33, 40, 4), (7, 100, 8), (64, 32, 8)):
        runs = -(-inputs // 32)
        codes = torch.randint(0, 1 << bits, (outputs, runs, 32), generator=generator).to(torch.uint8)
        d, m = torch.randn(2, outputs, runs, generator=generator).half().float()
        stream = pack_stream(codes, d, m, bits)
        back = unpack_stream(stream, outputs, inputs, bits)
        assert torch.equal(back[0], codes) and torch.equal(back[1], d) and torch.equal(back[2], m)
        rows = torch.tensor([outputs - 1, 0, 3])
        whole = weights_of(stream, outputs, inputs, bits)
        assert torch.equal(rows_of(stream, rows, outputs, inputs, bits), whole[rows])


def channel_native():
    native = TABLES["linear_channel"].op.implementations["cpu"]
    if native.accepts(table.Ask("cpu", torch.float32)) is not None:
        pytest.skip("no native product here")
    return native.function


@pytest.mark.parametrize("case", TABLES["linear_channel"].cases, ids=lambda case: case.name)
def test_a_product_of_whole_rows_has_the_bits_of_the_integer_reference(case):
    assert torch.equal(channel_native()(*case.args()), TABLES["linear_channel"].op.reference(*case.args()))


@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (4, 0), (4, 6)])
def test_the_sums_of_a_product_of_whole_rows_are_those_of_integers(bits, groups):
    from millstream.ops.cases.channel import made
    from millstream.ops.ref.channel import bytes_of, pack_stream, unpack_stream

    generator = torch.Generator().manual_seed(9)
    _, stream, outputs, _ = made(1, 70, 384, bits, groups)(generator)
    held = unpack_stream(stream, outputs, 384, bits)
    second = (held["step"], held["z"]) if "step" in held else None
    stream = pack_stream(held["codes"], torch.ones(outputs), bits, held.get("zero"), second)
    x = torch.randint(-127, 128, (9, 384), generator=generator).float()
    x[:, 0] = 127.0  # so that a row's scale is one
    u, zero, _ = bytes_of(stream, outputs, 384, bits)
    want = x.to(torch.int32) @ (u.to(torch.int32) - zero[:, None]).T
    assert int(want.abs().max()) < 1 << 24  # floats hold them
    for function in (channel_native(), TABLES["linear_channel"].op.reference):
        assert torch.equal(function(x, stream, outputs, bits).to(torch.int32), want)


@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (4, 0), (4, 3)])
def test_one_code_is_one_output(bits, groups):
    from millstream.ops.cases.channel import made

    x, stream, outputs, _ = made(6, 40, 96, bits, groups)(torch.Generator().manual_seed(1))
    changed = stream.clone()
    start = 64 if groups else 0
    # The first step of the second panel, its fifth output's third input.
    changed[0, start + 64 + 4 * 4 + 2] ^= 1
    native = channel_native()
    different = (native(x, stream, outputs, bits) != native(x, changed, outputs, bits)).any(0)
    assert different.nonzero().flatten().tolist() == [16 + 4]


def test_a_row_that_is_not_finite_is_not_finite_behind_a_product_of_whole_rows():
    from millstream.ops.cases.channel import made

    x, stream, outputs, bits = made(4, 40, 96, 4, 3)(torch.Generator().manual_seed(1))
    x[1, 95], x[2, 3] = torch.nan, torch.inf
    sound = torch.tensor([True, False, False, True])
    for function in (channel_native(), TABLES["linear_channel"].op.reference):
        assert torch.equal(torch.isfinite(function(x, stream, outputs, bits)).all(1), sound)
        assert torch.equal(torch.isfinite(function(x, stream, outputs, bits)).any(1), sound)


@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (4, 0), (4, 1), (4, 3)])
def test_a_stream_of_whole_rows_gives_back_what_was_packed(bits, groups):
    from millstream.ops.cases.channel import made
    from millstream.ops.ref.channel import groups_of, pack_stream, rows_of, unpack_stream, weights_of

    _, stream, outputs, _ = made(1, 45, 96, bits, groups)(torch.Generator().manual_seed(4))
    assert groups_of(stream, 96, bits) == groups
    found = unpack_stream(stream, outputs, 96, bits)
    second = (found["step"], found["z"]) if groups else None
    assert torch.equal(pack_stream(found["codes"], found["scale"], bits, found.get("zero"), second), stream)
    rows = torch.tensor([outputs - 1, 0, 33])
    whole = weights_of(stream, outputs, 96, bits)
    assert torch.equal(rows_of(stream, rows, outputs, 96, bits), whole[rows])


def test_the_native_product_of_whole_rows_refuses_what_does_not_fit_together():
    from millstream.ops.cases.channel import made

    x, stream, outputs, bits = made(2, 40, 96, 4, 3)(torch.Generator().manual_seed(4))
    native = channel_native()
    for args in (
        (x[:, :64], stream, outputs, bits),
        (x, stream, outputs + 32, bits),
        (x, stream[:, :-1].contiguous(), outputs, bits),
        (x, stream, outputs, bits, torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"outputs|x 96|x 64"):
            native(*args)


def _native(name):
    found = TABLES[name].op.implementations["cpu"]
    refusal = found.accepts(table.Ask("cpu", torch.float32))
    if refusal is not None:
        pytest.skip(refusal.reason)
    return found.function


@pytest.mark.parametrize("width", [64, 77])
def test_what_is_done_to_a_row_has_the_same_bits_in_any_company(width):
    generator = torch.Generator().manual_seed(width)
    # Enough for several threads, and strided as parts of one product are.
    whole = torch.randn(1500, 3 * width, generator=generator)
    x, other = whole[:, :width], whole[:, width : 2 * width]
    heads, weight = whole.view(1500, 3, width)[:, 1:], torch.randn(width, generator=generator)
    cos, sin = torch.randn(1500, 16, generator=generator), torch.randn(1500, 16, generator=generator)
    calls = {
        "silu_mul": lambda run, rows: run(x[rows], other[rows]),
        "apply_rope": lambda run, rows: run(heads[rows], cos[rows], sin[rows]),
        "rms_norm": lambda run, rows: run(heads[rows], weight, 1e-6),
    }
    for name, call in calls.items():
        run = _native(name)
        together = call(run, slice(None))
        torch.testing.assert_close(together, call(TABLES[name].op.reference, slice(None)), atol=5e-6, rtol=2e-6)
        for rows in (slice(0, 1), slice(700, 705), slice(3, 1499)):
            assert torch.equal(call(run, rows), together[rows])


def test_what_is_not_finite_stays_so_in_what_is_done_to_rows():
    bad = torch.ones(2, 40)
    bad[0, 3], bad[0, 39], bad[1, 38] = torch.nan, torch.inf, torch.nan
    gated = _native("silu_mul")(bad, torch.ones(2, 40))
    assert gated.isnan().nonzero().tolist() == [[0, 3], [1, 38]] and gated[0, 39] == torch.inf
    assert bool(_native("rms_norm")(bad, torch.ones(40), 1e-6)[:, 0].isnan().all())
    turned = _native("apply_rope")(bad[:, None], torch.ones(2, 20), torch.zeros(2, 20))
    assert bool(turned[0, 0, 3].isnan()) and bool(turned[1, 0, 38].isnan())
