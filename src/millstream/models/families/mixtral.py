"""Mixtral: Mistral with a mixture of experts in every layer. arXiv 2401.04088."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families import _names as names
from millstream.models.families._fields import Fields
from millstream.models.spec import ModelSpec

CARD = Card("mixtral", "Mixtral 8x7B and 8x22B")

LAYER = {
    **names.LAYER,
    **names.MOE,
    "block_sparse_moe.gate": "moe.router",
    "block_sparse_moe.experts.*.w1": "moe.experts.*.gate",
    "block_sparse_moe.experts.*.w3": "moe.experts.*.up",
    "block_sparse_moe.experts.*.w2": "moe.experts.*.down",
}


class Mixtral:
    name = "mixtral"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mixtral"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        fields = Fields(self.name, config)
        shape = make.read_shape(fields, default_eps=1e-5)
        window = fields.optional_integer("sliding_window")
        rope = fields.rope(shape.head_dim, shape.context, default_theta=1e6)
        mixer = make.attention(shape, rope, window=window)
        activation = fields.activation("hidden_act", "silu")
        channel = make.read_moe(
            fields, shape, activation, fields.integer("intermediate_size"), True, default_experts=8, default_top_k=2
        )
        return make.assemble(fields, shape, lambda _: mixer, lambda _: channel)

    def rename(self, name: str) -> str | None:
        return names.rename(name, LAYER)


PLUGIN = Mixtral
