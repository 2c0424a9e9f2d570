"""The decoder in pieces equals the decoder as a whole: by positions, by layers, by modules."""

from __future__ import annotations

import pytest
import torch

import oracle

pytest.importorskip("transformers")
import tiny
from paged import Row

from millstream.models.load import load_model
from millstream.models.source import open_source

NUM_TOKENS = 41
TOKENS = [1, *torch.randint(3, 199, (NUM_TOKENS - 1,), generator=torch.Generator().manual_seed(7)).tolist()]
# Logits of a few units in float32, summed in another order.
ATOL = 5e-5


@pytest.fixture(scope="module", params=["llama-llama3", "gemma3", "qwen2-moe", "mistral-window"])
def decoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny.write(tiny.case(request.param), folder)
    return load_model(open_source(folder)).decoder


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


def test_pages_give_what_the_naive_generator_gives(decoder):
    close(Row(decoder, NUM_TOKENS).run(TOKENS, 0, NUM_TOKENS), oracle.logits(decoder, TOKENS))


def test_a_prefill_cut_at_every_offset_equals_the_whole(decoder):
    whole = oracle.logits(decoder, TOKENS)
    row = Row(decoder, NUM_TOKENS)
    row.run(TOKENS, 0, NUM_TOKENS)
    for cut in range(1, NUM_TOKENS):
        # The first `cut` tokens are in the pages already: computing the tail again must change nothing.
        close(row.run(TOKENS, cut, NUM_TOKENS), whole[cut:])
    fresh = Row(decoder, NUM_TOKENS)
    for cut in (1, 15, 16, 17, 33):
        close(fresh.run(TOKENS, 0, cut), whole[:cut])
        close(fresh.run(TOKENS, cut, NUM_TOKENS), whole[cut:])


def test_one_token_at_a_time_equals_the_whole(decoder):
    whole, row = oracle.logits(decoder, TOKENS), Row(decoder, NUM_TOKENS)
    for at in range(NUM_TOKENS):
        close(row.run(TOKENS, at, at + 1), whole[at : at + 1])


@torch.inference_mode()
def test_layer_ranges_compose_to_the_whole_at_every_split(decoder):
    tokens, num_layers = torch.tensor(TOKENS), decoder.spec.num_layers
    whole = decoder.forward(tokens, oracle.context(decoder, NUM_TOKENS))
    for split in range(num_layers + 1):
        step = oracle.context(decoder, NUM_TOKENS)
        x = decoder.run_layers(decoder.embed(tokens), 0, split, step)
        assert torch.equal(decoder.run_layers(x, split, num_layers, step), whole)


@torch.inference_mode()
def test_attention_and_channel_run_apart_with_batches_of_their_own(decoder):
    tokens = torch.tensor(TOKENS)
    step = oracle.context(decoder, NUM_TOKENS)
    x = decoder.embed(tokens)
    for layer in decoder.layers:
        x = layer.attend(x, step)
        # The channel sees rows, not sequences: any split of them is as good.
        x = torch.cat([layer.channel(x[:13]), layer.channel(x[13:14]), layer.channel(x[14:])])
    close(x, decoder.forward(tokens, oracle.context(decoder, NUM_TOKENS)))


@torch.inference_mode()
def test_a_layer_leaves_its_input_as_it_was(decoder):
    x = decoder.embed(torch.tensor(TOKENS))
    before = x.clone()
    decoder.layers[0].channel(decoder.layers[0].attend(x, oracle.context(decoder, NUM_TOKENS)))
    assert torch.equal(x, before)


@torch.inference_mode()
def test_positions_are_an_input(decoder):
    # Moving all positions by a constant turns q and k by the same angle: only rounding may change.
    step = oracle.context(decoder, NUM_TOKENS)
    step.layout.positions.add_(19)
    moved = decoder.head(decoder.forward(torch.tensor(TOKENS), step))
    torch.testing.assert_close(moved, oracle.logits(decoder, TOKENS), rtol=0, atol=1e-3)


@torch.inference_mode()
def test_the_head_takes_only_the_rows_asked(decoder):
    hidden = decoder.forward(torch.tensor(TOKENS), oracle.context(decoder, NUM_TOKENS))
    rows = decoder.head(hidden[[3, 40]])
    assert rows.shape == (2, decoder.spec.vocab_size) and rows.dtype == torch.float32
    close(rows, oracle.logits(decoder, TOKENS)[[3, 40]])


@torch.inference_mode()
def test_half_precision_stays_near_float32(tmp_path):
    tiny.write(tiny.case("llama"), tmp_path)
    exact = load_model(open_source(tmp_path)).decoder
    half = load_model(open_source(tmp_path), "bfloat16").decoder
    assert half.dtype == torch.bfloat16
    want, got = oracle.logits(exact, TOKENS), oracle.logits(half, TOKENS)
    assert got.dtype == torch.float32
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()
