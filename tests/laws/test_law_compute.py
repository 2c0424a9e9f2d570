"""What every KV format, weight format, attention backend, family, decode method and runner keeps to."""

from __future__ import annotations

import pytest
import torch

import oracle
import tiny_model
from millstream.core import registry
from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError, MillstreamError
from millstream.core.plan import (
    FROM_PREVIOUS,
    NO_BLOCK,
    Extend,
    Holding,
    Move,
    SampleAsk,
    ScoreAsk,
    StepPlan,
    Tier,
)
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.models.families.protocol import Family
from millstream.ops.attention.protocol import AttentionAsk
from millstream.ops.layout import BatchLayout, GroupLayout
from millstream.runner.null_runner import NullRunner

GROUP = CacheGroup("full", num_layers=2, kv_heads=2, head_dim=16)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- KV formats


def kv_close(name, got, want):
    if registry.card("kv", name).lossless:
        assert torch.equal(got.float(), want)
    else:
        assert torch.linalg.vector_norm(got.float() - want) < 0.5 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("name", registry.names("kv"))
def test_pages_give_back_what_was_written_wherever_it_was_moved(name):
    pages = registry.make("kv", name, device=True).allocate(GROUP, 6, 16, "float32", 3)
    assert (pages.num_blocks, pages.num_host_blocks, pages.block_size) == (6, 3, 16)
    k, v = randn(32, 2, 16), randn(32, 2, 16, seed=1)
    first, second = torch.arange(16), torch.arange(64, 80)
    for layer in range(2):
        pages.write(layer, torch.cat([first, second]), k + layer, v - layer)
    pages.move([0], [2], Tier.DEVICE, Tier.HOST)
    pages.write(0, first, v[:16], k[:16])
    pages.move([2], [1], Tier.HOST, Tier.DEVICE)
    pages.move([4], [3])
    for layer in range(2):
        read_k, read_v = pages.read(layer, torch.cat([torch.arange(16, 32), torch.arange(48, 64)]))
        kv_close(name, read_k, k + layer)
        kv_close(name, read_v, v - layer)
    kv_close(name, pages.read(0, first)[0], v[:16])


@pytest.mark.parametrize("name", registry.names("kv"))
def test_a_format_plans_its_bytes_without_allocating(name):
    host = registry.make("kv", name)
    one, two = host.page_bytes(GROUP, 16), host.page_bytes(GROUP, 32)
    assert isinstance(one, int) and 0 < one < two <= 2 * one + 4096
    assert registry.make("kv", name, device=True).keys in ("rotated", "raw")


# -- weight formats


@pytest.mark.parametrize("name", registry.names("weights"))
def test_a_packed_matrix_multiplies_like_the_one_it_unpacks_to(name):
    form = registry.make("weights", name)
    weight, bias, x = randn(48, 64) * 0.1, randn(48, seed=2), randn(5, 64, seed=3)
    for b in (None, bias):
        packed = form.pack(weight, b)
        assert packed.format == form.name == name and packed.shape == (48, 64) and packed.nbytes > 0
        got = form.linear(x, packed)
        want = form.seen(x) @ form.unpack(packed).float().T + (0 if b is None else b)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        if registry.card("weights", name).lossless:
            assert torch.equal(form.unpack(packed).float(), weight) and torch.equal(form.seen(x), x)
        which = torch.tensor([47, 0, 5, 5])
        assert torch.equal(form.rows(packed, which), form.unpack(packed)[which])
        halves = [form.shard(packed, "column", rank, 2) for rank in range(2)]
        torch.testing.assert_close(torch.cat([form.linear(x, h) for h in halves], -1), got, rtol=1e-4, atol=1e-4)
        rows = [form.shard(packed, "row", rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([form.unpack(part) for part in rows], 1), form.unpack(packed))
        # A rank rounds the inputs that it has: formats with one scale a token round parts of it on their own.
        parts = [x[:, :32], x[:, 32:]]
        summed = form.linear(parts[0], rows[0]) + form.linear(parts[1], rows[1])
        want = sum(form.seen(part) @ form.unpack(row).float().T for part, row in zip(parts, rows, strict=True))
        torch.testing.assert_close(summed, want + (0 if b is None else b), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError):
        form.shard(form.pack(weight), "column", 0, 7)


# -- attention backends


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", registry.names("attention"))
def test_an_attention_backend_agrees_with_the_reference_or_refuses(name, window, softcap):
    pages = registry.make("kv", "plain", device=True).allocate(GROUP, 12, 16, "float32")
    ask = AttentionAsk("cpu", "float32", "float32", pages.layout, 4, 2, 16, 16, window, softcap)
    backend, reference = registry.make("attention", name), registry.make("attention", "torch-ref")
    assert isinstance(backend.preference, int)
    refusal = backend.accepts(ask)
    if refusal is not None:
        assert refusal.reason
        pytest.skip(refusal.reason)
    pages.write(0, torch.arange(192), randn(192, 2, 16, seed=4), randn(192, 2, 16, seed=5))
    tables = torch.tensor([[3, 1, 7], [11, 0, -1], [5, -1, -1]], dtype=torch.int32)
    counts, lens = torch.tensor([1, 20, 4]), torch.tensor([40, 25, 4], dtype=torch.int32)
    start = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    positions = torch.cat([torch.arange(length - n, length) for n, length in zip(counts, lens, strict=True)])
    layout = BatchLayout(start, positions, lens, {"full": GroupLayout(positions, tables)}, 16, 20, 40)
    q = randn(25, 4, 16, seed=6)
    got = backend.run(q, pages, 0, backend.prepare(layout), 0.25, window, softcap)
    want = reference.run(q, pages, 0, reference.prepare(layout), 0.25, window, softcap)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


# -- families


@pytest.mark.parametrize("name", registry.names("family"))
def test_a_family_knows_its_own_and_refuses_the_rest_without_raising(name):
    family: Family = registry.make("family", name)
    assert family.name == name
    for config in (
        {},
        {"model_type": "nothing-like-it"},
        {"model_type": None},
        {"model_type": 3},
        {"architectures": []},
    ):
        assert family.matches(config) is False
    own = {"model_type": name.replace("-", "_")}
    if family.matches(own):
        with pytest.raises(MillstreamError):
            family.spec(own)
    assert family.rename("no.such.tensor") == "no.such.tensor"


# -- decode methods


@pytest.mark.parametrize("name", registry.names("decode"))
def test_a_decode_method_settles_every_row_or_says_why_not(name):
    host = registry.make("decode", name)
    request = Request(0, (Tokens((1, 2)),), SamplingParams(n=2, temperature=0.0))
    assert 1 <= host.num_outputs(request) <= host.num_sequences(request)
    device = registry.get_device("decode", name)()
    logits = randn(3, 30, seed=8)
    logits[1, 4] = torch.nan
    params = SamplingParams(temperature=0.0)
    asks = [SampleAsk(params, 0, 0, 5, 2, top_logprobs=3) for _ in range(3)]
    tokens, records, faults = device.settle(logits.clone(), asks, [[], [], []])
    assert [fault is None for fault in faults] == [True, False, True]
    for row in (0, 2):
        logprobs = logits[row].log_softmax(-1)
        assert tokens[row] == int(logprobs.argmax()) and len(records[row].top) == 3
        assert records[row].chosen.logprob == pytest.approx(float(logprobs[tokens[row]]), abs=1e-5)
        values = [entry.logprob for entry in records[row].top]
        assert values == sorted(values, reverse=True) and [e.rank for e in records[row].top] == [1, 2, 3]


# -- runners: plans in, results out, strictly in launch order


def runners(plans):
    groups = (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 8))
    yield NullRunner(60, groups, 4, 32, 8, plans), ("full", "window")
    decoder = tiny_model.decoder("gemma")
    runner = tiny_model.runner(decoder, block_size=4, num_blocks=32, host_blocks=8, plans=plans)
    yield runner, tuple(group.name for group in decoder.spec.groups)


def held(names, blocks, length):
    return tuple(Holding(name, tuple(blocks), length) for name in names)


@pytest.mark.parametrize("plans", [1, 2])
def test_a_runner_takes_plans_in_order_and_answers_row_by_row(plans):
    params = SamplingParams(temperature=0.0, logprobs=1)
    prompt, other = (5, 9, 2, 7, 1), (4, 4, 8)
    for runner, groups in runners(plans):
        capacity = runner.capacity()
        assert (capacity.plans, capacity.block_size) == (plans, 4)
        assert set(capacity.blocks) == set(capacity.host_blocks) == set(groups)
        ask = SampleAsk(params, 0, 0, 5, 5, top_logprobs=1)
        whole = StepPlan(
            0,
            (
                Extend(0, 0, prompt, held(groups, (3, 1), 5), sample=ask, decode="autoregressive"),
                Extend(1, 0, other, held(groups, (8,), 3), score=ScoreAsk(other[1:], 2)),
            ),
        )
        # The first row's next token is known only to the runner; its first block is read where it was moved to.
        moved = (3, 20)
        then = StepPlan(
            1,
            (Extend(0, 5, (FROM_PREVIOUS,), held(groups, (moved[1], 1), 6), sample=ask, decode="autoregressive"),),
            moves=tuple(Move(group, *moved) for group in groups),
            forgotten=(1,),
        )
        first = runner.launch(whole)
        second = runner.launch(then) if plans == 2 else None
        result = runner.collect(first)
        assert result.plan == 0 and result.seconds >= 0 and [row.seq for row in result.settled] == [0, 1]
        sampled, scored = result.settled
        assert sampled.fault is None and sampled.kept == 5 and len(sampled.tokens) == len(sampled.logprobs) == 1
        assert scored.tokens == () and [entry.chosen.token for entry in scored.prompt_logprobs] == [4, 8]
        after = runner.collect(second if second is not None else runner.launch(then)).settled[0]
        # The same as computing all six tokens at once in other blocks.
        again = StepPlan(
            2,
            (Extend(7, 0, (*prompt, *sampled.tokens), held(groups, (10, 11), 6), sample=ask, decode="autoregressive"),),
        )
        assert after.tokens == runner.collect(runner.launch(again)).settled[0].tokens
        runner.close()


def test_the_torch_runner_samples_what_the_naive_generator_does():
    decoder = tiny_model.decoder("llama")
    runner = tiny_model.runner(decoder, block_size=16, num_blocks=8)
    prompt = [5, 9, 2, 7, 1]
    ask = SampleAsk(SamplingParams(temperature=0.0), 0, 0, 5, 5)
    plan = StepPlan(0, (Extend(0, 0, tuple(prompt), held(("full",), (2,), 5), sample=ask, decode="autoregressive"),))
    assert list(runner.collect(runner.launch(plan)).settled[0].tokens) == oracle.generate(decoder, prompt, 1).tokens
    assert NO_BLOCK not in plan.extends[0].holdings[0].blocks
