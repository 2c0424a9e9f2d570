"""Our names for the tensors of the checkpoints that follow Hugging Face's usual spelling."""

from __future__ import annotations

import re
from collections.abc import Mapping

OUTER: Mapping[str, str] = {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "head"}

LAYER: Mapping[str, str] = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "channel_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}

MOE: Mapping[str, str] = {
    "mlp.gate": "moe.router",
    "mlp.experts.*.gate_proj": "moe.experts.*.gate",
    "mlp.experts.*.up_proj": "moe.experts.*.up",
    "mlp.experts.*.down_proj": "moe.experts.*.down",
    "mlp.shared_expert.gate_proj": "moe.shared.gate",
    "mlp.shared_expert.up_proj": "moe.shared.up",
    "mlp.shared_expert.down_proj": "moe.shared.down",
    "mlp.shared_expert_gate": "moe.shared_gate",
}

_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def rename(name: str, layer: Mapping[str, str] = LAYER, outer: Mapping[str, str] = OUTER) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` -> `layers.3.attn.q.weight`. A `*` in a table stands for an expert.

    None for the frequencies that old checkpoints store, which we compute.
    """
    bare = name.removeprefix("model.")
    if bare.endswith("rotary_emb.inv_freq"):
        return None
    if (found := _LAYER.fullmatch(bare)) is not None:
        index, stem, kind = found.groups()
        expert = _EXPERT.search(f".{stem}")
        key = stem if expert is None else _EXPERT.sub(".experts.*.", stem)
        if (ours := layer.get(key)) is not None:
            if expert is not None:
                ours = ours.replace("*", expert[1])
            return f"layers.{index}.{ours}.{kind}"
        return name
    stem, _, kind = bare.rpartition(".")
    return f"{outer[stem]}.{kind}" if stem in outer else name
