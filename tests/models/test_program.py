"""The native program: the same layers as called one by one, in blocks; and blocks as they were stored."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import paged
import pytest
import tiny
import torch

from millstream.models.decoder import Decoder, build
from millstream.models.dequant import coded, dequantize
from millstream.models.gguf import BLOCKS
from millstream.models.load import load_model
from millstream.models.program import Program
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import quantize
from millstream.models.source import open_source
from millstream.ops import table
from millstream.ops.cpu import program as native
from millstream.ops.ref.blocks import pack_stream, weights_of

# Families that differ in what a layer does: biases, norms of q and k, norms behind, windows, gelu, tied heads.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
TOKENS = [(31 * i * i + 7) % 199 for i in range(70)]
# Where activations are rounded to 8 bits, a last digit that differs can move a value by a whole step.
MEAN_ERROR = 0.02


@pytest.fixture(autouse=True)
def _there_is_a_program():
    refusal = native.refusal()
    if refusal is not None:
        pytest.skip(refusal.reason)


@pytest.fixture(scope="module", params=FAMILIES)
def tensors(request, tmp_path_factory):
    case = next(one for one in tiny.CASES if one.family == request.param)
    folder = tmp_path_factory.mktemp(request.param)
    wide = tiny.Case(case.name, case.family, case.model, {**case.options, "intermediate_size": 96})
    tiny.write(wide, folder)
    source = open_source(folder)
    decoder = load_model(source).decoder
    from millstream.models.cache import load_tensors
    from millstream.models.families.protocol import find_family
    from millstream.models.load import prepare

    family = find_family(source.config)
    ready, _ = prepare(source, family, decoder.spec, load_tensors(source))
    return decoder.spec, ready


def built(tensors, form: str = "block8") -> Decoder:
    spec, ready = tensors
    return build(*quantize(spec, ready, Recipe.plain(form, head=form if form == "w8a8" else "block8")))


def one_by_one(decoder: Decoder) -> Decoder:
    """The same decoder, its layers called one after the other."""
    again = object.__new__(Decoder)
    again.__dict__.update(decoder.__dict__, program=table.Refusal("for comparison"))
    return again


@pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
@pytest.mark.parametrize("form", ["block4", "block8", "w8a8", "w4a8"])
def test_the_program_computes_what_its_layers_do(tensors, form, kv):
    decoder = built(tensors, form)
    assert isinstance(decoder.program, Program), decoder.program
    backend = "cpu-paged" if kv == "plain" else f"cpu-{kv}"
    got = paged.Row(decoder, len(TOKENS), backend, kv).run(TOKENS, 0, len(TOKENS))
    want = paged.Row(one_by_one(decoder), len(TOKENS), backend, kv).run(TOKENS, 0, len(TOKENS))
    assert (got - want).abs().mean() < MEAN_ERROR * want.abs().mean()


@pytest.mark.parametrize(("form", "kv"), [("block8", "int8"), ("w8a8", "int8"), ("w4a8", "int8"), ("block8", "int4")])
def test_chunks_layer_ranges_and_threads_change_no_bit(tensors, form, kv):
    decoder, backend = built(tensors, form), f"cpu-{kv}"
    whole = paged.Row(decoder, len(TOKENS), backend, kv).run(TOKENS, 0, len(TOKENS))
    row = paged.Row(decoder, len(TOKENS), backend, kv)
    edges = [0, 1, 16, 17, 50, len(TOKENS)]
    before = torch.get_num_threads()
    parts = []
    for place, (start, stop) in enumerate(itertools.pairwise(edges)):
        torch.set_num_threads(1 + place % 3)
        parts.append(row.run(TOKENS, start, stop))
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), whole)
    for split in range(len(decoder.layers) + 1):
        row = paged.Row(decoder, len(TOKENS), backend, kv)
        step = row.step(0, len(TOKENS))
        with torch.inference_mode():
            x = decoder.run_layers(decoder.embed(torch.tensor(TOKENS)), 0, split, step)
            assert torch.equal(decoder.head(decoder.run_layers(x, split, len(decoder.layers), step)), whole)


def test_the_likeliest_token_is_that_of_the_logits(tensors):
    decoder = built(tensors)
    x = torch.randn(9, decoder.spec.width, generator=torch.Generator().manual_seed(2)) * 3
    x[4] = torch.nan
    rows = torch.tensor([0, 8, 4, 3, 3])
    tokens, most = map(torch.tensor, decoder.best(x, rows.tolist()))
    logits = decoder.head(x)[rows]
    sound = rows != 4
    assert torch.equal(tokens[sound], logits[sound].argmax(-1)) and torch.equal(most[sound], logits[sound].amax(-1))
    assert torch.isnan(most[~sound]).all()


def test_a_block_that_is_not_held_is_an_error_and_the_next_step_is_well(tensors):
    decoder = built(tensors)
    row = paged.Row(decoder, len(TOKENS), "cpu-int8", "int8")
    step = row.step(0, 20)
    held = row.blocks.clone()
    row.blocks[1] = -1  # the tables of the step are views of it
    with pytest.raises(IndexError), torch.inference_mode():
        decoder.forward(torch.tensor(TOKENS[:20]), step)
    row.blocks.copy_(held)
    whole = paged.Row(decoder, len(TOKENS), "cpu-int8", "int8").run(TOKENS, 0, 20)
    assert torch.equal(row.run(TOKENS, 0, 20), whole)


def test_what_the_program_does_not_know_is_said_and_called_layer_by_layer():
    with table.use("ref"):
        assert "reference" in reason("tiny-llama")
    assert "mixture of experts" in reason("tiny-moe")
    from support import tiny_decoder

    dense = tiny_decoder("tiny-llama", "auto").program
    assert isinstance(dense, table.Refusal) and "dense" in dense.reason


def reason(name: str) -> str:
    from support import tiny_tensors

    made = build(*quantize(*tiny_tensors(name), Recipe.plain("block8"))).program
    assert isinstance(made, table.Refusal)
    return made.reason


# -- blocks as GGUF stores them


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"])
def test_stored_codes_are_what_dequantizing_gives(kind):
    values = np.random.default_rng(5).standard_normal((48, 512), dtype=np.float32)
    if kind.endswith("K"):
        raw = np.random.default_rng(6).integers(0, 256, (48 * 512 // 256, BLOCKS[kind][1]), dtype=np.uint8)
        raw[:, :4] = np.tile(np.array([0.01, 0.02], np.float16).view(np.uint8), (len(raw), 1))
    else:
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    data = torch.from_numpy(raw.copy())
    found = coded(data, kind, (48, 512))
    assert found is not None
    bits, codes, d, m = found
    assert bits == (4 if kind.startswith("Q4") else 8) and int(codes.max()) < 1 << bits
    want = dequantize(data, kind, (48, 512))
    torch.testing.assert_close(weights_of(pack_stream(codes, d, m, bits), 48, 512, bits), want, rtol=2e-3, atol=2e-3)
    if not kind.endswith("K"):
        assert torch.equal(codes.float().mul_(d[..., None]).add_(m[..., None]).view(48, 512), want)


def test_other_types_are_not_of_this_form():
    assert coded(torch.zeros(210, dtype=torch.uint8), "Q6_K", (1, 256)) is None
    assert coded(torch.zeros(128, dtype=torch.uint8), "F32", (1, 32)) is None
