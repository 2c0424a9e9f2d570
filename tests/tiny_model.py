"""Models of a few thousand random numbers, built from their configuration alone: no files, no transformers."""

from __future__ import annotations

from typing import Any

import torch

from millstream.core import registry
from millstream.models import decoder as decoders
from millstream.models.families.protocol import find_family
from millstream.models.spec import ModelSpec
from millstream.ops.attention.protocol import AttentionAsk, choose
from millstream.runner.torch_runner import TorchRunner

VOCAB = 97
# Logits of these models that lie closer than this may change places by rounding.
CLEAR_GAP = 1e-4

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "num_hidden_layers": 2, "head_dim": 16},
    # A window beside full attention: two cache groups.
    "gemma": {
        **_SIZES,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": False,
    },
}


def spec(name: str) -> ModelSpec:
    return find_family(CONFIGS[name]).spec(CONFIGS[name])


def decoder(name: str, seed: int = 0) -> decoders.Decoder:
    """Weights of such widths that every layer has its say and no token is certain."""
    made = spec(name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for wanted in made.tensors():
        values = torch.randn(*wanted.shape, generator=generator)
        width = 0.4 if wanted.name.startswith("head") else 0.3
        if wanted.name.startswith("embed"):
            width = 1.0 / (made.embed_scale or 1.0)
        tensors[wanted.name] = 1 + 0.2 * values if "norm" in wanted.name else values * width
    return decoders.build(made, tensors)


def runner(
    model: decoders.Decoder,
    block_size: int = 16,
    num_blocks: int = 32,
    host_blocks: int = 0,
    plans: int = 1,
    kv: str = "plain",
    attention: str = "torch-ref",
) -> TorchRunner:
    """Raises ConfigError where the attention backend refuses this model or block size."""
    pages, backends = {}, {}
    for group in model.spec.groups:
        held = registry.make("kv", kv, device=True).allocate(group, num_blocks, block_size, "float32", host_blocks)
        mixer = next(layer.mixer for layer in model.spec.layers if layer.mixer.group == group.name)
        ask = AttentionAsk(
            "cpu",
            "float32",
            str(held.dtype).removeprefix("torch."),
            held.layout,
            mixer.heads,
            mixer.kv_heads,
            mixer.head_dim,
            block_size,
            mixer.window,
            mixer.softcap,
        )
        pages[group.name], backends[group.name] = held, choose(ask, attention).backend
    return TorchRunner(model, pages, backends, plans)
