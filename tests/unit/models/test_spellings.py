"""One model written in the old and in the new way is one spec. No weights here, only configurations."""

from __future__ import annotations

import pytest

from millstream.core.errors import BadFile, Unsupported
from millstream.models.families.protocol import find_family
from millstream.models.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def spec(**config):
    full = {**SIZES, **config}
    return find_family(full).spec(full)


def windows(found):
    return [layer.mixer.window for layer in found.layers]


def ropes(found):
    return [layer.mixer.rope for layer in found.layers]


def test_rope_theta_beside_rope_scaling_is_rope_parameters():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = spec(model_type="llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = spec(model_type="llama", rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling})
    assert old == new
    assert ropes(new)[0] == RopeSpec(5e5, 8, Llama3Scaling(8.0, 1.0, 4.0, 64))


def test_the_oldest_spelling_of_a_scaling_says_type():
    assert ropes(spec(model_type="llama", rope_scaling={"type": "linear", "factor": 4.0}))[0] == RopeSpec(
        10000.0, 8, LinearScaling(4.0)
    )


def test_yarn_takes_the_context_for_what_it_was_trained_on_unless_told():
    told = ropes(spec(model_type="qwen2", rope_scaling={"type": "yarn", "factor": 4.0}))[0].scaling
    assert told == YarnScaling(4.0, 256, 32.0, 1.0, pytest.approx(1.138629, abs=1e-6))
    told = ropes(
        spec(model_type="qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    )[0].scaling
    assert told.original_context == 64


def test_qwen2_slides_from_max_window_layers_on_only_when_switched_on():
    fields = {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 3}
    assert windows(spec(**fields, use_sliding_window=False)) == [None] * 4
    assert windows(spec(**fields, use_sliding_window=True)) == [None, None, None, 16]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(spec(**fields, use_sliding_window=True, layer_types=kinds)) == [16, None, None, 16]


def test_gemma3_pattern_in_three_spellings():
    fields = {"model_type": "gemma3_text", "sliding_window": 16, "head_dim": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    want = [16, None, 16, None]
    assert windows(spec(**fields, sliding_window_pattern=2)) == want
    assert windows(spec(**fields, _sliding_window_pattern=2)) == want
    assert windows(spec(**fields, layer_types=kinds)) == want


def test_gemma3_scales_only_its_global_layers():
    fields = {"model_type": "gemma3_text", "sliding_window": 16, "head_dim": 8, "sliding_window_pattern": 2}
    old = spec(**fields, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = spec(
        **fields,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    assert old == new
    assert ropes(new)[:2] == [RopeSpec(1e4, 8), RopeSpec(1e6, 8, LinearScaling(8.0))]


def test_gemma3_with_pictures_gives_its_text_part():
    text = {**SIZES, "model_type": "gemma3_text", "sliding_window": 16, "head_dim": 8}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}}
    family = find_family(whole)
    assert family.spec(whole) == family.spec(text)
    for prefix in ("language_model.model.", "model.language_model.", "model."):
        assert family.rename(f"{prefix}layers.2.mlp.up_proj.weight") == "layers.2.mlp.up.weight"
    assert family.rename("vision_tower.vision_model.embeddings.patch_embedding.weight") is None


def test_the_number_of_experts_goes_by_either_name():
    fields = {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}
    assert spec(**fields, num_experts=6) == spec(**fields, num_local_experts=6)
    with pytest.raises(BadFile, match=r"num_experts_per_tok.*7.*6"):
        spec(**{**fields, "num_experts_per_tok": 7}, num_experts=6)


def test_layers_that_slide_without_a_window_are_refused():
    with pytest.raises(BadFile, match="sliding_window"):
        spec(model_type="qwen2", layer_types=["sliding_attention"] * 4)
    with pytest.raises(BadFile, match="layer_types"):
        spec(model_type="qwen2", layer_types=["full_attention"] * 3)
    with pytest.raises(Unsupported, match="chunked_attention"):
        spec(model_type="qwen2", layer_types=["chunked_attention"] * 4)


def test_several_ids_may_end_a_text():
    assert spec(model_type="llama", eos_token_id=[5, 7]).generation.eos_ids == (5, 7)
    assert spec(model_type="llama", eos_token_id=None).generation.eos_ids == ()
