"""What an encoder is, in names and numbers: no weights, no torch.

    EncoderSpec               tokens, positions and types, summed and normed
    |- EncoderLayerSpec       x = norm(x + attention(x)), then x = norm(x + mlp(x))
    `- Pooling, or a classifier over the first token

Attention looks both ways, so a text is computed whole, in one step, and nothing of it is kept. What comes of it is one
vector a text: an embedding, or the scores of a classifier (of a pair of texts: a cross-encoder).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from millstream.core.cache import CacheGroup
from millstream.core.request import Kind
from millstream.models.spec import Activation, LinearSpec, ModelSpec, NormSpec, TensorSpec, dtype_bytes

PoolingKind = Literal["mean", "cls", "max", "mean-sqrt-len", "last"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the rows of a text become one vector, and whether that has length 1 then.

    "mean" over its tokens, "max" of each value over them, the first ("cls") or the "last"; "mean-sqrt-len" is the sum
    over the square root of their number.
    """

    kind: PoolingKind = "mean"
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class EncoderLayerSpec:
    """Attention of `heads` over all tokens of the text, then `down(activation(up(x)))`; every matrix has a bias."""

    heads: int
    head_dim: int
    qkv: LinearSpec
    out: LinearSpec
    up: LinearSpec
    down: LinearSpec
    activation: Activation
    norm: NormSpec

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        yield "attn.qkv", self.qkv
        yield "attn.out", self.out
        yield "mlp.up", self.up
        yield "mlp.down", self.down

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder in the manner of BERT.

    `context` is the number of positions that it has; `usual_context` up to what it is meant to be used (sentences it
    was trained on). `num_types` tells the two texts of a pair apart. With `labels` a classifier over the first token
    takes the place of the pooling.
    """

    name: str
    family: str
    vocab_size: int
    width: int
    context: int
    num_types: int
    layers: tuple[EncoderLayerSpec, ...]
    embed_norm: NormSpec
    pooling: Pooling = Pooling()
    labels: int = 0
    usual_context: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vector_width(self) -> int:
        """Numbers that come of one text."""
        return self.labels or self.width

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.EMBED})

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """One, of a block a text: room to be counted, with no bytes behind it."""
        return (CacheGroup("texts"),)

    @property
    def spare(self) -> frozenset[str]:
        """Tensors of ours that a checkpoint may hold and that are not needed."""
        parts = () if self.labels else ("pooler", "classifier")
        return frozenset(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))

    @property
    def head(self) -> tuple[tuple[str, LinearSpec], ...]:
        if not self.labels:
            return ()
        return (
            ("pooler", LinearSpec(self.width, self.width, True)),
            ("classifier", LinearSpec(self.width, self.labels, True)),
        )

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        for index, layer in enumerate(self.layers):
            for name, linear in layer.linears():
                yield f"layers.{index}.{name}", linear
        yield from self.head

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the built model, and the checkpoint's tensors that it is stacked from."""
        tables = [("embed", self.vocab_size), ("positions", self.context)]
        if self.num_types:
            tables.append(("types", self.num_types))
        for name, rows in tables:
            yield _whole(f"{name}.weight", (rows, self.width))
        norms = ["embed_norm"]
        norms += [f"layers.{index}.{part}" for index in range(self.num_layers) for part in ("attn_norm", "mlp_norm")]
        for name in norms:
            yield _whole(f"{name}.weight", (self.width,))
            yield _whole(f"{name}.bias", (self.width,))
        for name, linear in self.linears():
            stem = name.rpartition(".")[0]
            for kind, shape in (("weight", (linear.out_width, linear.in_width)), ("bias", (linear.out_width,))):
                parts = tuple((f"{stem}.{part}.{kind}", rows) for part, rows in linear.parts)
                yield TensorSpec(f"{name}.{kind}", shape, parts) if parts else _whole(f"{name}.{kind}", shape)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors())

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * dtype_bytes(dtype)

    def flops_per_token(self, context: int) -> int:
        """Of one token of a text of `context` tokens; a multiply-add counts twice."""
        return sum(linear.flops for _, linear in self.linears()) + sum(
            4 * layer.heads * layer.head_dim * context for layer in self.layers
        )

    @property
    def vectors(self) -> Mapping[str, Any]:
        """What whoever asks for vectors has to know (`ModelFacts.vectors`)."""
        if self.labels:
            return {"width": self.labels, "labels": self.labels}
        return {"width": self.width, "pooling": self.pooling.kind, "normalize": self.pooling.normalize}


AnySpec = ModelSpec | EncoderSpec


def _whole(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, ((name, shape[0]),))
