"""BERT and what is built like it: MiniLM, BGE, E5, GTE, and cross-encoders over them. arXiv 1810.04805, 1908.10084.

Of a checkpoint that was trained for something else besides (masked words, next sentences), the encoder is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from millstream.core.registry import Card
from millstream.models.encoder_spec import EncoderLayerSpec, EncoderSpec
from millstream.models.families._fields import Fields
from millstream.models.spec import LinearSpec, NormSpec

CARD = Card("bert", "BERT, MiniLM and other encoders of the same build: embeddings, and scores of pairs")

OUTER: Mapping[str, str] = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "embed_norm",
    "pooler.dense": "pooler",
    "classifier": "classifier",
}
LAYER: Mapping[str, str] = {
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.out",
    "attention.output.LayerNorm": "attn_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
}
# The first releases named the parts of a norm otherwise.
KINDS: Mapping[str, str] = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


class Bert:
    name = "bert"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "bert"

    def spec(self, config: Mapping[str, Any]) -> EncoderSpec:
        fields = Fields(self.name, config)
        width = fields.integer("hidden_size", 768, high=2**24)
        heads = fields.integer("num_attention_heads", 12, high=2**14)
        if width % heads:
            raise fields.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
        num_layers = fields.integer("num_hidden_layers", high=2**14)
        vocab_size = fields.integer("vocab_size", high=2**24)
        inner = fields.integer("intermediate_size", 3072, high=2**24)
        context = fields.integer("max_position_embeddings", 512, high=2**30)
        norm = NormSpec(width, fields.number("layer_norm_eps", 1e-12))
        activation = fields.activation("hidden_act", "gelu")
        fields.only("position_embedding_type", "absolute")
        fields.only("is_decoder", False)
        fields.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "gradient_checkpointing")
        fields.ignore("sentence_transformers", "_num_labels", "pooler_fc_size", "pooler_num_attention_heads")
        fields.ignore("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality")
        fields.generation(vocab_size)
        labels = _labels(fields, config)
        layer = EncoderLayerSpec(
            heads,
            width // heads,
            LinearSpec(width, 3 * width, True, (("q", width), ("k", width), ("v", width)), shard="column"),
            LinearSpec(width, width, True, shard="row"),
            LinearSpec(width, inner, True, shard="column"),
            LinearSpec(inner, width, True, shard="row"),
            activation,
            norm,
        )
        num_types = fields.integer("type_vocab_size", 2, high=2**16)
        name = fields.raw("_name_or_path", "") or self.name
        fields.finish()
        return EncoderSpec(
            str(name), self.name, vocab_size, width, context, num_types, (layer,) * num_layers, norm, labels=labels
        )

    def rename(self, name: str) -> str | None:
        bare = name.removeprefix("bert.")
        if bare == "embeddings.position_ids" or bare.startswith("cls."):
            return None
        stem, _, kind = bare.rpartition(".")
        if kind not in KINDS:
            return name
        if (found := _LAYER.fullmatch(stem)) is not None and found[2] in LAYER:
            return f"layers.{found[1]}.{LAYER[found[2]]}.{KINDS[kind]}"
        return f"{OUTER[stem]}.{KINDS[kind]}" if stem in OUTER else name


def _labels(fields: Fields, config: Mapping[str, Any]) -> int:
    """Outputs of its classifier; 0 for an encoder without one."""
    architectures = config.get("architectures") or ()
    if not any(str(one).endswith("ForSequenceClassification") for one in architectures):
        return 0
    named = config.get("id2label")
    return len(named) if isinstance(named, Mapping) and named else fields.integer("num_labels", 2, high=2**16)


PLUGIN = Bert
