"""The builder of encoders: an EncoderSpec and its tensors become something that gives one vector a text.

Texts lie end to end, without padding; a text's vector has the same bits in any company where products are native.
Callers hold `torch.inference_mode()`.

Shapes: T tokens of all texts, S texts, C width, V numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from millstream.core.errors import BadFile
from millstream.models.blocks.linear import Linear, linear
from millstream.models.encoder_spec import EncoderLayerSpec, EncoderSpec
from millstream.models.spec import dtype_bytes
from millstream.ops.cpu import fused as _fused  # noqa: F401 - registers
from millstream.ops.ref.linear import embedding
from millstream.ops.ref.mlp import activate
from millstream.ops.ref.norm import layer_norm
from millstream.ops.ref.ragged import ragged_attention
from millstream.ops.table import Ask


@dataclass(frozen=True, slots=True)
class _Layer:
    spec: EncoderLayerSpec
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    attn_norm: tuple[torch.Tensor, torch.Tensor]
    mlp_norm: tuple[torch.Tensor, torch.Tensor]


class Encoder:
    """`tensors` are those of `spec.tensors()`, in `dtype`.

    Gradients of `forward` and `vectors` reach them if they ask for some, where it was built and runs under
    `table.use("ref")`: native products know of none.
    """

    def __init__(self, spec: EncoderSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.spec, self.dtype, self.tensors = spec, dtype, tensors
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._embed, self._positions = tensors["embed.weight"], tensors["positions.weight"]
        self._types = tensors.get("types.weight")
        self._embed_norm = _pair(tensors, "embed_norm")
        self._layers = [
            _Layer(
                layer,
                *(linear(of, tensors, f"layers.{index}.{name}") for name, of in layer.linears()),
                _pair(tensors, f"layers.{index}.attn_norm"),
                _pair(tensors, f"layers.{index}.mlp_norm"),
            )
            for index, layer in enumerate(spec.layers)
        ]
        self._head = [linear(of, tensors, name) for name, of in spec.head]
        ask = Ask("cpu", dtype, spec.width)
        self._norm, self._attend, self._activate = (op.resolve(ask) for op in (layer_norm, ragged_attention, activate))

    def forward(
        self, tokens: torch.Tensor, query_start: torch.Tensor, types: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows (T, C) of texts: tokens and types (T,) int64, query_start (S + 1,) int32. Without types all are 0."""
        lengths = query_start.diff()
        positions = torch.arange(tokens.shape[0]) - torch.repeat_interleave(query_start[:-1], lengths)
        x = embedding(tokens, self._embed)
        if self._types is not None:
            x += self._types[0] if types is None else embedding(types, self._types)
        x += embedding(positions, self._positions)
        x = self._norm(x, *self._embed_norm, self.spec.embed_norm.eps)
        for layer in self._layers:
            spec, eps = layer.spec, layer.spec.norm.eps
            qkv = layer.qkv(x).view(x.shape[0], 3, spec.heads, spec.head_dim)
            seen = self._attend(qkv[:, 0], qkv[:, 1], qkv[:, 2], query_start, spec.scale)
            x = self._norm(layer.out(seen.reshape(x.shape)).add_(x), *layer.attn_norm, eps)
            y = layer.down(self._activate(layer.up(x), spec.activation))
            x = self._norm(y.add_(x), *layer.mlp_norm, eps)
        return x

    def vectors(self, rows: torch.Tensor, query_start: torch.Tensor) -> torch.Tensor:
        """Of the rows (T, C) of texts one vector each, (S, V) float32. No text is empty."""
        bounds = query_start.long()
        if self._head:
            pooler, classifier = self._head
            return classifier(torch.tanh(pooler(rows[bounds[:-1]]))).float()
        kind = self.spec.pooling.kind
        if kind == "cls":
            out = rows[bounds[:-1]].float()
        elif kind == "last":
            out = rows[bounds[1:] - 1].float()
        else:
            # One text after the other: a sum must not depend on what else there is.
            texts = rows.float().split(bounds.diff().tolist())
            out = torch.stack([_pooled(text, kind) for text in texts])
        return torch.nn.functional.normalize(out, dim=-1) if self.spec.pooling.normalize else out


def build_encoder(spec: EncoderSpec, tensors: Mapping[str, torch.Tensor], dtype: str = "float32") -> Encoder:
    """An encoder of `spec` out of `tensors`, which go by the names of `spec.tensors()` and are shared, not copied.

    Raises BadFile naming a tensor that is missing, too many, or of another shape; ConfigError for an unknown dtype.
    """
    dtype_bytes(dtype)
    of_dtype: torch.dtype = getattr(torch, dtype)
    held: dict[str, torch.Tensor] = {}
    for wanted in spec.tensors():
        found = tensors.get(wanted.name)
        if found is None:
            raise BadFile(spec.name, f"tensor {wanted.name!r} is missing")
        if tuple(found.shape) != wanted.shape:
            raise BadFile(
                spec.name,
                f"tensor {wanted.name!r} has shape {list(found.shape)}, the config asks for {list(wanted.shape)}",
            )
        held[wanted.name] = found.to(of_dtype)
    if extra := [name for name in tensors if name not in held]:
        raise BadFile(spec.name, f"tensor {extra[0]!r} is not part of this model")
    return Encoder(spec, held, of_dtype)


def _pair(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def _pooled(rows: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "max":
        return rows.amax(0)
    return rows.sum(0) / (rows.shape[0] ** 0.5 if kind == "mean-sqrt-len" else rows.shape[0])
