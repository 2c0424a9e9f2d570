"""The one builder: a ModelSpec and its tensors become a decoder.

It runs at three grains. Whole: `forward` takes a ragged step from token ids to hidden states. By layers: `embed`,
`run_layers(x, lo, hi)`, `head`. By module: `layers[i].attend` and `layers[i].channel`, each with any rows.
Positions are an input (`step.layout.positions`) and nothing is remembered between calls but what is in the pages.

Callers hold `torch.inference_mode()`.

Shapes: T tokens of a step, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from millstream.core.errors import BadFile
from millstream.models.blocks.attention import Attention, StepContext
from millstream.models.blocks.embedding import Embedding, embedding
from millstream.models.blocks.linear import Linear, linear
from millstream.models.blocks.mlp import Mlp, Moe
from millstream.models.blocks.norm import Norm
from millstream.models.blocks.rope import Rotary
from millstream.models.program import Program
from millstream.models.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, RopeSpec, dtype_bytes
from millstream.ops.ref.linear import softcap

__all__ = ["Decoder", "DecoderLayer", "StepContext", "build"]


class DecoderLayer:
    """One layer. Both halves take the residual stream (T, C) and return it, new, with their part added."""

    __slots__ = ("_channel", "_channel_norm", "_channel_post_norm", "_mixer_norm", "_mixer_post_norm", "mixer", "spec")

    def __init__(
        self,
        spec: LayerSpec,
        mixer: Attention,
        channel: Mlp | Moe,
        mixer_norm: Norm,
        channel_norm: Norm,
        mixer_post_norm: Norm | None,
        channel_post_norm: Norm | None,
    ) -> None:
        self.spec = spec
        self.mixer, self._channel = mixer, channel
        self._mixer_norm, self._channel_norm = mixer_norm, channel_norm
        self._mixer_post_norm, self._channel_post_norm = mixer_post_norm, channel_post_norm

    @property
    def place(self) -> int:
        """The layer's number among those of its cache group."""
        return self.mixer.place

    @property
    def mlp(self) -> Mlp | None:
        """Its channel, unless that is a mixture."""
        return self._channel if isinstance(self._channel, Mlp) else None

    def linears(self) -> list[Linear]:
        """Every matrix of the layer."""
        return [self.mixer.qkv, self.mixer.out, *self._channel.linears()]

    def norms(self) -> tuple[Norm, Norm | None, Norm, Norm | None]:
        """Before and after the mixer, before and after the channel."""
        return self._mixer_norm, self._mixer_post_norm, self._channel_norm, self._channel_post_norm

    def attend(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Adds attention; writes the keys and values of the step's tokens into their pages."""
        y = self.mixer(self._mixer_norm(x), step)
        if self._mixer_post_norm is not None:
            y = self._mixer_post_norm(y)
        return y.add_(x)

    def channel(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the MLP or the mixture."""
        y = self._channel(self._channel_norm(x))
        if self._channel_post_norm is not None:
            y = self._channel_post_norm(y)
        return y.add_(x)


class Decoder:
    """A decoder-only language model over paged keys and values."""

    def __init__(
        self,
        spec: ModelSpec,
        embed: Embedding,
        layers: list[DecoderLayer],
        final_norm: Norm,
        head: Linear,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.layers, self.dtype = spec, layers, dtype
        self._embed, self._final_norm, self._head = embed, final_norm, head
        self.program = Program.of(self)

    @property
    def lm_head(self) -> Linear:
        """The matrix of the head; where it is tied, that of the embedding."""
        return self._head

    def format_bytes(self) -> dict[str, int]:
        """Bytes of the matrices in each weight format; a tied head counts once."""
        found: dict[str, int] = {}
        packed = [self._embed.packed] + ([] if self.spec.tied else [self._head.packed])
        for layer in self.layers:
            packed += [linear.packed for linear in layer.linears()]
        for one in packed:
            found[one.format] = found.get(one.format, 0) + one.nbytes
        return found

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (T,) integer -> (T, C)."""
        return self._embed(tokens)

    def run_layers(self, x: torch.Tensor, lo: int, hi: int, step: StepContext) -> torch.Tensor:
        """The residual stream (T, C) through the layers [lo, hi)."""
        if isinstance(self.program, Program) and lo < hi and self.program.takes(step):
            return self.program.run_layers(x, lo, hi, step)
        for layer in self.layers[lo:hi]:
            x = layer.channel(layer.attend(x, step))
        return x

    def forward(self, tokens: torch.Tensor, step: StepContext) -> torch.Tensor:
        """tokens (T,) -> the residual stream after the last layer (T, C); `norm` and `head` take it from there."""
        if isinstance(self.program, Program) and self.program.takes(step):
            return self.program.forward(tokens, step)
        return self.run_layers(self.embed(tokens), 0, len(self.layers), step)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm, (rows, C) -> (rows, C)."""
        return self._final_norm(x)

    def best(self, x: torch.Tensor, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """The likeliest token of each of some `rows` of x, and its logit, NaN where any logit is one."""
        if isinstance(self.program, Program):
            return self.program.best(x, rows)
        most, tokens = self.head(x if len(rows) == x.shape[0] else x[list(rows)]).max(-1)
        return tokens.tolist(), most.tolist()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) float32 of the rows asked, from the residual stream (rows, C): final norm included."""
        if isinstance(self.program, Program):
            return self.program.head(x)
        logits = self._head(self._final_norm(x)).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else softcap(logits, cap)


def build(spec: ModelSpec, tensors: Mapping[str, torch.Tensor], dtype: str | torch.dtype = "float32") -> Decoder:
    """A decoder of `spec` out of `tensors`, which go by the names of `spec.tensors()` and are shared, not copied.

    Raises BadFile naming a tensor that is missing, too many, or of another shape than the spec's; ConfigError for an
    unknown dtype. Tensors of formats other than dense are checked by their format.
    """
    name = str(dtype).removeprefix("torch.")
    dtype_bytes(name)
    of_dtype: torch.dtype = getattr(torch, name)
    held = _checked(spec, tensors, of_dtype)
    device = held["final_norm.weight"].device.type
    rotaries: dict[RopeSpec, Rotary] = {}
    layers = []
    for index, (layer, place) in enumerate(zip(spec.layers, spec.group_layers, strict=True)):
        stem = f"layers.{index}"
        rope = layer.mixer.rope
        if rope is not None and rope not in rotaries:
            rotaries[rope] = Rotary(rope, layer.mixer.head_dim, of_dtype, device)
        norms = {part: Norm(norm, held[f"{stem}.{part}.weight"]) for part, norm in layer.norms()}
        mixer = Attention(
            layer.mixer,
            place,
            linear(layer.mixer.qkv, held, f"{stem}.attn.qkv"),
            linear(layer.mixer.out, held, f"{stem}.attn.out"),
            None if rope is None else rotaries[rope],
            norms.get("attn.q_norm"),
            norms.get("attn.k_norm"),
        )
        layers.append(
            DecoderLayer(
                layer,
                mixer,
                _channel(layer.channel, held, stem, of_dtype, device),
                norms["mixer_norm"],
                norms["channel_norm"],
                norms.get("mixer_post_norm"),
                norms.get("channel_post_norm"),
            )
        )
    embed = embedding(spec, held, of_dtype)
    head = Linear(spec.head, embed.packed, embed.format) if spec.tied else linear(spec.head, held, "head")
    return Decoder(spec, embed, layers, Norm(spec.final_norm, held["final_norm.weight"]), head, of_dtype)


def _channel(
    spec: MlpSpec | MoeSpec, tensors: Mapping[str, torch.Tensor], stem: str, dtype: torch.dtype, device: str
) -> Mlp | Moe:
    def mlp(of: MlpSpec, name: str) -> Mlp:
        gate_up, down = linear(of.gate_up, tensors, f"{name}.gate_up"), linear(of.down, tensors, f"{name}.down")
        return Mlp(of, gate_up, down, dtype, device)

    if isinstance(spec, MlpSpec):
        return mlp(spec, f"{stem}.mlp")
    moe = f"{stem}.moe"
    return Moe(
        spec,
        linear(spec.router, tensors, f"{moe}.router"),
        [mlp(spec.expert, f"{moe}.experts.{index}") for index in range(spec.num_experts)],
        None if spec.shared is None else mlp(spec.shared, f"{moe}.shared"),
        None if spec.shared_gate is None else linear(spec.shared_gate, tensors, f"{moe}.shared_gate"),
    )


def _checked(spec: ModelSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    packed = {name for name, linear_spec in spec.linears() if linear_spec.format != "dense"}
    if spec.embed_format != "dense":
        packed.add("embed")
    for wanted in spec.tensors():
        if wanted.name.rpartition(".")[0] in packed:
            continue
        found = tensors.get(wanted.name)
        if found is None:
            raise BadFile(spec.name, f"tensor {wanted.name!r} is missing")
        if tuple(found.shape) != wanted.shape:
            raise BadFile(
                spec.name,
                f"tensor {wanted.name!r} has shape {list(found.shape)}, the config asks for {list(wanted.shape)}",
            )
        held[wanted.name] = found.to(dtype)
    for name in tensors:
        if name not in held:
            if name.rpartition(".")[0] not in packed:
                raise BadFile(spec.name, f"tensor {name!r} is not part of this model")
            held[name] = tensors[name]
    return held
