"""A model's matrices in one weight format, named when it is loaded: packed out of floats, one matrix after the other.

Matrices that choose experts stay dense. The embedding is kept the same way, once where the head is tied to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from millstream.models.blocks.linear import weight_format
from millstream.models.blocks_of import ALWAYS_DENSE
from millstream.models.source import ModelSource
from millstream.models.spec import LinearSpec, ModelSpec, with_formats


def packed_spec(spec: ModelSpec, form: str, tensors: Mapping[str, torch.Tensor] | None = None) -> ModelSpec:
    """The spec with every matrix in the format `form`. `tensors`, once there are any, say what a weight takes."""
    held: Counter[str] = Counter()
    for name, tensor in (tensors or {}).items():
        stem, _, part = name.rpartition(".")
        if part not in ("shape", "bias"):
            held[stem] += tensor.nbytes

    def choose(name: str, linear: LinearSpec) -> LinearSpec:
        if name.rpartition(".")[2] in ALWAYS_DENSE:
            return linear
        stored = held["embed" if name == "head" and spec.tied else name]
        bits = 8.0 * stored / (linear.in_width * linear.out_width) if stored else linear.bits
        return replace(linear, format=form, bits=bits)

    return replace(with_formats(spec, choose), embed_format=form)


def packed_tensors(
    spec: ModelSpec, source: ModelSource, spelled: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of such a spec by the built model's names: of a matrix the parts that its format has, and `shape`.

    `spelled` has the checkpoint's name of each part.
    """
    packed = {name: linear.format for name, linear in spec.linears() if linear.format != "dense"}
    packed["embed"] = spec.embed_format
    for wanted in spec.tensors():
        whole = torch.cat([source.tensor(spelled[name], torch.float32) for name, _ in wanted.parts])
        stem, _, part = wanted.name.rpartition(".")
        if part != "weight" or packed.get(stem, "dense") == "dense":
            yield wanted.name, whole
            continue
        for name, tensor in weight_format(packed[stem]).pack(whole).parts.items():
            yield f"{stem}.{name}", tensor
        yield f"{stem}.shape", torch.tensor(wanted.shape)
