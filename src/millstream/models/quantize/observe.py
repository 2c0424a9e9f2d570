"""What a layer's matrices see of a text: the model is run a layer at a time over windows of it, by its own blocks.

Shapes: T tokens of a window, C width, I inputs of a matrix, K kv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from millstream.core import registry
from millstream.models.blocks.attention import StepContext, step_context
from millstream.models.blocks.linear import Linear
from millstream.models.decoder import Decoder, DecoderLayer
from millstream.ops.attention.protocol import AttentionAsk, choose
from millstream.ops.layout import BatchLayout, GroupLayout

BLOCK = 64
# Rows of inputs that are kept as they are, of each matrix.
ROWS = 256


@dataclass(slots=True)
class Seen:
    """The inputs of one matrix: gram (I, I) is X^T X over all tokens, each first scaled to a mean square of one; `most`
    (I,) the largest of each input, `rows` a few tokens as they are."""

    gram: torch.Tensor
    most: torch.Tensor
    rows: torch.Tensor

    def scaled(self, by: torch.Tensor) -> Seen:
        """The same inputs divided by `by` (I,)."""
        return Seen(self.gram / by / by[:, None], self.most / by, self.rows / by)

    def ordered(self, order: torch.Tensor) -> Seen:
        return Seen(self.gram[order][:, order], self.most[order], self.rows[:, order])


@dataclass(slots=True)
class LayerSeen:
    """Of one layer: what each matrix saw, by its name in the layer, and the largest keys (K, D), positions included."""

    inputs: dict[str, Seen] = field(default_factory=dict)
    keys: torch.Tensor | None = None


def contexts(decoder: Decoder, length: int, kv: str = "plain") -> StepContext:
    """A step of one row of `length` tokens from the first position on, over pages of its own. It can be used again.

    `kv` names the format of the pages.
    """
    spec, formats = decoder.spec, registry.make("kv", kv, device=True)
    num_blocks, dtype = -(-length // BLOCK), str(decoder.dtype).removeprefix("torch.")
    pages, backends = {}, {}
    for group in spec.groups:
        held = formats.allocate(group, num_blocks, BLOCK, dtype)
        mixer = next(layer.mixer for layer in spec.layers if layer.mixer.group == group.name)
        ask = AttentionAsk(
            device="cpu",
            dtype=dtype,
            page_dtype=str(held.dtype).removeprefix("torch."),
            page_layout=held.layout,
            query_heads=mixer.heads,
            kv_heads=mixer.kv_heads,
            head_dim=mixer.head_dim,
            block_size=BLOCK,
            window=mixer.window,
            softcap=mixer.softcap,
        )
        pages[group.name], backends[group.name] = held, choose(ask, "auto").backend
    positions = torch.arange(length)
    group_layout = GroupLayout(positions, torch.arange(num_blocks, dtype=torch.int32)[None])
    layout = BatchLayout(
        torch.tensor([0, length], dtype=torch.int32),
        positions,
        torch.tensor([length], dtype=torch.int32),
        dict.fromkeys(pages, group_layout),
        BLOCK,
        length,
        length,
    )
    return step_context(layout, pages, backends)


def observe(layer: DecoderLayer, windows: Sequence[torch.Tensor], step: StepContext) -> LayerSeen:
    """Runs one layer over every window (T, C), which it replaces by what comes out, and returns what was seen.

    A mixture's experts are not looked into.
    """
    watched = {"attn.qkv": layer.mixer.qkv, "attn.out": layer.mixer.out}
    if layer.mlp is not None:
        watched |= {"mlp.gate_up": layer.mlp.gate_up, "mlp.down": layer.mlp.down}
    found = LayerSeen()
    each = -(-ROWS // len(windows))
    before = {name: linear._linear for name, linear in watched.items()}
    for name, linear in watched.items():
        _watch(linear, found.inputs, name, each)
    try:
        for window in windows:
            _, k, _ = layer.mixer.project(layer.norms()[0](window), step)
            most = k.abs().amax(0)
            found.keys = most if found.keys is None else torch.maximum(found.keys, most)
            window.copy_(layer.channel(layer.attend(window, step)))
    finally:
        for name, linear in watched.items():
            linear._linear = before[name]
    # The projections were asked for twice.
    found.inputs["attn.qkv"].gram /= 2
    return found


def _watch(linear: Linear, seen: dict[str, Seen], name: str, each: int) -> None:
    multiply = linear._linear

    def watched(x: torch.Tensor, packed: object) -> torch.Tensor:
        most, rows = x.abs().amax(0), x[:: max(1, x.shape[0] // each)][:each].clone()
        # Every token counts alike. A few have inputs a thousand times those of the rest, and what is wrong in them is
        # divided by as much in the next norm.
        even = x * x.square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        if name not in seen:
            seen[name] = Seen(even.T @ even, most, rows)
        else:
            held = seen[name]
            held.gram.addmm_(even.T, even)
            torch.maximum(held.most, most, out=held.most)
            if held.rows.shape[0] < ROWS:
                held.rows = torch.cat((held.rows, rows))
        return multiply(x, packed)  # type: ignore[arg-type]

    linear._linear = watched
