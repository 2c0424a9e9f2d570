"""A model's matrices as codes with scales (`block4`, `block8`), as near to how they are stored as these two allow.

What GGUF stores in 4 bits with scales for 32 values keeps its bits; other stored types, and floats, become `block8`.
Matrices that choose experts stay dense. The embedding is kept the same way, once where the head is tied to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from millstream.core import registry
from millstream.models.dequant import coded
from millstream.models.packed import ALWAYS_DENSE as ALWAYS_DENSE
from millstream.models.source import ModelSource
from millstream.models.spec import LinearSpec, ModelSpec, TensorSpec, with_formats
from millstream.ops.ref.blocks import RUN, pack_stream

BITS = {"block4": 5.0, "block8": 9.0}
_AS_STORED = {"Q4_0", "Q4_1", "Q4_K"}


def blocks_spec(spec: ModelSpec, source: ModelSource, spelled: Mapping[str, str]) -> ModelSpec:
    """The spec with a format for every matrix. `spelled` has the checkpoint's name of each part."""

    def kind(parts: list[str]) -> str:
        return "block4" if all(source.stored_type(spelled[part]) in _AS_STORED for part in parts) else "block8"

    def choose(name: str, linear: LinearSpec) -> LinearSpec:
        stem, _, last = name.rpartition(".")
        if last in ALWAYS_DENSE:
            return linear
        if name == "head" and spec.tied:
            found = kind(["embed.weight"])
        else:
            parts = [f"{stem}.{part}.weight" for part, _ in linear.parts] or [f"{name}.weight"]
            found = kind(parts)
        return replace(linear, format=found, bits=BITS[found])

    made = with_formats(spec, choose)
    return replace(made, embed_format=made.head.format if spec.tied else kind(["embed.weight"]))


def blocks_tensors(
    spec: ModelSpec, source: ModelSource, spelled: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of such a spec by the built model's names, matrices as streams, one after the other."""
    packed = {name: linear for name, linear in spec.linears() if linear.format != "dense"}
    for wanted in spec.tensors():
        stem, _, part = wanted.name.rpartition(".")
        if part == "weight" and (stem in packed or stem == "embed"):
            form = packed[stem].format if stem in packed else spec.embed_format
            yield f"{stem}.stream", torch.cat([_stream(name, spelled, source, form) for name in _joined(wanted)])
            yield f"{stem}.shape", torch.tensor(wanted.shape)
        else:
            yield wanted.name, torch.cat([source.tensor(spelled[name], torch.float32) for name, _ in wanted.parts])


def _joined(wanted: TensorSpec) -> list[tuple[str, ...]]:
    """The parts of a matrix, those together that must share a stream because they do not fill whole panels."""
    names = tuple(name for name, _ in wanted.parts)
    whole = all(rows % (2 * 16) == 0 for _, rows in wanted.parts)
    return [(name,) for name in names] if whole else [names]


def _stream(names: tuple[str, ...], spelled: Mapping[str, str], source: ModelSource, form: str) -> torch.Tensor:
    weight_format: Any = registry.make("weights", form, device=True)
    codes, scales, minima = [], [], []
    for name in names:
        raw = source.raw_tensor(spelled[name])
        found = coded(raw.data, raw.type, raw.shape) if raw.shape[-1] % RUN == 0 else None
        if found is not None and found[0] <= weight_format.bits:
            _, u, d, m = found
        else:
            u, d, m = weight_format.encode(source.tensor(spelled[name], torch.float32))
        codes.append(u)
        scales.append(d)
        minima.append(m)
    return pack_stream(torch.cat(codes), torch.cat(scales), torch.cat(minima), weight_format.bits)
