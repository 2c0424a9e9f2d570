"""Qwen3: Qwen2 without biases and with norms on each head of q and k. arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families._fields import Fields
from millstream.models.families._names import rename
from millstream.models.spec import ModelSpec, NormSpec

CARD = Card("qwen3", "Qwen3, the dense ones")


class Qwen3:
    name = "qwen3"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "qwen3"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields, head_dim=128)
        slides = fields.flag("use_sliding_window", False)
        window = fields.optional_integer("sliding_window", low=0)
        first = fields.integer("max_window_layers", 28, low=0)
        windows = fields.layer_windows(
            shape.num_layers, window if slides else None, [slides and i >= first for i in range(shape.num_layers)]
        )
        rope = fields.rope(shape.head_dim, shape.context)
        bias = fields.flag("attention_bias", False)
        norm = NormSpec(shape.head_dim, shape.eps)
        channel = make.mlp(shape.width, fields.integer("intermediate_size"), fields.activation("hidden_act", "silu"))
        return make.assemble(
            fields,
            shape,
            lambda i: make.attention(shape, rope, window=windows[i], qkv_bias=bias, out_bias=bias, qk_norm=norm),
            lambda _: channel,
        )

    def rename(self, name: str) -> str | None:
        return rename(name)


PLUGIN = Qwen3
