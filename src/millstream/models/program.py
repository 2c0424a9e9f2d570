"""A decoder's layers as one native call: what `ops/cpu/program.cpp` runs, made out of the built decoder.

A decode step of a small model is hundreds of calls so short that their number is what they cost. The program takes
their place where every layer is of a kind that it knows; elsewhere `Program.of` says why not, and the layers are called
one by one.

Shapes: T tokens of a step, C width, V vocabulary, S rows.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

import torch

from millstream.formats.weights.protocol import Packed
from millstream.models.blocks.attention import StepContext
from millstream.models.blocks.norm import Norm
from millstream.models.blocks.rope import Rotary
from millstream.ops import table
from millstream.ops.cpu import program as native
from millstream.ops.table import Refusal

if TYPE_CHECKING:
    from millstream.models.decoder import Decoder, DecoderLayer

_BITS = {"block4": 4, "block8": 8}
# Angles are tabled for as many positions as were seen, in steps of this many.
_POSITIONS = 1024


class Program:
    """Runs `decoder` natively. Holds addresses of its tensors, so it lives no longer than these."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        spec = decoder.spec
        self._groups = [group.name for group in spec.groups]
        self._rotaries: list[Rotary] = []
        layers = [self._layer(layer) for layer in decoder.layers]
        self._layers = (native.Layer * len(layers))(*layers)
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.empty(0), torch.empty(0)) for _ in self._rotaries
        ]
        self._ropes = (native.Rope * max(1, len(self._rotaries)))()
        self._paged: tuple[object, ...] = ()
        self._scratch = native.Scratch()
        self._lock = threading.Lock()

    @staticmethod
    def of(decoder: Decoder) -> Program | Refusal:
        """The program of a decoder, or why there is none."""
        why = _refuses(decoder)
        return Program(decoder) if why is None else why

    def takes(self, step: StepContext) -> bool:
        """Whether it attends as the step's backends do."""
        return all(group.backend.in_program for group in step.groups.values())

    def forward(self, tokens: torch.Tensor, step: StepContext) -> torch.Tensor:
        """tokens (T,) int64 -> the residual stream after the last layer (T, C) float32."""
        x = torch.empty((tokens.shape[0], self._decoder.spec.width), dtype=torch.float32)
        self._run(x, tokens, 0, len(self._layers), step)
        return x

    def run_layers(self, x: torch.Tensor, lo: int, hi: int, step: StepContext) -> torch.Tensor:
        """The residual stream (T, C) float32 through the layers [lo, hi), new memory."""
        x = x.clone(memory_format=torch.contiguous_format)
        self._run(x, None, lo, hi, step)
        return x

    def _run(self, x: torch.Tensor, tokens: torch.Tensor | None, lo: int, hi: int, step: StepContext) -> None:
        decoder, layout = self._decoder, step.layout
        embed = native.Matrix() if tokens is None else _matrix(decoder._embed.packed)
        with self._lock:
            self._point(step)
            # Positions are an input: they need not be those of the row's last tokens.
            self._turn(int(layout.positions.max()) + 1 if x.shape[0] else 0)
            groups = (native.Group * len(self._groups))()
            for place, name in enumerate(self._groups):
                held, pages = layout.groups[name], step.groups[name].pages
                kind = native.PLAIN_PAGES.get(pages.dtype, native.BYTE_PAGES)
                groups[place] = native.Group(
                    held.block_tables.data_ptr(), held.slots.data_ptr(), held.block_tables.shape[1],
                    pages.num_blocks, pages.block_size, kind,
                )  # fmt: skip
            args = native.Step(
                ctypes.addressof(self._layers), ctypes.addressof(groups), ctypes.addressof(self._ropes),
                embed, None if tokens is None else tokens.data_ptr(), layout.positions.data_ptr(),
                layout.query_start.data_ptr(), layout.seq_lens.data_ptr(), x.data_ptr(), None,
                lo, hi, len(self._groups), x.shape[0], layout.num_rows, x.shape[1],
                0, torch.get_num_threads(), decoder._embed.scale, layout.prefix_levels,
            )  # fmt: skip
            self._scratch.call("layers", args)
        for name, group in step.groups.items():
            group.pages.wrote(x.shape[0], sum(layer.spec.mixer.group == name for layer in decoder.layers[lo:hi]))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream of some rows (rows, C) -> logits (rows, V) float32."""
        logits = torch.empty((x.shape[0], self._decoder.spec.vocab_size), dtype=torch.float32)
        self._head(x, None, logits.data_ptr(), None, None)
        return logits

    def best(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token (R,) int64 of `rows` (R,) int64 of x, and its logit (R,) float32: no logits are kept."""
        tokens, most = torch.empty(rows.shape[0], dtype=torch.int64), torch.empty(rows.shape[0])
        self._head(x, rows, None, tokens.data_ptr(), most.data_ptr())
        return tokens, most

    def _head(
        self, x: torch.Tensor, rows: torch.Tensor | None, logits: int | None, best: int | None, most: int | None
    ) -> None:
        decoder = self._decoder
        spec = decoder.spec
        if x.stride(-1) != 1 or x.stride(0) != spec.width:
            x = x.contiguous()
        if rows is None:
            rows = torch.arange(x.shape[0])
        args = native.Head(
            _norm(decoder._final_norm), _matrix(decoder._head.packed), x.data_ptr(), rows.data_ptr(),
            logits, best, most, None, rows.shape[0], spec.width, 0, torch.get_num_threads(), spec.logit_softcap or 0.0,
        )  # fmt: skip
        with self._lock:
            self._scratch.call("head", args)

    def _point(self, step: StepContext) -> None:
        """Layers point at the pages of this step's runner. Several runners may share a decoder."""
        pages = tuple(step.groups[name].pages for name in self._groups)
        if len(pages) == len(self._paged) and all(a is b for a, b in zip(pages, self._paged, strict=True)):
            return
        for layer, held in zip(self._decoder.layers, self._layers, strict=True):
            held.k, held.v = step.groups[layer.spec.mixer.group].pages.addresses(layer.place)
        self._paged = pages

    def _turn(self, positions: int) -> None:
        """cos and sin of every position up to that many."""
        for place, rotary in enumerate(self._rotaries):
            if self._tables[place][0].shape[0] < positions:
                upto = -(-positions // _POSITIONS) * _POSITIONS
                cos, sin = (table.contiguous() for table in rotary.angles(torch.arange(upto)))
                self._tables[place] = (cos, sin)
                self._ropes[place] = native.Rope(cos.data_ptr(), sin.data_ptr(), cos.shape[1])

    def _layer(self, layer: DecoderLayer) -> native.Layer:
        mixer, mlp, spec = layer.mixer, layer.mlp, layer.spec.mixer
        rope = -1
        if mixer.rotary is not None:
            if mixer.rotary not in self._rotaries:
                self._rotaries.append(mixer.rotary)
            rope = self._rotaries.index(mixer.rotary)
        inner = mlp.spec.inner
        gate, up = _halves(mlp.gate_up.packed, inner)
        return native.Layer(
            *(_norm(norm) for norm in layer.norms()), _norm(mixer.q_norm), _norm(mixer.k_norm),
            _matrix(mixer.qkv.packed), _matrix(mixer.out.packed), gate, up, _matrix(mlp.down.packed),
            None, None, self._groups.index(spec.group), rope, native.ACTIVATIONS[mlp.spec.activation],
            spec.heads, spec.kv_heads, spec.head_dim, inner, spec.window or 0, spec.scale, spec.softcap or 0.0,
        )  # fmt: skip


def _refuses(decoder: Decoder) -> Refusal | None:
    if table.in_use() == table.REFERENCE:
        return Refusal("the reference was asked for")
    if decoder.dtype != torch.float32:
        return Refusal(f"activations of {decoder.dtype}")
    if decoder.spec.embed_format not in _BITS or decoder.spec.head.format not in _BITS:
        return Refusal("the embedding or the head is dense")
    kinds: dict[str, tuple[object, ...]] = {}
    for index, layer in enumerate(decoder.layers):
        mixer = layer.spec.mixer
        kind = (mixer.heads, mixer.scale, mixer.window, mixer.softcap)
        if kinds.setdefault(mixer.group, kind) != kind:
            return Refusal(f"layer {index} attends in another way than the rest of group {mixer.group!r}")
        if layer.mlp is None:
            return Refusal(f"layer {index} is a mixture of experts")
        for name, linear in layer.spec.linears():
            if linear.format not in _BITS:
                return Refusal(f"{name} of layer {index} is {linear.format}")
        if layer.mlp.spec.inner % 32:
            return Refusal(f"an inner width of {layer.mlp.spec.inner}, the program needs a multiple of 32")
        if layer.spec.mixer.head_dim > 256 or layer.spec.mixer.head_dim % 8:
            return Refusal(f"heads of {layer.spec.mixer.head_dim}, the program takes multiples of 8 up to 256")
    return native.refusal()


def _matrix(packed: Packed) -> native.Matrix:
    outputs, inputs = packed.shape
    return native.matrix(packed["stream"], outputs, inputs, _BITS[packed.format], packed.parts.get("bias"))


def _halves(packed: Packed, inner: int) -> tuple[native.Matrix, native.Matrix]:
    """Gate and up, which lie one after the other in one stream."""
    stream, bias = packed["stream"], packed.parts.get("bias")
    inputs, bits, half = packed.shape[1], _BITS[packed.format], stream.shape[0] // 2
    parts = [(stream[:half], None if bias is None else bias[:inner])]
    parts.append((stream[half:], None if bias is None else bias[inner:]))
    gate, up = (native.matrix(part, inner, inputs, bits, of) for part, of in parts)
    return gate, up


def _norm(norm: Norm | None) -> native.Norm:
    return native.Norm(None, 0.0) if norm is None else native.Norm(norm.weight.data_ptr(), norm.spec.eps)
