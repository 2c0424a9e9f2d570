"""Mistral: Llama with a window on every layer, or none. arXiv 2310.06825."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families._fields import Fields
from millstream.models.families._names import rename
from millstream.models.spec import ModelSpec

CARD = Card("mistral", "Mistral 7B and its successors of the same build")


class Mistral:
    name = "mistral"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mistral"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields)
        window = fields.optional_integer("sliding_window")
        mixer = make.attention(shape, fields.rope(shape.head_dim, shape.context), window=window)
        channel = make.mlp(shape.width, fields.integer("intermediate_size"), fields.activation("hidden_act", "silu"))
        return make.assemble(fields, shape, lambda _: mixer, lambda _: channel)

    def rename(self, name: str) -> str | None:
        return rename(name)


PLUGIN = Mistral
