"""A decoder's layers as one native call: what `ops/cpu/program.cpp` runs, made out of the built decoder.

A decode step of a small model is hundreds of calls so short that their number is what they cost. The program takes
their place where every layer is of a kind that it knows; elsewhere `Program.of` says why not, and the layers are called
one by one.

Shapes: T tokens of a step, C width, V vocabulary, S rows.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from millstream.models.blocks.attention import StepContext
from millstream.models.blocks.embedding import Embedding
from millstream.models.blocks.linear import Linear, weight_format
from millstream.models.blocks.norm import Norm
from millstream.models.blocks.rope import Rotary
from millstream.ops import table
from millstream.ops.cpu import program as native
from millstream.ops.table import Refusal

if TYPE_CHECKING:
    from millstream.models.decoder import Decoder, DecoderLayer

_NOTHING = native.Matrix()
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
        self._step, self._held = native.Step(), (native.Group * len(self._groups))()
        self._head_args = native.Head(norm=_norm(decoder._final_norm), matrix=_matrix(decoder._head))
        self._embedding = _matrix(decoder._embed)
        self._written = {name: [layer.spec.mixer.group == name for layer in decoder.layers] for name in self._groups}
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
        layout = step.layout
        with self._lock:
            self._point(step)
            # Positions are an input: they need not be those of the row's last tokens.
            known = layout.num_positions
            self._turn(int(layout.positions.max()) + 1 if known is None and x.shape[0] else known or 0)
            for group, name in zip(self._held, self._groups, strict=True):
                held, pages = layout.groups[name], step.groups[name].pages
                group.block_tables, group.slots = held.block_tables.data_ptr(), held.slots.data_ptr()
                group.table_stride = held.block_tables.shape[1]
                group.num_blocks, group.block_size = pages.num_blocks, pages.block_size
                group.kind = native.PAGES[pages.layout, pages.dtype]
            args = self._step
            args.layers, args.groups = ctypes.addressof(self._layers), ctypes.addressof(self._held)
            args.ropes = ctypes.addressof(self._ropes)
            args.embedding = _NOTHING if tokens is None else self._embedding
            args.tokens = None if tokens is None else tokens.data_ptr()
            args.embed_scale = self._decoder._embed.scale
            args.positions, args.query_start = layout.positions.data_ptr(), layout.query_start.data_ptr()
            args.seq_lens, args.x = layout.seq_lens.data_ptr(), x.data_ptr()
            args.first_layer, args.last_layer, args.num_groups = lo, hi, len(self._groups)
            args.num_tokens, args.width = x.shape
            args.num_rows, args.num_threads = layout.num_rows, torch.get_num_threads()
            args.levels = layout.prefix_levels
            self._scratch.call("layers", args)
        for name, group_step in step.groups.items():
            group_step.pages.wrote(x.shape[0], sum(self._written[name][lo:hi]))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream of some rows (rows, C) -> logits (rows, V) float32."""
        logits = torch.empty((x.shape[0], self._decoder.spec.vocab_size), dtype=torch.float32)
        self._head(x, range(x.shape[0]), logits.data_ptr(), None, None)
        return logits

    def best(self, x: torch.Tensor, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """The likeliest token of each of some `rows` of x, and its logit: no logits are kept."""
        tokens, most = (ctypes.c_int64 * len(rows))(), (ctypes.c_float * len(rows))()
        self._head(x, rows, None, ctypes.addressof(tokens), ctypes.addressof(most))
        return list(tokens), list(most)

    def _head(
        self, x: torch.Tensor, rows: Sequence[int], logits: int | None, best: int | None, most: int | None
    ) -> None:
        spec = self._decoder.spec
        if x.stride(-1) != 1 or x.stride(0) != spec.width:
            x = x.contiguous()
        which = (ctypes.c_int64 * len(rows))(*rows)
        with self._lock:
            args = self._head_args
            args.x, args.rows, args.num_rows = x.data_ptr(), ctypes.addressof(which), len(rows)
            args.logits, args.best, args.most = logits, best, most
            args.width, args.num_threads = spec.width, torch.get_num_threads()
            args.softcap = spec.logit_softcap or 0.0
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
        return native.Layer(
            *(_norm(norm) for norm in layer.norms()), _norm(mixer.q_norm), _norm(mixer.k_norm),
            _matrix(mixer.qkv), _matrix(mixer.out),
            _matrix(mlp.gate_up, 0, inner), _matrix(mlp.gate_up, inner), _matrix(mlp.down),
            None, None, self._groups.index(spec.group), rope, native.ACTIVATIONS[mlp.spec.activation],
            spec.heads, spec.kv_heads, spec.head_dim, inner, spec.window or 0, spec.scale, spec.softcap or 0.0,
        )  # fmt: skip


def _refuses(decoder: Decoder) -> Refusal | None:
    if table.in_use() == table.REFERENCE:
        return Refusal("the reference was asked for")
    if decoder.dtype != torch.float32:
        return Refusal(f"activations of {decoder.dtype}")
    for name, kind in (("embedding", decoder.spec.embed_format), ("head", decoder.spec.head.format)):
        if not _known(kind):
            return Refusal(f"the {name} is {kind}")
    kinds: dict[str, tuple[object, ...]] = {}
    for index, layer in enumerate(decoder.layers):
        mixer = layer.spec.mixer
        kind = (mixer.heads, mixer.scale, mixer.window, mixer.softcap)
        if kinds.setdefault(mixer.group, kind) != kind:
            return Refusal(f"layer {index} attends in another way than the rest of group {mixer.group!r}")
        if layer.mlp is None:
            return Refusal(f"layer {index} is a mixture of experts")
        for name, linear in layer.spec.linears():
            if not _known(linear.format):
                return Refusal(f"{name} of layer {index} is {linear.format}")
        if layer.mlp.spec.inner % 32:
            return Refusal(f"an inner width of {layer.mlp.spec.inner}, the program needs a multiple of 32")
        if layer.spec.mixer.head_dim > 256 or layer.spec.mixer.head_dim % 8:
            return Refusal(f"heads of {layer.spec.mixer.head_dim}, the program takes multiples of 8 up to 256")
    return native.refusal()


def _known(weights: str) -> bool:
    return hasattr(weight_format(weights), "native")


def _matrix(of: Linear | Embedding, first: int = 0, last: int | None = None) -> native.Matrix:
    """Some outputs of a matrix: gate and up lie one after the other in one stream."""
    found: native.Matrix = of.format.native(of.packed, first, last)  # type: ignore[attr-defined]
    return found


def _norm(norm: Norm | None) -> native.Norm:
    return native.Norm(None, 0.0) if norm is None else native.Norm(norm.weight.data_ptr(), norm.spec.eps)
