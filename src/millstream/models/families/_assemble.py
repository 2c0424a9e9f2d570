"""Puts the numbers of a family together into a ModelSpec: what all decoder-only families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millstream.models.families._fields import Fields
from millstream.models.spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that every family states."""

    vocab_size: int
    width: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float


def read_shape(fields: Fields, default_eps: float = 1e-6, **defaults: int) -> Shape:
    """Reads the sizes and checks that they fit together. `defaults` are those of the family, by field name."""

    def integer(name: str, high: int = 2**24) -> int:
        return fields.integer(name, defaults[name], high=high) if name in defaults else fields.integer(name, high=high)

    width, heads = integer("hidden_size"), integer("num_attention_heads", 2**14)
    kv_heads = fields.optional_integer("num_key_value_heads") or defaults.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    head_dim = fields.optional_integer("head_dim") or defaults.get("head_dim")
    if head_dim is None:
        if width % heads:
            raise fields.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}, without a head_dim")
        head_dim = width // heads
    return Shape(
        integer("vocab_size"),
        width,
        integer("num_hidden_layers", 2**14),
        heads,
        kv_heads,
        head_dim,
        integer("max_position_embeddings", 2**30),
        fields.number("rms_norm_eps", default_eps),
    )


def attention(
    shape: Shape,
    rope: RopeSpec,
    *,
    window: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: NormSpec | None = None,
    scale: float | None = None,
) -> AttentionSpec:
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return AttentionSpec(
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.head_dim**-0.5 if scale is None else scale,
        "full" if window is None else f"window-{window}",
        LinearSpec(
            shape.width,
            q_rows + 2 * kv_rows,
            qkv_bias,
            (("q", q_rows), ("k", kv_rows), ("v", kv_rows)),
            shard="column",
        ),
        LinearSpec(q_rows, shape.width, out_bias, shard="row"),
        rope,
        window,
        qk_norm,
    )


def mlp(width: int, inner: int, activation: Activation, bias: bool = False) -> MlpSpec:
    return MlpSpec(
        inner,
        LinearSpec(width, 2 * inner, bias, (("gate", inner), ("up", inner)), shard="column"),
        LinearSpec(inner, width, bias, shard="row"),
        activation,
    )


def read_moe(
    fields: Fields,
    shape: Shape,
    activation: Activation,
    inner: int,
    normalize: bool,
    shared_inner: int | None = None,
    *,
    default_experts: int,
    default_top_k: int,
) -> MoeSpec:
    """A mixture block; the two names that the number of experts goes by are one field."""
    named = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    fields.ignore("num_local_experts", "num_experts")
    num_experts = fields.integer(named, default_experts, high=2**14)
    top_k = fields.integer("num_experts_per_tok", default_top_k, high=num_experts)
    shared = None if shared_inner is None else mlp(shape.width, shared_inner, activation)
    return MoeSpec(
        num_experts,
        top_k,
        LinearSpec(shape.width, num_experts),
        mlp(shape.width, inner, activation),
        normalize,
        shared,
        None if shared is None else LinearSpec(shape.width, 1),
    )


def sparse_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are mixtures: every `decoder_sparse_step`-th that `mlp_only_layers` does not name."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(fields.integers("mlp_only_layers"))
    if outside := [index for index in dense if not 0 <= index < num_layers]:
        raise fields.wrong("mlp_only_layers", outside[0], f"layers from 0 to {num_layers - 1}")
    return [index not in dense and (index + 1) % step == 0 for index in range(num_layers)]


def assemble(
    fields: Fields,
    shape: Shape,
    mixer: Callable[[int], AttentionSpec],
    channel: Callable[[int], MlpSpec | MoeSpec],
    *,
    norm_offset: float = 0.0,
    post_norms: bool = False,
    tied_default: bool = False,
    embed_scale: float | None = None,
    logit_softcap: float | None = None,
) -> ModelSpec:
    """The whole model; `mixer` and `channel` give those of layer i. Ends the reading of the configuration."""
    norm = NormSpec(shape.width, shape.eps, norm_offset)
    post = norm if post_norms else None
    tied = fields.flag("tie_word_embeddings", tied_default)
    generation = fields.generation(shape.vocab_size)
    name = fields.raw("_name_or_path", "") or fields.family
    layers = tuple(LayerSpec(mixer(i), channel(i), norm, norm, post, post) for i in range(shape.num_layers))
    fields.finish()
    return ModelSpec(
        str(name),
        fields.family,
        shape.vocab_size,
        shape.width,
        shape.context,
        layers,
        norm,
        LinearSpec(shape.width, shape.vocab_size, shard="column"),
        tied,
        embed_scale,
        logit_softcap,
        generation,
    )
