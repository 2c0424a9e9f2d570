"""Rope frequencies against transformers, which the checkpoints were published for."""

from __future__ import annotations

import pytest
import torch

from millstream.core.errors import Unsupported
from millstream.ops.ref.rope import apply_rope, rope_frequencies, rope_table

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": YARN,
    "yarn, own betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, own attention factor": {**YARN, "attention_factor": 1.25},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (128, 1000000.0), (80, 500000.0)])
def test_frequencies_equal_those_of_transformers_bit_for_bit(name, dim, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies, factor = rope_frequencies(dim, theta, scaling)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling

    positions = torch.tensor([0, 1, 17, 4095, 131071])
    cos, sin = rope_table(frequencies, factor, positions)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    assert torch.equal(torch.cat((cos, cos), -1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), their_sin[0])


def test_rotating_equals_the_transformers_rotation():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    frequencies, factor = rope_frequencies(64, 10000.0)
    cos, sin = rope_table(frequencies, factor, torch.arange(100, 107))
    x = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(0))
    theirs, _ = modeling.apply_rotary_pos_emb(
        x.transpose(0, 1)[None],
        x.transpose(0, 1)[None],
        torch.cat((cos, cos), -1)[None],
        torch.cat((sin, sin), -1)[None],
    )
    assert torch.equal(apply_rope.reference(x, cos, sin), theirs[0].transpose(0, 1))


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "su"])
def test_a_scaling_that_is_not_known_is_refused_by_name(kind):
    with pytest.raises(Unsupported, match=kind):
        rope_frequencies(64, 10000.0, {"rope_type": kind, "factor": 2.0})
