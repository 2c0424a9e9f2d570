"""Qwen3-MoE: Qwen3 with routed experts and no shared one. arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families import _names as names
from millstream.models.families._fields import Fields
from millstream.models.spec import ModelSpec, NormSpec

CARD = Card("qwen3-moe", "Qwen3-30B-A3B and Qwen3-235B-A22B")

LAYER = {**names.LAYER, **names.MOE}


class Qwen3Moe:
    name = "qwen3-moe"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "qwen3_moe"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields)
        # Here the window, once switched on, is on all layers; older files still carry a count that no longer matters.
        slides = fields.flag("use_sliding_window", False)
        window = fields.optional_integer("sliding_window", low=0) if slides else None
        fields.ignore("sliding_window", "max_window_layers")
        rope = fields.rope(shape.head_dim, shape.context)
        bias = fields.flag("attention_bias", False)
        norm = NormSpec(shape.head_dim, shape.eps)
        mixer = make.attention(shape, rope, window=window, qkv_bias=bias, out_bias=bias, qk_norm=norm)
        activation = fields.activation("hidden_act", "silu")
        sparse_channel = make.read_moe(
            fields,
            shape,
            activation,
            fields.integer("moe_intermediate_size"),
            fields.flag("norm_topk_prob", False),
            default_experts=128,
            default_top_k=8,
        )
        dense_channel = make.mlp(shape.width, fields.integer("intermediate_size"), activation)
        routed = make.sparse_layers(fields, shape.num_layers)
        return make.assemble(fields, shape, lambda _: mixer, lambda i: sparse_channel if routed[i] else dense_channel)

    def rename(self, name: str) -> str | None:
        return names.rename(name, LAYER)


PLUGIN = Qwen3Moe
