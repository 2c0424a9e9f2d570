"""Every attention backend over the case table, and what the native one promises to the last bit."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName
from millstream.ops import table
from millstream.ops.attention.protocol import AttentionAsk, choose
from millstream.ops.cases.attention import CASES, AttentionCase

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
OVER_PLAIN_PAGES = [name for name in registry.names("attention") if name not in ("cpu-int8", "cpu-int4")]
# Each token of each row alone is slow on long rows and adds nothing there.
EXACT = "cpu-paged"


@pytest.mark.parametrize("name", OVER_PLAIN_PAGES)
@EVERY_CASE
def test_every_backend_agrees_with_the_float64_formula(name, case, lay_out, backend_for):
    step = lay_out(case)
    out, lse = step.whole(backend_for(name, case))
    exact_out, exact_lse = case.exact()
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact_out, atol=case.atol, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=case.atol, rtol=1e-6)


@EVERY_CASE
def test_the_native_kernel_gives_the_same_bits_for_every_row_alone(case, lay_out, backend_for):
    step, backend = lay_out(case), backend_for(EXACT, case)
    out, lse = step.whole(backend)
    token = 0
    for row, (n, length) in enumerate(case.rows):
        alone = step.run(backend, step.layout([(row, n, length)]), step.q[token : token + n])
        assert torch.equal(alone[0], out[token : token + n])
        assert torch.equal(alone[1], lse[token : token + n])
        token += n


@EVERY_CASE
def test_the_native_kernel_gives_the_same_bits_however_a_row_is_chunked(case, lay_out, backend_for):
    step, backend = lay_out(case), backend_for(EXACT, case)
    out, lse = step.whole(backend)
    chance, token = random.Random(5), 0
    for row, (n, length) in enumerate(case.rows):
        done = 0
        while done < n:
            take = min(n - done, chance.choice((1, 1, 2, 5, 16, 33)))
            stop = length - n + done + take
            at = token + done
            # A neighbour shares the batch, so that work is ordered differently as well.
            chunk = step.run(
                backend,
                step.layout([(row, take, stop), (row, 1, stop)]),
                torch.cat((step.q[at : at + take], step.q[at : at + 1])),
            )
            assert torch.equal(chunk[0][:take], out[at : at + take])
            assert torch.equal(chunk[1][:take], lse[at : at + take])
            done += take
        token += n


@pytest.mark.parametrize("rows", [((1, 2500),), ((1, 40), (1, 1900)), ((64, 1600),), ((200, 200), (1, 700))])
def test_the_native_kernel_gives_the_same_bits_on_any_number_of_threads(rows, lay_out, backend_for, threads):
    case = AttentionCase("threads", rows)
    step, backend = lay_out(case), backend_for(EXACT, case)
    threads(1)
    out, lse = step.whole(backend)
    for count in (2, 3, 5):
        threads(count)
        for _ in range(3):
            again = step.whole(backend)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_the_native_kernel_gives_the_same_bits_for_any_block_size(lay_out, backend_for):
    results = []
    for block_size in (16, 48, 64, 256):
        case = AttentionCase("blocks", ((30, 700), (1, 333)), block_size=block_size)
        results.append(lay_out(case).whole(backend_for(EXACT, case)))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_a_query_may_come_as_a_strided_slice(lay_out, backend_for):
    case = AttentionCase("strided", ((5, 90), (1, 64)))
    step, backend = lay_out(case), backend_for(EXACT, case)
    qkv = torch.zeros(6, 15, 64)
    qkv[:, :9] = step.q
    layout = step.layout([(0, 5, 90), (1, 1, 64)])
    assert torch.equal(step.run(backend, layout, qkv[:, :9])[0], step.whole(backend)[0])


def test_a_row_of_nans_leaves_its_neighbours_alone(lay_out, backend_for):
    case = AttentionCase("nan", ((3, 90), (2, 70)))
    step, backend = lay_out(case), backend_for(EXACT, case)
    clean, _ = step.whole(backend)
    step.q[:3] = torch.nan
    out, _ = step.whole(backend)
    assert torch.isnan(out[:3]).all()
    assert torch.equal(out[3:], clean[3:])


def test_reading_in_place_copies_no_keys_and_the_reference_counts_what_it_gathers(lay_out, backend_for):
    case = AttentionCase("bytes", ((1, 500), (1, 900)))
    step = lay_out(case)
    before = dataclasses.replace(step.pages.copied)
    step.whole(backend_for("cpu-paged", case))
    assert step.pages.copied == before
    step.whole(backend_for("torch-ref", case))
    token_bytes = 2 * 3 * 64 * 4
    assert step.pages.copied.gather_bytes == (500 + 900) * token_bytes


@pytest.mark.parametrize("break_it", ["no block", "block beyond", "table too short", "more queries than tokens"])
def test_a_row_without_its_blocks_is_an_error_not_a_crash(break_it, lay_out, backend_for):
    case = AttentionCase("broken", ((2, 200),))
    step, backend = lay_out(case), backend_for(EXACT, case)
    layout = step.layout([(0, 2, 200)])
    tables = layout.groups["full"].block_tables
    if break_it == "no block":
        tables[0, 1] = -1
    elif break_it == "block beyond":
        tables[0, 1] = step.pages.num_blocks
    elif break_it == "table too short":
        layout.seq_lens[0] = 5000
    else:
        layout.seq_lens[0] = 1
    with pytest.raises(IndexError):
        step.run(backend, layout, step.q)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"page_layout": "kv4"}, "kv4"),
        ({"page_dtype": "float16"}, "float16"),
        ({"tree": True}, "tree"),
        ({"block_size": 24}, "multiple of 16"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"query_heads": 10}, "multiple of 3"),
    ],
)
def test_the_native_backend_says_why_it_refuses(change, reason):
    ask = AttentionAsk("cpu", "float32", "float32", "k-transposed", 9, 3, 64, 64)
    refusal = registry.make("attention", "cpu-paged").accepts(dataclasses.replace(ask, **change))
    assert refusal is not None and reason in refusal.reason


def test_choosing_falls_to_the_reference_and_tells_why():
    ask = AttentionAsk("cpu", "float32", "float32", "k-transposed", 9, 3, 20, 64)
    choice = choose(ask)
    assert choice.name == "torch-ref"
    assert any(name == "cpu-paged" and "multiple of 8" in why for name, why in choice.refused)


def test_choosing_obeys_the_use_of_references():
    ask = AttentionAsk("cpu", "float32", "float32", "k-transposed", 9, 3, 64, 64)
    with table.use("ref"):
        choice = choose(ask)
    assert choice.name == "torch-ref" and ("cpu-paged", "the reference was asked for") in choice.refused
    assert choose(ask, use="ref").name == "torch-ref"


def test_a_named_backend_that_refuses_is_an_error():
    ask = AttentionAsk("cpu", "float32", "float32", "k-transposed", 9, 3, 20, 64)
    with pytest.raises(ConfigError, match="multiple of 8"):
        choose(ask, "cpu-paged")
    with pytest.raises(UnknownName, match="cpu-paged"):
        choose(ask, "cpu-pagd")


# -- pages of codes: held to the reference over what they hold, so that only what attention itself rounds is seen

CODES = [case for case in CASES if case.page_dtype == "float32"]
EVERY_CODE_CASE = pytest.mark.parametrize("case", CODES, ids=lambda case: case.name)
EVERY_CODE = pytest.mark.parametrize("kv", ["int8", "int4"])


def over_codes(case, kv, lay_out):
    step, backend = lay_out(case, kv), registry.make("attention", f"cpu-{kv}")
    ask = AttentionAsk(
        "cpu", "float32", "uint8", step.pages.layout, case.heads, case.kv_heads, case.dim, case.block_size,
        case.window, case.softcap,
    )  # fmt: skip
    refusal = backend.accepts(ask)
    if refusal is not None:
        pytest.skip(refusal.reason)
    return step, backend


@EVERY_CODE
@EVERY_CODE_CASE
def test_coded_pages_are_attended_to_as_what_they_hold(case, kv, lay_out):
    step, backend = over_codes(case, kv, lay_out)
    out, lse = step.whole(backend)
    want, told = step.whole(registry.make("attention", "torch-ref"))
    torch.testing.assert_close(out, want, atol=case.codes_atol, rtol=0)
    torch.testing.assert_close(lse, told, atol=case.codes_atol, rtol=0)


@EVERY_CODE
@EVERY_CODE_CASE
def test_coded_pages_give_the_same_bits_alone_in_chunks_and_on_any_number_of_threads(case, kv, lay_out, threads):
    step, backend = over_codes(case, kv, lay_out)
    threads(2)
    out, lse = step.whole(backend)
    chance, token = random.Random(7), 0
    for row, (n, length) in enumerate(case.rows):
        threads(1 + row % 2)
        done = 0
        while done < n:
            take = min(n - done, chance.choice((1, 2, 5, 16, 33)))
            at = token + done
            chunk = step.run(backend, step.layout([(row, take, length - n + done + take)]), step.q[at : at + take])
            assert torch.equal(chunk[0], out[at : at + take]) and torch.equal(chunk[1], lse[at : at + take])
            done += take
        token += n
