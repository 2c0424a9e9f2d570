"""The modules compute what the decoder does, and their beams are those of the naive search and of the engine."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engine.beam_oracle import search

import oracle
import support
import tiny_model
from millstream.bench.modules import Concatenated, Modules, _products, beam_search
from millstream.core.registry import Choice
from millstream.core.request import SamplingParams
from millstream.models.blocks.linear import Linear, weight_format
from millstream.models.spec import LinearSpec

FAMILIES = ("llama", "gemma")


def text(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, tiny_model.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_decoders_in_prompts_and_behind_them(family):
    decoder = tiny_model.decoder(family)
    ids, known = text(30), 21  # the window is 12
    want = oracle.logits(decoder, ids)
    modules = Modules(decoder)
    got, cache = modules.prompt(ids[:known])
    torch.testing.assert_close(got[0], want[known - 1], atol=1e-4, rtol=1e-4)
    held = cache.expanded(3)
    for place in range(known, len(ids)):
        got = modules.forward(torch.tensor([ids[place : place + 1]] * 3), place, held)
        torch.testing.assert_close(got, want[place].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert held.layers[0][0].shape[:3] == (3, 2, len(ids))


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_the_naive_search(family, width):
    decoder, prompt, new = tiny_model.decoder(family), text(9, 3), 7
    modules = Modules(decoder)
    found = beam_search(modules, *modules.prompt(prompt), width, new)

    def ranked(tokens, vocab):
        return list(zip(oracle.logprobs(decoder, list(tokens))[-1].tolist(), range(vocab), strict=True))

    want = search(prompt, width, new, tiny_model.VOCAB, ranked=ranked)
    assert [output for _, output in found.beams] == [output for _, output in want]
    assert [score for score, _ in found.beams] == pytest.approx([score for score, _ in want], abs=1e-4)
    assert len(found.step_s) == new - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_outputs_are_those_that_their_search_summed(family):
    modules, prompt = Modules(tiny_model.decoder(family)), text(11, 4)
    logits, cache = modules.prompt(prompt)
    found = beam_search(modules, logits, cache, 5, 8)
    said = modules.score(logits, cache, [tokens for _, tokens in found.beams])
    assert said == pytest.approx([score for score, _ in found.beams], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_finds_the_same_beams_over_forks(family):
    decoder, prompt, width, new = tiny_model.decoder(family), text(37, 5), 6, 20
    modules = Modules(decoder)
    want = beam_search(modules, *modules.prompt(prompt), width, new).beams
    bench = support.Bench(decoder, block_size=16, blocks=64)
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    heard = bench.add(prompt, params, decode=Choice("beam", {"width": width}))
    bench.run()
    got = [(heard.last(index).cumulative_logprob, list(heard.last(index).replaced or ())) for index in range(width)]
    assert [tokens for _, tokens in got] == [tokens for _, tokens in want]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)
    bench.close()


def test_a_step_copies_the_cache_once_to_append_and_once_to_pick():
    decoder, prompt, width = tiny_model.decoder("llama"), text(10), 4
    modules = Modules(decoder)
    token = sum(k[0, :, 0].nbytes + v[0, :, 0].nbytes for k, v in modules.prompt(prompt)[1].layers)
    found = beam_search(modules, *modules.prompt(prompt), width, 4)
    # Three steps; the last one does not pick.
    assert found.copied_bytes == width * token * (11 + 11 + 12 + 12 + 13)
    assert found.kv_bytes == width * token * 13


def test_rows_are_picked_as_parents_say():
    cache = Concatenated([(torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3.0).view(3, 1, 1, 1) + 10)])
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.layers[0][0].flatten().tolist() == [2.0, 2.0, 0.0]
    assert cache.layers[0][1].flatten().tolist() == [12.0, 12.0, 10.0]


def test_matrices_in_codes_are_multiplied_part_by_part():
    form = weight_format("block4")
    weight = torch.randn(160, 64, generator=torch.Generator().manual_seed(1))
    linear = Linear(LinearSpec(64, 160), form.pack(weight), form)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    parts = [product(x) for product in _products(linear, (96, 32, 32))]
    assert torch.equal(torch.cat(parts, -1), linear(x))
    with pytest.raises(ValueError, match="pairs of panels"):
        _products(linear, (100, 60))


def test_what_it_does_not_know_is_refused():
    form = weight_format("dense")
    linear = Linear(LinearSpec(4, 6, bias=True), form.pack(torch.ones(6, 4), torch.ones(6)), form)
    with pytest.raises(ValueError, match="biases"):
        _products(linear, (6,))
    with pytest.raises(ValueError, match="mixture"):
        Modules(support.tiny_decoder("tiny-moe", "ref"))
