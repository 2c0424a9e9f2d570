"""A decoder as a library of modules runs it, op by op in torch, and beam search with a cache that is concatenated.

What an experiment on fusion or on a beam's cache has to beat: q, k and v as three products, each norm, rotation,
activation and sum an op of its own, keys and values of all layers concatenated with the new ones in each step, and
picked anew by beam (`index_select`) after it, as Hugging Face's `DynamicCache` does. The weights are those of a decoder
that the engine runs: shared where they are floats, multiplied by the same kernel where they are codes.

It is kinder than the original in three ways: the prompt is computed once and then expanded to the beams, query heads
that share a kv head are multiplied together (nothing is repeated), and the order of beams is worked out on the host.

Shapes: N rows (beams), T tokens of each, C width, K kv heads, G query heads of each, D head dimension, S tokens held,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from millstream.formats.weights.protocol import Packed
from millstream.models.blocks.linear import Linear
from millstream.models.blocks.norm import Norm
from millstream.models.blocks.rope import Rotary
from millstream.models.decoder import Decoder, DecoderLayer

Product = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}


class Concatenated:
    """Keys and values by layer, each (N, K, S, D) in one piece. `copied_bytes` were written to keep them so."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        self.layers = list(layers)
        self.copied_bytes = 0

    def expanded(self, rows: int) -> Concatenated:
        """The cache of one row, N times."""
        return Concatenated([(k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in self.layers])

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k, v (N, K, T, D) to a layer, and gives all that it holds now. Layers come in order."""
        if layer == len(self.layers):
            self.layers.append((k.contiguous(), v.contiguous()))
        else:
            held = self.layers[layer]
            self.layers[layer] = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)
        self._count(layer)
        return self.layers[layer]

    def reorder(self, parents: torch.Tensor) -> None:
        """Row n becomes what row `parents[n]` was."""
        for layer, (k, v) in enumerate(self.layers):
            self.layers[layer] = k.index_select(0, parents), v.index_select(0, parents)
            self._count(layer)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def _count(self, layer: int) -> None:
        self.copied_bytes += sum(half.nbytes for half in self.layers[layer])


class Modules:
    """`decoder`, whose layers must be dense and float32 or in blocks, without biases; raises ValueError where not."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._layers = [_Layer(layer, place) for place, layer in enumerate(decoder.layers)]
        (self._head,) = _products(decoder.lm_head, (decoder.spec.vocab_size,))

    def forward(self, tokens: torch.Tensor, start: int, cache: Concatenated) -> torch.Tensor:
        """tokens (N, T) at positions `start` on, after what the cache holds -> logits (N, V) of the last ones."""
        return self.logits(self.run(tokens, start, cache)[:, -1])

    @torch.inference_mode()
    def run(self, tokens: torch.Tensor, start: int, cache: Concatenated) -> torch.Tensor:
        """The same as far as the residual stream behind the last layer, (N, T, C)."""
        rows, count = tokens.shape
        x = self.decoder.embed(tokens.reshape(-1))
        positions = torch.arange(start, start + count)
        angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._layers:
            x = layer(x, rows, positions, angles, cache)
        return x.view(rows, count, -1)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Some rows of the residual stream (rows, C) -> logits (rows, V)."""
        logits = self._head(self.decoder.norm(x))
        cap = self.decoder.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def prompt(self, ids: Sequence[int]) -> tuple[torch.Tensor, Concatenated]:
        """The logits (1, V) behind a prompt, and its cache of one row."""
        cache = Concatenated()
        return self.forward(torch.tensor([ids]), 0, cache), cache

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, prompt: Concatenated, outputs: Sequence[Sequence[int]]) -> list[float]:
        """The summed logprob of each output behind a prompt (as `prompt` gives it). Outputs are of one length."""
        tokens = torch.tensor(outputs)
        start = prompt.layers[0][0].shape[2]
        x = self.run(tokens[:, :-1], start, prompt.expanded(len(outputs)))
        behind = self.logits(x.flatten(0, 1)).view(*tokens[:, 1:].shape, -1)
        rows = torch.cat((logits.expand(len(outputs), -1)[:, None], behind), 1).log_softmax(-1)
        summed: list[float] = rows.gather(2, tokens[..., None])[..., 0].sum(1).tolist()
        return summed


class _Layer:
    """The residual stream (N * T, C) through one layer, new memory."""

    def __init__(self, layer: DecoderLayer, place: int) -> None:
        if layer.mlp is None:
            raise ValueError("a mixture of experts is not among the modules here")
        self.spec, self.place, self.rotary = layer.spec.mixer, place, layer.mixer.rotary
        heads, kv = self.spec.heads * self.spec.head_dim, self.spec.kv_heads * self.spec.head_dim
        inner = layer.mlp.spec.inner
        self.q, self.k, self.v = _products(layer.mixer.qkv, (heads, kv, kv))
        (self.out,) = _products(layer.mixer.out, (layer.mixer.out.packed.shape[0],))
        self.gate, self.up = _products(layer.mlp.gate_up, (inner, inner))
        (self.down,) = _products(layer.mlp.down, (layer.mlp.down.packed.shape[0],))
        self.activation = ACTIVATIONS[layer.mlp.spec.activation]
        self.before, self.after, self.before_mlp, self.after_mlp = layer.norms()
        self.q_norm, self.k_norm = layer.mixer.q_norm, layer.mixer.k_norm

    def __call__(
        self,
        x: torch.Tensor,
        rows: int,
        positions: torch.Tensor,
        angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]],
        cache: Concatenated,
    ) -> torch.Tensor:
        y = self._attend(_norm(self.before, x), rows, positions, angles, cache)
        x = x + _norm(self.after, y)
        y = _norm(self.before_mlp, x)
        y = self.down(self.activation(self.gate(y)) * self.up(y))
        return x + _norm(self.after_mlp, y)

    def _attend(
        self,
        y: torch.Tensor,
        rows: int,
        positions: torch.Tensor,
        angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]],
        cache: Concatenated,
    ) -> torch.Tensor:
        spec, count = self.spec, len(positions)
        q = self.q(y).view(rows, count, spec.heads, spec.head_dim).transpose(1, 2)
        k = self.k(y).view(rows, count, spec.kv_heads, spec.head_dim).transpose(1, 2)
        v = self.v(y).view(rows, count, spec.kv_heads, spec.head_dim).transpose(1, 2)
        q, k = _norm(self.q_norm, q), _norm(self.k_norm, k)
        if self.rotary is not None:
            if self.rotary not in angles:
                cos, sin = self.rotary.angles(positions)
                angles[self.rotary] = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            q, k = _turned(q, *angles[self.rotary]), _turned(k, *angles[self.rotary])
        k, v = cache.extend(self.place, k, v)
        # (N, K, G * T, D): the query heads of a kv head lie one after the other.
        grouped = q.reshape(rows, spec.kv_heads, -1, spec.head_dim)
        scores = grouped @ k.transpose(-1, -2) * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        held = k.shape[2]
        if count > 1 or (spec.window is not None and held > spec.window):
            keys, at = torch.arange(held), positions[:, None]
            hidden = keys > at
            if spec.window is not None:
                hidden = hidden | (keys <= at - spec.window)
            scores = scores.masked_fill(hidden.repeat(spec.heads // spec.kv_heads, 1), -torch.inf)
        seen = torch.softmax(scores, -1) @ v
        seen = seen.view(rows, spec.heads, count, spec.head_dim).transpose(1, 2)
        return self.out(seen.reshape(rows * count, -1))


def _products(linear: Linear, sizes: tuple[int, ...]) -> list[Product]:
    """A matrix as products of their own over so many of its outputs each."""
    packed, form = linear.packed, linear.format
    if "bias" in packed.parts:
        raise ValueError("biases are not among the modules here")
    found: list[Product] = []
    first = 0
    for size in sizes:
        if "weight" in packed.parts:
            found.append(partial(F.linear, weight=packed["weight"][first : first + size]))
        else:
            # A stream lies in pairs of panels: 32 outputs each.
            if len(sizes) > 1 and (first % 32 or size % 32):
                raise ValueError(f"outputs {first} to {first + size} are not whole pairs of panels")
            stream = packed["stream"][first // 32 : -(-(first + size) // 32)]
            found.append(
                partial(form.linear, packed=Packed(packed.format, (size, packed.shape[1]), {"stream": stream}))
            )
        first += size
    return found


def _norm(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    weight = norm.weight + norm.offset if norm.offset else norm.weight
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.spec.eps))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (N, heads, T, D), cos and sin (T, D): the halves of a head turned against each other (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@dataclass(slots=True)
class Found:
    """What a search came to: (summed logprob, tokens) of each beam, best first; seconds of each step behind the prompt;
    bytes of KV held at the end, and copied in all steps."""

    beams: list[tuple[float, list[int]]]
    kv_bytes: int = 0
    copied_bytes: int = 0
    step_s: list[float] = field(default_factory=list)


@torch.inference_mode()
def beam_search(modules: Modules, logits: torch.Tensor, prompt: Concatenated, width: int, new: int) -> Found:
    """The `width` best outputs of `new` tokens behind a prompt (as `Modules.prompt` gives it); nothing ends one early.

    Candidates are ranked as the decode method `beam` ranks them: summed logprobs, then beam, then token. Each step but
    the last picks the cache anew.
    """
    start = prompt.layers[0][0].shape[2]
    first = torch.log_softmax(logits, -1).topk(width)
    scores = first.values[0].tolist()
    outputs = [[token] for token in first.indices[0].tolist()]
    cache = prompt.expanded(width)
    found = Found([])
    for step in range(1, new):
        begin = time.perf_counter()
        logits = modules.forward(torch.tensor([output[-1:] for output in outputs]), start + step - 1, cache)
        best = torch.log_softmax(logits, -1).topk(width)
        grown = sorted(
            (
                (scores[beam] + logprob, beam, token)
                for beam, (logprobs, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
                for logprob, token in zip(logprobs, tokens, strict=True)
            ),
            key=lambda candidate: (-candidate[0], candidate[1:]),
        )[:width]
        if step < new - 1:
            cache.reorder(torch.tensor([beam for _, beam, _ in grown]))
        outputs = [[*outputs[beam], token] for _, beam, token in grown]
        scores = [score for score, _, _ in grown]
        found.step_s.append(time.perf_counter() - begin)
    found.beams = list(zip(scores, outputs, strict=True))
    found.kv_bytes, found.copied_bytes = cache.nbytes, cache.copied_bytes
    return found
