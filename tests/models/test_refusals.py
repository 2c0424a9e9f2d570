"""A model that is not understood whole is not loaded: fields, values and tensors are named in the error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from tiny import case, edit_config, write

from millstream.core.errors import BadFile, ConfigError, Unsupported
from millstream.models.decoder import build
from millstream.models.families.protocol import find_family
from millstream.models.load import load_model, prepare
from millstream.models.source import open_source


@pytest.fixture
def folder(tmp_path):
    write(case("llama"), tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, error, *words):
    with pytest.raises(error) as caught:
        load_model(open_source(folder))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_an_unknown_field_is_named_with_the_family_and_the_nearest(folder):
    edit_config(folder, sliding_windows=12)
    refused(folder, Unsupported, "sliding_windows", "12", "llama")
    edit_config(folder, sliding_windows=None, rms_norm_epsilon=1e-5)
    refused(folder, Unsupported, "rms_norm_epsilon", "nearest", "rms_norm_eps")


def test_an_unknown_family_lists_those_there_are(folder):
    edit_config(folder, model_type="rwkv7")
    refused(folder, Unsupported, "rwkv7", "llama", "gemma3", "qwen3-moe")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", 0, ["0", "an integer from 1"]),
        ("num_attention_heads", -4, ["-4"]),
        ("num_attention_heads", "six", ["six"]),
        ("num_key_value_heads", 4, ["4", "a divisor of num_attention_heads, 6"]),
        ("hidden_size", -48, ["-48"]),
        ("head_dim", 7, ["7", "even"]),
        ("rms_norm_eps", 0, ["0", "above 0"]),
        ("rms_norm_eps", float("nan"), ["nan"]),
        ("num_hidden_layers", 10**9, ["1000000000"]),
        ("attention_bias", "yes", ["yes", "true or false"]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, ["rope_theta", "-1.0"]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, ["rope_theta", "0", "above 0"]),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, ["factor", "missing"]),
        ("rope_parameters", [1], ["rope_parameters", "a mapping"]),
        ("eos_token_id", 4000, ["eos_token_id", "4000", "198"]),
        ("vocab_size", 200, ["embed_tokens", "[199, 48]", "[200, 48]"]),
        ("intermediate_size", 96, ["mlp", "[80, 48]", "[96, 48]"]),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(folder, field, value, words):
    edit_config(folder, **{field: value})
    refused(folder, BadFile, field if field not in ("vocab_size", "intermediate_size") else "tensor", *words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "relu2", ["relu2", "silu"]),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, ["dynamic", "llama3, yarn"]),
        (
            "rope_parameters",
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]},
            ["longrope", "yarn"],
        ),
        (
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta_fasst": 3},
            ["rope_parameters.beta_fasst"],
        ),
        ("partial_rotary_factor", 0.5, ["partial_rotary_factor", "0.5"]),
        ("rope_interleaved", True, ["rope_interleaved"]),
        ("is_encoder_decoder", True, ["is_encoder_decoder"]),
    ],
)
def test_a_value_that_is_not_built_is_named_with_what_is(folder, field, value, words):
    edit_config(folder, **{field: value})
    refused(folder, Unsupported, *words)


def test_a_missing_field_is_named(folder):
    edit_config(folder, hidden_size=None)
    refused(folder, BadFile, "hidden_size", "missing")


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    refused(folder, BadFile, "layers.1.attn.k.weight", "missing")


def test_a_tensor_too_many_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.bias": torch.zeros(16)}))
    refused(folder, BadFile, "model.layers.1.self_attn.k_proj.bias", "llama")


def test_a_tensor_of_another_shape_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    refused(folder, BadFile, "model.norm.weight", "[47]", "[48]")


def test_frequencies_that_old_checkpoints_store_and_a_tied_head_are_passed_over(tmp_path):
    write(case("llama-tied"), tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, add)
    assert load_model(open_source(tmp_path)).spec.tied


def test_the_builder_itself_refuses_what_its_spec_does_not_ask_for(folder):
    source = open_source(folder)
    family = find_family(source.config)
    spec = family.spec(source.config)
    tensors, _ = prepare(source, family, spec, {name: source.tensor(name) for name in source.tensor_names()})
    with pytest.raises(BadFile, match=r"final_norm\.weight.*missing"):
        build(spec, {k: v for k, v in tensors.items() if k != "final_norm.weight"})
    with pytest.raises(BadFile, match="not part of this model"):
        build(spec, {**tensors, "layers.9.mixer_norm.weight": torch.zeros(48)})
    with pytest.raises(BadFile, match="shape"):
        build(dataclasses.replace(spec, vocab_size=198), tensors)
    with pytest.raises(ConfigError, match="float31"):
        build(spec, tensors, "float31")


def test_weights_are_shared_with_what_was_loaded_not_copied(folder):
    source = open_source(folder)
    family = find_family(source.config)
    spec = family.spec(source.config)
    held = {name: source.tensor(name) for name in source.tensor_names()}
    tensors, copied = prepare(source, family, spec, held)
    assert tensors["layers.0.mlp.down.weight"].data_ptr() == held["model.layers.0.mlp.down_proj.weight"].data_ptr()
    fused = sum(t.nbytes for name, t in tensors.items() if name.endswith(("qkv.weight", "gate_up.weight")))
    assert copied <= fused


def test_parts_that_lie_one_after_the_other_are_stacked_without_a_copy(folder):
    source = open_source(folder)
    family = find_family(source.config)
    spec = family.spec(source.config)
    held = {name: source.tensor(name) for name in source.tensor_names()}
    for layer in range(spec.num_layers):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            full = [f"model.layers.{layer}.{name}.weight" for name in names]
            whole = torch.cat([held[name] for name in full])
            held.update(zip(full, whole.split([held[name].shape[0] for name in full]), strict=True))
    tensors, copied = prepare(source, family, spec, held)
    assert copied == 0
    want = torch.cat([held["model.layers.2.mlp.gate_proj.weight"], held["model.layers.2.mlp.up_proj.weight"]])
    assert torch.equal(tensors["layers.2.mlp.gate_up.weight"], want)
