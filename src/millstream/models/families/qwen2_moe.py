"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside a shared one that a sigmoid gates. arXiv 2407.10671."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families import _names as names
from millstream.models.families._fields import Fields
from millstream.models.spec import ModelSpec

CARD = Card("qwen2-moe", "Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B")

LAYER = {**names.LAYER, **names.MOE}


class Qwen2Moe:
    name = "qwen2-moe"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "qwen2_moe"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields)
        slides = fields.flag("use_sliding_window", False)
        window = fields.optional_integer("sliding_window", low=0)
        last = fields.integer("max_window_layers", 28, low=0)
        windows = fields.layer_windows(
            shape.num_layers,
            window if slides else None,
            [slides and i < last and i % 2 == 0 for i in range(shape.num_layers)],
        )
        rope = fields.rope(shape.head_dim, shape.context)
        bias = fields.flag("qkv_bias", True)
        activation = fields.activation("hidden_act", "silu")
        sparse_channel, dense_channel = (
            make.read_moe(
                fields,
                shape,
                activation,
                fields.integer("moe_intermediate_size"),
                fields.flag("norm_topk_prob", False),
                fields.integer("shared_expert_intermediate_size"),
                default_experts=60,
                default_top_k=4,
            ),
            make.mlp(shape.width, fields.integer("intermediate_size"), activation),
        )
        routed = make.sparse_layers(fields, shape.num_layers)
        return make.assemble(
            fields,
            shape,
            lambda i: make.attention(shape, rope, window=windows[i], qkv_bias=bias),
            lambda i: sparse_channel if routed[i] else dense_channel,
        )

    def rename(self, name: str) -> str | None:
        return names.rename(name, LAYER)


PLUGIN = Qwen2Moe
