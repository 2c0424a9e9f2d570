"""GGUF files in Hugging Face's terms: config, names, and the weights that transformers gets from the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millstream.core.errors import BadFile, ModelError, UnknownModel, Unsupported
from millstream.models.families.protocol import find_family
from millstream.models.gguf_names import llama3_factors, shortest
from millstream.models.source import open_source

from .conftest import interleaved, llama_keys, tiny_llama, write_gguf

RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def opened(tmp_path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, Any], tokens: int = 0) -> Any:
    # A new name each time: a file that is open must not be written over.
    path = tmp_path / f"m{len(list(tmp_path.iterdir()))}.gguf"
    return open_source(write_gguf(path, arch, keys, tensors, [f"t{i}" for i in range(tokens)]))


def numbers(arch: str, **more: Any) -> dict[str, Any]:
    return {
        key.replace("llama.", f"{arch}."): value
        for key, value in llama_keys(**{f"llama__{name}": value for name, value in more.items()}).items()
    }


def dense_layer(hidden: int = 64, q: int = 64, kv: int = 32, mlp: int = 96) -> dict[str, np.ndarray]:
    return {
        "token_embd.weight": normal(32, hidden),
        "output_norm.weight": normal(hidden),
        "blk.0.attn_norm.weight": normal(hidden),
        "blk.0.ffn_norm.weight": normal(hidden),
        "blk.0.attn_q.weight": normal(q, hidden),
        "blk.0.attn_k.weight": normal(kv, hidden),
        "blk.0.attn_v.weight": normal(kv, hidden),
        "blk.0.attn_output.weight": normal(hidden, q),
        "blk.0.ffn_gate.weight": normal(mlp, hidden),
        "blk.0.ffn_up.weight": normal(mlp, hidden),
        "blk.0.ffn_down.weight": normal(hidden, mlp),
    }


def test_a_llama_comes_out_with_its_rows_in_order(tmp_path: Path) -> None:
    path, weights = tiny_llama(tmp_path / "m.gguf", RNG)
    source = open_source(path, "tiny")
    assert source.id == "tiny" and source.path == path
    assert set(source.tensor_names()) == set(weights)
    for name, expected in weights.items():
        assert torch.equal(source.tensor(name), torch.from_numpy(expected)), name
        assert source.shape(name) == expected.shape
    assert source.quantization == "F32"


def test_packed_rows_change_places_too(tmp_path: Path) -> None:
    weight = normal(64, 64)
    tensors = {**dense_layer(), "blk.0.attn_q.weight": (interleaved(weight, 4), "Q8_0")}
    source = opened(tmp_path, "llama", llama_keys(), tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    straight = opened(tmp_path, "qwen2", numbers("qwen2"), {**dense_layer(), "blk.0.attn_q.weight": (weight, "Q8_0")})
    assert torch.equal(source.tensor(name), straight.tensor(name))
    raw = source.raw_tensor(name)
    assert (raw.type, raw.shape) == ("Q8_0", (64, 64))
    assert torch.equal(raw.data, straight.raw_tensor(name).data)


def test_a_llama_config_has_the_names_of_a_checkpoint(tmp_path: Path) -> None:
    config = open_source(tiny_llama(tmp_path / "m.gguf", RNG)[0]).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": 32,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_a_head_of_its_own_unties_the_embeddings(tmp_path: Path) -> None:
    head = normal(32, 64)
    source = opened(tmp_path, "llama", llama_keys(), {**dense_layer(), "output.weight": head})
    assert source.config["tie_word_embeddings"] is False
    assert torch.equal(source.tensor("lm_head.weight"), torch.from_numpy(head))


def test_biases_of_q_and_k_change_places_with_their_rows(tmp_path: Path) -> None:
    bias = normal(64)
    tensors = {**dense_layer(), "blk.0.attn_q.bias": interleaved(bias, 4)}
    source = opened(tmp_path, "llama", llama_keys(), tensors)
    assert source.config["attention_bias"] is True
    assert torch.equal(source.tensor("model.layers.0.self_attn.q_proj.bias"), torch.from_numpy(bias))


def test_qwen2_keeps_its_rows_and_biases(tmp_path: Path) -> None:
    tensors = {**dense_layer(), "blk.0.attn_q.bias": normal(64)}
    source = opened(tmp_path, "qwen2", numbers("qwen2"), tensors)
    assert source.config["model_type"] == "qwen2" and "head_dim" not in source.config
    for ours, theirs in (("q_proj.weight", "attn_q.weight"), ("q_proj.bias", "attn_q.bias")):
        expected = torch.from_numpy(tensors[f"blk.0.{theirs}"])
        assert torch.equal(source.tensor(f"model.layers.0.self_attn.{ours}"), expected)


def test_qwen3_has_head_norms_and_a_head_size_of_its_own(tmp_path: Path) -> None:
    norm = normal(32)
    tensors = {**dense_layer(q=128, kv=64), "blk.0.attn_q_norm.weight": norm, "blk.0.attn_k_norm.weight": norm}
    keys = {**numbers("qwen3"), "qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}
    source = opened(tmp_path, "qwen3", keys, tensors)
    assert source.config["head_dim"] == 32 and source.config["attention_bias"] is False
    assert torch.equal(source.tensor("model.layers.0.self_attn.q_norm.weight"), torch.from_numpy(norm))


def test_gemma3_norms_lose_the_one_that_was_added(tmp_path: Path) -> None:
    norm = normal(64)
    tensors = dense_layer() | {"output_norm.weight": norm + 1, "blk.0.attn_norm.weight": norm + 1}
    tensors |= {"blk.0.post_attention_norm.weight": norm + 1, "blk.0.post_ffw_norm.weight": norm + 1}
    tensors |= {"blk.0.ffn_norm.weight": norm + 1}
    tensors |= {"blk.0.attn_q_norm.weight": norm[:16] + 1, "blk.0.attn_k_norm.weight": norm[:16] + 1}
    keys = {**numbers("gemma3"), "gemma3.attention.sliding_window": 16}
    source = opened(tmp_path, "gemma3", keys, tensors)
    layer = "model.layers.0."
    for name in (
        "model.norm",
        layer + "input_layernorm",
        layer + "post_attention_layernorm",
        layer + "pre_feedforward_layernorm",
        layer + "post_feedforward_layernorm",
        layer + "self_attn.q_norm",
        layer + "self_attn.k_norm",
    ):
        ours = source.tensor(f"{name}.weight")
        assert torch.equal(ours, torch.from_numpy(norm[: len(ours)] + 1) - 1), name
    assert torch.equal(source.tensor("model.embed_tokens.weight"), torch.from_numpy(tensors["token_embd.weight"]))
    config = source.config
    assert (config["model_type"], config["sliding_window"], config["query_pre_attn_scalar"]) == ("gemma3_text", 16, 16)
    assert config["rope_local_base_freq"] == 10000.0 and config["rope_theta"] == 1000000.0


def test_gemma3_sees_everything_in_each_sixth_layer(tmp_path: Path) -> None:
    keys = {**numbers("gemma3", block_count=8), "gemma3.attention.sliding_window": 16}
    config = opened(tmp_path, "gemma3", keys, dense_layer()).config
    assert [kind == "full_attention" for kind in config["layer_types"]] == [False] * 5 + [True] + [False] * 2


def test_stacked_experts_come_apart(tmp_path: Path) -> None:
    dense = {k: v for k, v in dense_layer().items() if ".ffn_" not in k or "norm" in k}
    gate, up, down, router = normal(4, 32, 64), normal(4, 32, 64), normal(4, 64, 32), normal(4, 64)
    experts = {
        "blk.0.ffn_gate_exps.weight": (gate, "Q8_0"),
        "blk.0.ffn_up_exps.weight": up,
        "blk.0.ffn_down_exps.weight": down,
        "blk.0.ffn_gate_inp.weight": router,
    }
    shared = {
        "blk.0.ffn_gate_shexp.weight": normal(48, 64),
        "blk.0.ffn_up_shexp.weight": normal(48, 64),
        "blk.0.ffn_down_shexp.weight": normal(64, 48),
        "blk.0.ffn_gate_inp_shexp.weight": normal(64),
    }
    counts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    three = opened(tmp_path, "qwen3moe", numbers("qwen3moe", **counts), {**dense, **experts})
    two = opened(
        tmp_path,
        "qwen2moe",
        numbers("qwen2moe", **counts, expert_shared_feed_forward_length=48),
        {**dense, **experts, **shared},
    )
    mix = opened(tmp_path, "llama", llama_keys(llama__expert_count=4, llama__expert_used_count=2), {**dense, **experts})
    for source, block, names in (
        (three, "mlp", ("gate_proj", "up_proj", "down_proj")),
        (two, "mlp", ("gate_proj", "up_proj", "down_proj")),
        (mix, "block_sparse_moe", ("w1", "w3", "w2")),
    ):
        prefix = f"model.layers.0.{block}"
        assert torch.equal(source.tensor(f"{prefix}.gate.weight"), torch.from_numpy(router))
        for expert in range(4):
            told = [source.tensor(f"{prefix}.experts.{expert}.{n}.weight") for n in names]
            assert torch.allclose(told[0], torch.from_numpy(gate[expert]), atol=0.05)
            assert torch.equal(told[1], torch.from_numpy(up[expert]))
            assert torch.equal(told[2], torch.from_numpy(down[expert]))
    assert (three.config["norm_topk_prob"], two.config["norm_topk_prob"]) == (True, False)
    assert three.config["moe_intermediate_size"] == 32 and three.config["num_experts_per_tok"] == 2
    assert two.config["shared_expert_intermediate_size"] == 48
    assert two.shape("model.layers.0.mlp.shared_expert_gate.weight") == (1, 64)
    assert two.tensor("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, 64)
    assert (mix.config["model_type"], mix.config["num_local_experts"]) == ("mixtral", 4)
    for source in (three, two, mix):
        find_family(source.config).spec(source.config)


def test_old_mixtral_files_with_one_tensor_an_expert_are_read(tmp_path: Path) -> None:
    dense = {k: v for k, v in dense_layer().items() if ".ffn_" not in k or "norm" in k}
    experts = {f"blk.0.ffn_{part}.{i}.weight": normal(32, 64) for i in range(2) for part in ("gate", "up")}
    experts |= {f"blk.0.ffn_down.{i}.weight": normal(64, 32) for i in range(2)}
    keys = llama_keys(llama__expert_count=2, llama__expert_used_count=1)
    source = opened(tmp_path, "llama", keys, {**dense, **experts, "blk.0.ffn_gate_inp.weight": normal(2, 64)})
    expected = torch.from_numpy(experts["blk.0.ffn_down.1.weight"])
    assert torch.equal(source.tensor("model.layers.0.block_sparse_moe.experts.1.w2.weight"), expected)


def test_rope_scaling_is_told_in_a_configs_words(tmp_path: Path) -> None:
    def scaling(**keys: Any) -> Any:
        more = {f"llama.rope.{name.replace('__', '.')}": value for name, value in keys.items()}
        return opened(tmp_path, "llama", {**llama_keys(), **more}, dense_layer()).config["rope_scaling"]

    assert scaling() is None
    assert scaling(scaling__type="none") is None
    assert scaling(scaling__type="linear", scaling__factor=8.0) == {"rope_type": "linear", "factor": 8.0}
    assert scaling(scale_linear=2.0) == {"rope_type": "linear", "factor": 2.0}
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 64}
    assert scaling(**yarn) == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(Unsupported, match="'spiral'"):
        scaling(scaling__type="spiral")


def test_a_table_of_rope_factors_is_recognised_as_llama3s(tmp_path: Path) -> None:
    keys = {**llama_keys(), "llama.rope.freq_base": 500000.0}
    factors = np.array(llama3_factors(500000.0, 8, 32.0, 1.0, 4.0, 8192), dtype=np.float32)
    config = opened(tmp_path, "llama", keys, {**dense_layer(), "rope_freqs.weight": factors}).config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    strange = np.arange(1, 9, dtype=np.float32)
    config = opened(tmp_path, "llama", keys, {**dense_layer(), "rope_freqs.weight": strange}).config
    assert config["rope_scaling"]["rope_type"] == "longrope"
    assert config["rope_scaling"]["long_factor"] == strange.tolist()


def test_who_ends_a_text_and_how_to_sample_come_from_the_file(tmp_path: Path) -> None:
    keys = {
        **llama_keys(),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    source = opened(tmp_path, "llama", keys, dense_layer(), tokens=32)
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "top_k": 20}
    assert source.config["eos_token_id"] == 2


WRONG = {
    "no width": ({"llama.embedding_length": None}, {}, "key 'llama.embedding_length' is missing"),
    "width a word": ({"llama.embedding_length": "wide"}, {}, "'llama.embedding_length' is 'wide'"),
    "width of another model": ({"llama.embedding_length": 32}, {}, "token_embd.weight"),
    "lying layer count": ({"llama.block_count": 1 << 30}, {}, "block_count"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, {}, "4 attention heads"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, {}, "epsilon"),
    "eos past the vocabulary": ({"tokenizer.ggml.eos_token_id": 32}, {}, "eos_token_id"),
    "an unknown tensor": ({}, {"blk.0.attn_mystery.weight": normal(4)}, "'blk.0.attn_mystery.weight'"),
    "a layer too many": ({}, {"blk.1.attn_norm.weight": normal(64)}, "'blk.1.attn_norm.weight'"),
    "a split model": ({"split.count": 3}, {}, "merge"),
    "half of each head rotated": ({"llama.rope.dimension_count": 8}, {}, "RoPE over a part"),
    "heads that differ by layer": ({"llama.attention.head_count_kv": [2, 4]}, {}, "layer to layer"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_cannot_be_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    changed, tensors, said = WRONG[wrong]
    keys = {k: v for k, v in {**llama_keys(), **changed}.items() if v is not None}
    with pytest.raises(ModelError) as caught:
        opened(tmp_path, "llama", keys, {**dense_layer(), **tensors})
    assert said in str(caught.value)


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"'gemma2'; the nearest known is 'gemma3'; known are llama, qwen2"):
        opened(tmp_path, "gemma2", {}, dense_layer())


def test_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="33 tokens"):
        opened(tmp_path, "llama", llama_keys(), dense_layer(), tokens=33)


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="No file or folder is at this path"):
        open_source(tmp_path / "none")
    with pytest.raises(BadFile, match="neither a config"):
        open_source(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"nonsense" * 10)
    with pytest.raises(BadFile, match="not a GGUF"):
        open_source(tmp_path / "x.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(Unsupported, match="name the folder"):
        open_source(tmp_path / "model.safetensors")
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(UnknownModel, match=r"there are: x\.gguf, y\.gguf"):
        open_source(tmp_path)


def test_the_nearest_file_beside_a_wrong_path_is_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny-q4.gguf", RNG)
    with pytest.raises(UnknownModel, match=r"there are: tiny-q4\.gguf"):
        open_source(tmp_path / "tiny_q4.gguf")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    path, _ = tiny_llama(tmp_path / "m.gguf", RNG)
    assert open_source(tmp_path).path == path


def test_decimals_are_restored() -> None:
    for value in (1e-5, 1e-6, 0.1, 10000.0, 500000.0, 3.14159, 1e30):
        assert shortest(float(np.float32(value))) == value
    assert shortest(1e300) == 1e300 and shortest(float("inf")) == float("inf")


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_real_model_has_a_family_that_knows_all_its_numbers_and_names(
    name: str, real_model: Callable[[str], Path]
) -> None:
    source = open_source(real_model(name))
    family = find_family(source.config)
    family.spec(source.config)
    assert all(family.rename(n) not in (None, n) for n in source.tensor_names())


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_weights_equal_those_that_transformers_reads(name: str, real_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = real_model(name)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    source, theirs = open_source(path), reference.state_dict()
    if source.config["tie_word_embeddings"]:
        theirs.pop("lm_head.weight")
    assert set(source.tensor_names()) == set(theirs)
    for tensor in source.tensor_names():
        assert torch.equal(source.tensor(tensor), theirs[tensor]), tensor
    for key, value in source.config.items():
        if key in ("architectures", "model_type", "rope_scaling", "rope_theta", "rope_local_base_freq"):
            continue
        found = getattr(reference.config, key, value)
        assert found == pytest.approx(value, rel=1e-6) if isinstance(value, float) else found == value, key
