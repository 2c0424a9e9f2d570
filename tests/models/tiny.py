"""Tiny random checkpoints, written by transformers, one case for each thing that families differ in.

The tolerance is that of the case: float32 on both sides, and logits of a few units.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
QWEN_MOE = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "num_experts": 7,
    "max_window_layers": 2,
}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    rtol: float = 0.0
    atol: float = 1e-4

    def config(self) -> Any:
        return getattr(transformers, f"{self.model}Config")(**{**SIZES, **self.options})

    def make(self, seed: int = 0) -> Any:
        """The transformers model, float32, eager attention, weights wide enough that errors show."""
        torch.manual_seed(seed)
        config = self.config()
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{self.model.removesuffix('Text')}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                else:
                    parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.15))
        model.tie_weights()
        return model


CASES = [
    Case("llama", "llama", "Llama"),
    Case("llama-tied", "llama", "Llama", {"tie_word_embeddings": True}),
    Case("llama-biases", "llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-head-dim", "llama", "Llama", {"head_dim": 16}),
    Case("llama-llama3", "llama", "Llama", {"rope_parameters": LLAMA3}),
    Case("llama-linear", "llama", "Llama", {"rope_parameters": LINEAR}),
    Case("llama-yarn", "llama", "Llama", {"rope_parameters": YARN}),
    Case(
        "llama-yarn-options",
        "llama",
        "Llama",
        {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}},
    ),
    Case("llama-yarn-mscale", "llama", "Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    Case("mistral-window", "mistral", "Mistral", {"sliding_window": 16}),
    Case("mistral", "mistral", "Mistral", {"sliding_window": None, "head_dim": 8}),
    Case("qwen2", "qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Case("qwen2-yarn", "qwen2", "Qwen2", {"rope_parameters": YARN}),
    Case("qwen2-window", "qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    Case("qwen3", "qwen3", "Qwen3", {"head_dim": 16}),
    Case(
        "qwen3-window-biases",
        "qwen3",
        "Qwen3",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Case(
        "gemma3",
        "gemma3",
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4, "_sliding_window_pattern": 2},
    ),
    Case(
        "gemma3-linear",
        "gemma3",
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 10,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 20.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    Case("mixtral", "mixtral", "Mixtral", {"num_local_experts": 5}),
    Case("mixtral-window", "mixtral", "Mixtral", {"num_local_experts": 4, "sliding_window": 16, "head_dim": 12}),
    Case(
        "qwen2-moe",
        "qwen2-moe",
        "Qwen2Moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    Case(
        "qwen2-moe-normalized",
        "qwen2-moe",
        "Qwen2Moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 40, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    Case(
        "qwen2-moe-no-bias",
        "qwen2-moe",
        "Qwen2Moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 40, "qkv_bias": False},
    ),
    Case("qwen3-moe", "qwen3-moe", "Qwen3Moe", {**QWEN_MOE, "head_dim": 16, "norm_topk_prob": True}),
    Case("qwen3-moe-plain", "qwen3-moe", "Qwen3Moe", {**QWEN_MOE, "head_dim": 8, "mlp_only_layers": [0]}),
]


def case(name: str) -> Case:
    return next(found for found in CASES if found.name == name)


def write(made: Case, folder: Path, seed: int = 0) -> Any:
    """Saves the case's checkpoint into `folder` and returns the transformers model."""
    model = made.make(seed)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets fields of a saved config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
