"""Gemma 3, its text model: local layers with a window between global ones, norms on both sides. arXiv 2503.19786."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.families import _assemble as make
from millstream.models.families import _names as names
from millstream.models.families._fields import Fields
from millstream.models.spec import ModelSpec, NormSpec, RopeSpec

CARD = Card("gemma3", "Gemma 3 (text); of a model with pictures, the text part")

LAYER = {
    **names.LAYER,
    "post_attention_layernorm": "mixer_post_norm",
    "pre_feedforward_layernorm": "channel_norm",
    "post_feedforward_layernorm": "channel_post_norm",
}

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4

# Published files leave out what equals the defaults of the first release.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


class Gemma3:
    name = "gemma3"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in ("gemma3_text", "gemma3")

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        text = config.get("text_config")
        fields = Fields(
            self.name, text if config.get("model_type") == "gemma3" and isinstance(text, Mapping) else config
        )
        shape = make.read_shape(fields, **DEFAULTS)
        fields.only("use_bidirectional_attention", False)
        fields.only("attn_logit_softcapping")
        every = fields.integer("_sliding_window_pattern", fields.raw("sliding_window_pattern", 6))
        windows = fields.layer_windows(
            shape.num_layers,
            fields.integer("sliding_window", 4096),
            [(i + 1) % every != 0 for i in range(shape.num_layers)],
        )
        local_rope, global_rope = self._ropes(fields, shape)
        bias = fields.flag("attention_bias", False)
        norm = NormSpec(shape.head_dim, shape.eps, 1.0)
        scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
        channel = make.mlp(
            shape.width,
            fields.integer("intermediate_size"),
            fields.activation("hidden_activation", fields.raw("hidden_act", "gelu_pytorch_tanh")),
        )
        return make.assemble(
            fields,
            shape,
            lambda i: make.attention(
                shape,
                global_rope if windows[i] is None else local_rope,
                window=windows[i],
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=norm,
                scale=scale,
            ),
            lambda _: channel,
            norm_offset=1.0,
            post_norms=True,
            tied_default=True,
            embed_scale=shape.width**0.5,
            logit_softcap=fields.optional_number("final_logit_softcapping"),
        )

    def _ropes(self, fields: Fields, shape: make.Shape) -> tuple[RopeSpec, RopeSpec]:
        """Local layers never scale; global ones do as the file says. Old files name the two thetas apart."""
        found = fields.raw("rope_parameters", {})
        scaling = fields.raw("rope_scaling", {})
        local_theta = fields.raw("rope_local_base_freq", LOCAL_THETA)
        global_theta = fields.raw("rope_theta", GLOBAL_THETA)
        if not isinstance(found, Mapping) or set(found) - {"sliding_attention", "full_attention"}:
            raise fields.wrong("rope_parameters", found, "a mapping with full_attention and sliding_attention")
        local = found.get("sliding_attention") or {}
        whole = {**(found.get("full_attention") or {}), **scaling}
        return (
            fields.rope_of("rope_parameters.sliding_attention", local, shape.head_dim, shape.context, local_theta),
            fields.rope_of("rope_parameters.full_attention", whole, shape.head_dim, shape.context, global_theta),
        )

    def rename(self, name: str) -> str | None:
        # Models with pictures keep the text part under either of two prefixes.
        bare = name.removeprefix("model.").removeprefix("language_model.")
        if bare.startswith(("vision_tower.", "multi_modal_projector.", "model.vision_tower.")):
            return None
        ours = names.rename(bare, LAYER)
        return name if ours == bare else ours


PLUGIN = Gemma3
