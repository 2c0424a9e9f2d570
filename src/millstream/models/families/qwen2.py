"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window on the later layers when one is switched on.
arXiv 2407.10671."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families._fields import Fields
from millstream.models.families._names import rename
from millstream.models.spec import ModelSpec

CARD = Card("qwen2", "Qwen2 and Qwen2.5, the dense ones")


class Qwen2:
    name = "qwen2"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "qwen2"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields)
        slides = fields.flag("use_sliding_window", False)
        window = fields.optional_integer("sliding_window", low=0)
        first = fields.integer("max_window_layers", 28, low=0)
        windows = fields.layer_windows(
            shape.num_layers, window if slides else None, [slides and i >= first for i in range(shape.num_layers)]
        )
        rope = fields.rope(shape.head_dim, shape.context)
        channel = make.mlp(shape.width, fields.integer("intermediate_size"), fields.activation("hidden_act", "silu"))
        return make.assemble(
            fields, shape, lambda i: make.attention(shape, rope, window=windows[i], qkv_bias=True), lambda _: channel
        )

    def rename(self, name: str) -> str | None:
        return rename(name)


PLUGIN = Qwen2
