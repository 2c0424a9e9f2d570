"""What a model is, in names and numbers: no weights, no torch.

    ModelSpec
    `- LayerSpec              one residual pair
       |- mixer: AttentionSpec   (tokens look at tokens)
       |- channel: MlpSpec | MoeSpec   (each token alone)
       `- norms before, and for some families after, each of the two

A spec knows its own arithmetic: parameters, bytes, flops. Quantizing or adding LoRA is a function from spec to spec,
applied before anything is built. `tensors()` lists every tensor that a checkpoint must hold, by our own names; a
family maps a checkpoint's names to them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError
from millstream.core.request import Kind

DTYPE_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}

Activation = Literal["silu", "gelu-tanh", "gelu"]
Shard = Literal["none", "column", "row"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm over `width`: x / rms(x) * (weight + offset)."""

    width: int
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """y (out) = W (out, in) x + b. `parts` are the rows of matrices that a checkpoint keeps apart and we keep as one.

    `format` names the weight format, `bits` what one weight takes in it (None: the model's dtype); `shard` says which
    side is split over ranks; `deltas` name the adapters' kinds that may be added to it.
    """

    in_width: int
    out_width: int
    bias: bool = False
    parts: tuple[tuple[str, int], ...] = ()
    format: str = "dense"
    bits: float | None = None
    shard: Shard = "none"
    deltas: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.in_width < 1 or self.out_width < 1:
            raise ConfigError(f"a linear layer of {self.in_width} x {self.out_width}: both sides must be 1 or more")
        if self.parts and sum(rows for _, rows in self.parts) != self.out_width:
            raise ConfigError(f"parts {self.parts} do not add up to {self.out_width} rows")

    @property
    def num_parameters(self) -> int:
        return self.in_width * self.out_width + (self.out_width if self.bias else 0)

    @property
    def flops(self) -> int:
        """Multiply-adds count twice."""
        return 2 * self.in_width * self.out_width

    def weight_bytes(self, dtype: str) -> int:
        bits = 8.0 * dtype_bytes(dtype) if self.bits is None else self.bits
        return math.ceil(self.in_width * self.out_width * bits / 8) + self.bias * self.out_width * dtype_bytes(dtype)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long waves divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): interpolation by parts, and cos and sin times `attention_factor`."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions on the first `dim` values of a head, the two halves of them paired."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `qkv` gives q, k and v in one product: heads * head_dim, then twice kv_heads * head_dim.

    `window` counts the token itself; None looks at everything before. `group` names the cache group.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    group: str
    qkv: LinearSpec
    out: LinearSpec
    rope: RopeSpec | None = None
    window: int | None = None
    qk_norm: NormSpec | None = None
    softcap: float | None = None

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        yield "attn.qkv", self.qkv
        yield "attn.out", self.out

    def norms(self) -> Iterator[tuple[str, NormSpec]]:
        if self.qk_norm is not None:
            yield "attn.q_norm", self.qk_norm
            yield "attn.k_norm", self.qk_norm

    def flops(self, context: int) -> int:
        """Of one token that sees `context` tokens, itself counted: scores and the weighted sum, without projections."""
        seen = context if self.window is None else min(context, self.window)
        return 4 * self.heads * self.head_dim * seen

    @property
    def kv_width(self) -> int:
        """Numbers kept for one token: K and V of all heads."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(activation(gate(x)) * up(x)), gate and up in one product."""

    inner: int
    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation = "silu"

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        yield "mlp.gate_up", self.gate_up
        yield "mlp.down", self.down


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Each token goes to its `top_k` experts by softmax of the router; `normalize` makes their weights sum to one.

    A `shared` expert takes every token, times the sigmoid of `shared_gate` when there is one.
    """

    num_experts: int
    top_k: int
    router: LinearSpec
    expert: MlpSpec
    normalize: bool = True
    shared: MlpSpec | None = None
    shared_gate: LinearSpec | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"{self.top_k} experts a token: must be from 1 to the number of experts, {self.num_experts}"
            )

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        yield "moe.router", self.router
        for index in range(self.num_experts):
            yield f"moe.experts.{index}.gate_up", self.expert.gate_up
            yield f"moe.experts.{index}.down", self.expert.down
        if self.shared is not None:
            yield "moe.shared.gate_up", self.shared.gate_up
            yield "moe.shared.down", self.shared.down
        if self.shared_gate is not None:
            yield "moe.shared_gate", self.shared_gate


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x += post(mixer(pre(x))), then the same with the channel; a norm that is None is the identity."""

    mixer: AttentionSpec
    channel: MlpSpec | MoeSpec
    mixer_norm: NormSpec
    channel_norm: NormSpec
    mixer_post_norm: NormSpec | None = None
    channel_post_norm: NormSpec | None = None

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        yield from self.mixer.linears()
        yield from self.channel.linears()

    def norms(self) -> Iterator[tuple[str, NormSpec]]:
        yield "mixer_norm", self.mixer_norm
        yield "channel_norm", self.channel_norm
        if self.mixer_post_norm is not None:
            yield "mixer_post_norm", self.mixer_post_norm
        if self.channel_post_norm is not None:
            yield "channel_post_norm", self.channel_post_norm
        yield from self.mixer.norms()


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Token ids that the model's own configuration gives meaning to."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the built model. `parts` (name, rows) are stacked, in order, along the first dimension.

    A tensor without parts of its own has one: itself.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model.

    `embed_scale` multiplies the embedding's rows (rounded to the model's dtype first, as the families that have one
    were trained); `logit_softcap` is c in c * tanh(logits / c). A `tied` head is the embedding, whose weight format is
    `embed_format`.
    """

    name: str
    family: str
    vocab_size: int
    width: int
    context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    head: LinearSpec
    tied: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    embed_format: str = "dense"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The cache groups in the order of their first layer."""
        found: dict[str, CacheGroup] = {}
        for layer in self.layers:
            mixer = layer.mixer
            group = CacheGroup(
                mixer.group,
                Keep.FULL if mixer.window is None else Keep.WINDOW,
                mixer.window,
                1,
                mixer.kv_heads,
                mixer.head_dim,
            )
            if (known := found.get(group.name)) is not None:
                if dataclasses.replace(known, num_layers=1) != group:
                    raise ConfigError(f"cache group {group.name!r} has layers of two kinds: {known} and {group}")
                group = dataclasses.replace(known, num_layers=known.num_layers + 1)
            found[group.name] = group
        return tuple(found.values())

    @property
    def kinds(self) -> frozenset[Kind]:
        """What may be asked of it."""
        return frozenset({Kind.GENERATE, Kind.SCORE})

    @property
    def vectors(self) -> Mapping[str, Any]:
        """What there is to know of the vectors that it gives (`ModelFacts.vectors`): it gives none."""
        return {}

    @property
    def spare(self) -> frozenset[str]:
        """Tensors of ours that a checkpoint may hold and that are not needed: a tied one may store the head again."""
        return frozenset({"head.weight"} if self.tied else ())

    @property
    def group_layers(self) -> tuple[int, ...]:
        """For each layer its place among the layers of its own cache group."""
        seen: Counter[str] = Counter()
        places = []
        for layer in self.layers:
            places.append(seen[layer.mixer.group])
            seen[layer.mixer.group] += 1
        return tuple(places)

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        """Every matrix that multiplies activations, by name; a tied head has no weights of its own and is left out."""
        for index, layer in enumerate(self.layers):
            for name, linear in layer.linears():
                yield f"layers.{index}.{name}", linear
        if not self.tied:
            yield "head", self.head

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the built model, and the checkpoint's tensors that it is stacked from."""
        yield _whole("embed.weight", (self.vocab_size, self.width))
        for index, layer in enumerate(self.layers):
            for name, norm in layer.norms():
                yield _whole(f"layers.{index}.{name}.weight", (norm.width,))
        yield _whole("final_norm.weight", (self.final_norm.width,))
        for name, linear in self.linears():
            stem = name.rpartition(".")[0]
            for kind in ("weight", "bias") if linear.bias else ("weight",):
                shape = (linear.out_width, linear.in_width) if kind == "weight" else (linear.out_width,)
                parts = tuple((f"{stem}.{part}.{kind}", rows) for part, rows in linear.parts)
                yield TensorSpec(f"{name}.{kind}", shape, parts) if parts else _whole(f"{name}.{kind}", shape)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors())

    @property
    def num_active_parameters(self) -> int:
        """Those that one token is multiplied with: its experts only, and the head, but no embedding rows."""
        total = float(self.head.num_parameters + self.final_norm.width)
        for layer in self.layers:
            total += sum(norm.width for _, norm in layer.norms())
            total += sum(count * linear.num_parameters for linear, count in _active(layer, 1))
        return round(total)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights when what has no format of its own is kept in `dtype`."""
        size = dtype_bytes(dtype)
        # An embedding that is not dense is in the head's format.
        bits = self.head.bits if self.embed_format != "dense" and self.head.bits is not None else 8.0 * size
        total = math.ceil(self.vocab_size * self.width * bits / 8) + self.final_norm.width * size
        total += sum(norm.width for layer in self.layers for _, norm in layer.norms()) * size
        return total + sum(linear.weight_bytes(dtype) for _, linear in self.linears())

    def flops_per_token(self, context: int) -> int:
        """Of one token that sees `context` tokens, itself counted, head included; a multiply-add counts twice."""
        total = float(self.head.flops)
        for layer in self.layers:
            total += layer.mixer.flops(context)
            total += sum(count * linear.flops for linear, count in _active(layer, 1))
        return round(total)

    def kv_bytes_per_token(self, dtype: str) -> dict[str, int]:
        """Bytes that one token takes in each cache group while the group keeps it."""
        size = dtype_bytes(dtype)
        total: Counter[str] = Counter()
        for layer in self.layers:
            total[layer.mixer.group] += layer.mixer.kv_width * size
        return dict(total)

    def step_bytes(
        self,
        num_tokens: int,
        contexts: tuple[int, ...],
        dtype: str,
        kv_dtype: str | None = None,
        heads: int | None = None,
    ) -> int:
        """Bytes that a step must move: weights once, KV of the `contexts` (one a row) and of the new tokens.

        Of a mixture only the experts that `num_tokens` tokens are expected to reach when each chooses evenly. `heads`
        are the rows that need logits (by default the rows); with none of them the head is not read.
        """
        size, kv_size = dtype_bytes(dtype), dtype_bytes(kv_dtype or dtype)
        total = num_tokens * self.width * size + self.final_norm.width * size
        if (len(contexts) if heads is None else heads) > 0:
            total += self.head.weight_bytes(dtype)
        for layer in self.layers:
            total += sum(norm.width for _, norm in layer.norms()) * size
            total += math.ceil(sum(count * linear.weight_bytes(dtype) for linear, count in _active(layer, num_tokens)))
            mixer = layer.mixer
            seen = sum(min(context, mixer.window or context) for context in contexts)
            total += (seen + num_tokens) * mixer.kv_width * kv_size
        return total


def with_formats(spec: ModelSpec, choose: Callable[[str, LinearSpec], LinearSpec]) -> ModelSpec:
    """The spec with each of its matrices, the head included, replaced by what `choose` makes of its name and spec.

    The experts of a mixture are of one kind: `choose` is asked for the first one.
    """

    def mlp(of: MlpSpec, stem: str) -> MlpSpec:
        return replace(of, gate_up=choose(f"{stem}.gate_up", of.gate_up), down=choose(f"{stem}.down", of.down))

    layers = []
    for index, layer in enumerate(spec.layers):
        stem = f"layers.{index}"
        mixer = replace(
            layer.mixer,
            qkv=choose(f"{stem}.attn.qkv", layer.mixer.qkv),
            out=choose(f"{stem}.attn.out", layer.mixer.out),
        )
        channel = layer.channel
        if isinstance(channel, MlpSpec):
            channel = mlp(channel, f"{stem}.mlp")
        else:
            gate = channel.shared_gate
            channel = replace(
                channel,
                router=choose(f"{stem}.moe.router", channel.router),
                expert=mlp(channel.expert, f"{stem}.moe.experts.0"),
                shared=None if channel.shared is None else mlp(channel.shared, f"{stem}.moe.shared"),
                shared_gate=None if gate is None else choose(f"{stem}.moe.shared_gate", gate),
            )
        layers.append(replace(layer, mixer=mixer, channel=channel))
    return replace(spec, layers=tuple(layers), head=choose("head", spec.head))


def dtype_bytes(dtype: str) -> int:
    """Raises ConfigError for a name that is no dtype of ours."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise ConfigError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPE_BYTES)}") from None


def _whole(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, ((name, shape[0]),))


def _active(layer: LayerSpec, num_tokens: int) -> Iterator[tuple[LinearSpec, float]]:
    """The layer's matrices and how many copies of each `num_tokens` tokens are expected to reach."""
    for _, linear in layer.mixer.linears():
        yield linear, 1.0
    channel = layer.channel
    if isinstance(channel, MlpSpec):
        for _, linear in channel.linears():
            yield linear, 1.0
        return
    reached = channel.num_experts * (1 - (1 - channel.top_k / channel.num_experts) ** num_tokens)
    for linear in (channel.expert.gate_up, channel.expert.down):
        yield linear, reached
    for part in (channel.router, channel.shared_gate):
        if part is not None:
            yield part, 1.0
    if channel.shared is not None:
        for _, linear in channel.shared.linears():
            yield linear, 1.0
