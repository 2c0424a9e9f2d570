"""Llama and what is built like it (SmolLM2, TinyLlama, ...). arXiv 2302.13971, 2407.21783."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families._fields import Fields
from millstream.models.families._names import rename
from millstream.models.spec import ModelSpec

CARD = Card("llama", "Llama 2 and 3, SmolLM2 and other models of the same build")


class Llama:
    name = "llama"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields)
        bias = fields.flag("attention_bias", False)
        rope = fields.rope(shape.head_dim, shape.context)
        mixer = make.attention(shape, rope, qkv_bias=bias, out_bias=bias)
        channel = make.mlp(
            shape.width,
            fields.integer("intermediate_size"),
            fields.activation("hidden_act", "silu"),
            fields.flag("mlp_bias", False),
        )
        return make.assemble(fields, shape, lambda _: mixer, lambda _: channel)

    def rename(self, name: str) -> str | None:
        return rename(name)


PLUGIN = Llama
