"""A spec's arithmetic, held against numbers taken by hand and against published counts."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError
from millstream.models.families.protocol import find_family
from millstream.models.spec import LinearSpec, MoeSpec

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 8192,
}


def spec(config):
    return find_family(config).spec(config)


@pytest.mark.parametrize(
    ("config", "count"), [(SMOLLM2, 134_515_008), (GEMMA, 268_098_176), (QWEN15_MOE, 14_315_784_192)]
)
def test_parameters_are_the_published_count(config, count):
    assert spec(config).num_parameters == count
    assert spec(config).weight_bytes("bfloat16") == 2 * count
    assert spec(config).weight_bytes("float32") == 4 * count


def test_a_mixture_uses_a_part_of_itself():
    found = spec(QWEN15_MOE)
    # "A2.7B" leaves out the embedding's rows, which are looked up and not multiplied.
    assert 2.3e9 < found.num_active_parameters < 2.8e9
    dense = spec(SMOLLM2)
    assert dense.num_active_parameters == dense.num_parameters


def test_flops_are_twice_the_matrices_and_grow_with_the_context():
    found = spec(SMOLLM2)
    norms = 576 * 61
    assert found.flops_per_token(1) == 2 * (found.num_parameters - norms) + 30 * 4 * 576
    assert found.flops_per_token(101) - found.flops_per_token(1) == 30 * 4 * 576 * 100


def test_a_window_stops_the_growth():
    found = spec(GEMMA)
    per_token = 4 * 4 * 256
    assert found.flops_per_token(1024) - found.flops_per_token(512) == 3 * per_token * 512


def test_kv_bytes_are_those_of_each_group():
    assert spec(SMOLLM2).kv_bytes_per_token("float32") == {"full": 30 * 2 * 3 * 64 * 4}
    assert spec(GEMMA).kv_bytes_per_token("bfloat16") == {"window-512": 15 * 2 * 256 * 2, "full": 3 * 2 * 256 * 2}


def test_layers_that_keep_the_same_tokens_share_a_group():
    found = spec(GEMMA)
    assert found.groups == (
        CacheGroup("window-512", Keep.WINDOW, 512, 15, 1, 256),
        CacheGroup("full", Keep.FULL, None, 3, 1, 256),
    )
    assert found.group_layers == (0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 1, 10, 11, 12, 13, 14, 2)


def test_a_step_reads_all_weights_once_and_the_context_of_each_row():
    found = spec(SMOLLM2)
    one = found.step_bytes(1, (100,), "float32")
    assert one == found.weight_bytes("float32") + 4 * 576 + 101 * 30 * 2 * 3 * 64 * 4
    two = found.step_bytes(2, (100, 50), "float32")
    assert two - one == 4 * 576 + 51 * 30 * 2 * 3 * 64 * 4
    assert one - found.step_bytes(1, (100,), "float32", heads=0) == 49152 * 576 * 4
    windowed = spec(GEMMA)
    assert (
        windowed.step_bytes(1, (9000,), "float32") - windowed.step_bytes(1, (8000,), "float32")
        == 3 * 2 * 256 * 4 * 1000
    )


def test_a_step_of_many_tokens_reaches_more_experts():
    found = spec(QWEN15_MOE)
    one, many = found.step_bytes(1, (1,), "bfloat16"), found.step_bytes(512, (1,), "bfloat16")
    assert one == pytest.approx(2 * found.num_active_parameters, rel=0.01)
    everything = found.weight_bytes("bfloat16") - 151936 * 2048 * 2
    assert everything < many < everything * 1.1


def test_quantizing_is_a_function_from_spec_to_spec():
    found = spec(SMOLLM2)

    def small(linear: LinearSpec) -> LinearSpec:
        return dataclasses.replace(linear, format="int8", bits=8.0)

    layers = tuple(
        dataclasses.replace(
            layer,
            mixer=dataclasses.replace(layer.mixer, qkv=small(layer.mixer.qkv), out=small(layer.mixer.out)),
            channel=dataclasses.replace(
                layer.channel, gate_up=small(layer.channel.gate_up), down=small(layer.channel.down)
            ),
        )
        for layer in found.layers
    )
    quantized = dataclasses.replace(found, layers=layers)
    matrices = sum(linear.num_parameters for _, linear in found.linears())
    assert found.weight_bytes("float32") - quantized.weight_bytes("float32") == 3 * matrices
    assert quantized.num_parameters == found.num_parameters


def test_tensors_are_named_once_and_hold_every_parameter():
    for config in (SMOLLM2, GEMMA, QWEN15_MOE):
        tensors = list(spec(config).tensors())
        assert len({t.name for t in tensors}) == len(tensors)
        for tensor in tensors:
            assert sum(rows for _, rows in tensor.parts) == tensor.shape[0]
        assert sum(math.prod(t.shape) for t in tensors) == spec(config).num_parameters


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match="0 x 5"):
        LinearSpec(0, 5)
    with pytest.raises(ConfigError, match="do not add up"):
        LinearSpec(4, 5, parts=(("q", 2), ("k", 2)))
    channel = spec(QWEN15_MOE).layers[0].channel
    assert isinstance(channel, MoeSpec)
    with pytest.raises(ConfigError, match="from 1 to the number of experts, 60"):
        dataclasses.replace(channel, top_k=61)
    with pytest.raises(ConfigError, match="float17"):
        spec(SMOLLM2).weight_bytes("float17")


def test_specs_and_families_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from millstream.core import registry\n"
        "from millstream.models.families.protocol import find_family\n"
        "import millstream.models.spec\n"
        "[registry.make('family', name) for name in registry.names('family')]\n"
        f"print(find_family({SMOLLM2!r}).spec({SMOLLM2!r}).num_parameters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "134515008", done.stderr
