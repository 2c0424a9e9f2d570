"""Every family gives transformers' logits on the same weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tiny

import oracle
from millstream.models.load import load_model
from millstream.models.source import open_source

PROMPT = [1, *torch.randint(3, 199, (47,), generator=torch.Generator().manual_seed(5)).tolist()]


def theirs(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("made", tiny.CASES, ids=lambda made: made.name)
def test_logits_equal_those_of_transformers(made, tmp_path):
    model = tiny.write(made, tmp_path)
    loaded = load_model(open_source(tmp_path))
    assert loaded.spec.family == made.family
    want, got = theirs(model, PROMPT), oracle.logits(loaded.decoder, PROMPT)
    assert want.abs().max() > 1, "a model that says nothing would agree with anything"
    torch.testing.assert_close(got, want, rtol=made.rtol, atol=made.atol)
