"""A tiny random model as files: weights, a tokenizer of single bytes, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WIDTH, HEADS, LAYERS, INNER, CONTEXT = 32, 2, 2, 48, 2048


def build_model(folder: Path, template: bool = True) -> Path:
    """A llama of two layers with random weights, and a tokenizer of single bytes."""
    import tokenizers
    import torch
    from safetensors.torch import save_file

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: place for place, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    told: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
    }
    if template:
        told["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(ids),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7, "do_sample": True}))
    source = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source) * 0.2

    tensors = {
        "model.embed_tokens.weight": weight(len(ids), WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": weight(len(ids), WIDTH),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}self_attn.{name}.weight"] = weight(WIDTH, WIDTH)
        tensors[at + "mlp.gate_proj.weight"] = weight(INNER, WIDTH)
        tensors[at + "mlp.up_proj.weight"] = weight(INNER, WIDTH)
        tensors[at + "mlp.down_proj.weight"] = weight(WIDTH, INNER)
        tensors[at + "input_layernorm.weight"] = torch.ones(WIDTH)
        tensors[at + "post_attention_layernorm.weight"] = torch.ones(WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
