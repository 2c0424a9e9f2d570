"""A model loaded with its matrices in a weight format by name: packed once, kept, mapped from then on."""

from __future__ import annotations

import paged
import pytest
import tiny
import torch

from millstream.core.errors import UnknownName
from millstream.models.cache import converted_folder
from millstream.models.load import load_model
from millstream.models.source import open_source

TOKENS = [(31 * i * i + 7) % 199 for i in range(40)]
# Products in another order; where inputs are rounded to 8 bits, on average.
ATOL, MEAN_ERROR = 1e-4, 0.05
FORMS = ("fp6-e3m2", "fp6-e2m3", "fp5-e2m2", "block8")


@pytest.fixture(params=("llama", "qwen2", "gemma3", "mixtral"))
def source(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    case = next(one for one in tiny.CASES if one.family == request.param)
    tiny.write(case, tmp_path / "model")
    return open_source(tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_a_format_computes_what_its_matrices_unpack_to(source, form):
    loaded = load_model(source, weights=form, cached=False)
    decoder = loaded.decoder
    assert form in decoder.format_bytes()
    logits = paged.Row(decoder, len(TOKENS)).run(TOKENS, 0, len(TOKENS))
    dense = load_model(source, cached=False).decoder
    # The same matrices, unpacked into the dense model.
    for layer, plain in zip(decoder.layers, dense.layers, strict=True):
        for packed, target in zip(layer.linears(), plain.linears(), strict=True):
            target.packed["weight"].copy_(packed.format.unpack(packed.packed))
    dense._embed.packed["weight"].copy_(decoder._embed.format.unpack(decoder._embed.packed))
    if not decoder.spec.tied:
        dense._head.packed["weight"].copy_(decoder._head.format.unpack(decoder._head.packed))
    want = paged.Row(dense, len(TOKENS)).run(TOKENS, 0, len(TOKENS))
    if form == "block8":
        # Its inputs are rounded to 8 bits as well.
        assert (logits - want).abs().mean() < MEAN_ERROR * want.abs().mean()
    else:
        torch.testing.assert_close(logits, want, atol=ATOL, rtol=0)


def test_it_is_packed_once_and_says_what_a_weight_takes(source):
    first = load_model(source, weights="fp6-e3m2")
    folder = converted_folder(source.checksum(), "fp6-e3m2")
    stamp = (folder / "weights.bin").stat().st_mtime_ns
    second = load_model(source, weights="fp6-e3m2")
    assert (folder / "weights.bin").stat().st_mtime_ns == stamp
    assert first.spec == second.spec and second.spec.embed_format == "fp6-e3m2"
    for name, linear in second.spec.linears():
        if linear.format == "fp6-e3m2":
            assert linear.bits is not None and linear.bits > 6.0, name
    row, again = (paged.Row(one.decoder, 9).run(TOKENS, 0, 9) for one in (first, second))
    assert torch.equal(row, again)


def test_a_format_that_does_not_exist_is_named_with_the_nearest(source):
    with pytest.raises(UnknownName, match=r"nearest is 'fp6-e3m2'"):
        load_model(source, weights="fp6-e3m3")
