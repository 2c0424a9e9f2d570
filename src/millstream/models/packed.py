"""A folder whose matrices are packed already, as `millstream quantize` writes it: config, tensors, tokenizer.

    config.json          the model's own, and quantization_config:
                           quant_method "millstream", version, matrices and head {format, bits}, recipe
    model.safetensors    the tensors of `ModelSpec.tensors()` by our own names, each packed matrix NAME.weight as
                           NAME.stream (bytes as its format reads them) and NAME.shape; streams come first, each at a
                           multiple of 64 bytes, and are mapped, not copied
    millstream.tokenizer   where the model came without a tokenizer.json (a GGUF file)

Matrices that choose experts stay dense. Imports no torch: planning reads the spec only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.core import registry
from millstream.core.errors import BadFile, Unsupported, nearest
from millstream.models.source import PACKED_HERE, ModelSource
from millstream.models.spec import LinearSpec, ModelSpec, with_formats

if TYPE_CHECKING:
    import torch

VERSION = 1
TOKENIZER = "millstream.tokenizer"
# Of experts, and of a shared one's share: a few rows that decide much.
ALWAYS_DENSE = ("router", "shared_gate")


def spec_in(spec: ModelSpec, matrices: tuple[str, float | None], head: tuple[str, float | None]) -> ModelSpec:
    """The spec with its layers' matrices, and embedding and head, in formats of (name, bits a weight)."""

    def choose(name: str, linear: LinearSpec) -> LinearSpec:
        if name.rpartition(".")[2] in ALWAYS_DENSE:
            return linear
        form, bits = head if name == "head" else matrices
        return replace(linear, format=form, bits=bits)

    return replace(with_formats(spec, choose), embed_format=head[0])


def packed_names(spec: ModelSpec) -> dict[str, str]:
    """The packed matrices of a spec, the embedding among them, and the format of each."""
    found = {name: linear.format for name, linear in spec.linears() if linear.format != "dense"}
    return found | ({"embed": spec.embed_format} if spec.embed_format != "dense" else {})


def packed_spec(spec: ModelSpec, source: ModelSource) -> ModelSpec:
    """The spec in the formats that the source says it is packed in. Raises BadFile and Unsupported."""
    version = source.packing.get("version")
    if version != VERSION:
        raise Unsupported(f"{source.path} was packed in version {version!r} of this form, read here is {VERSION}")
    return spec_in(spec, _format(source, "matrices"), _format(source, "head"))


def _format(source: ModelSource, which: str) -> tuple[str, float | None]:
    path, said = source.path / "config.json", source.packing.get(which)
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise BadFile(path, f"quantization_config names no format of {which}")
    name, bits, known = said["format"], said.get("bits"), registry.names("weights")
    if name not in known:
        close = nearest(name, known)
        raise BadFile(
            path,
            f"quantization_config asks for weights in {name!r}"
            + (f"; the nearest is {close!r}" if close else "")
            + f"; there are: {', '.join(known)}",
        )
    if name == "dense":
        return name, None
    if not isinstance(bits, int | float) or isinstance(bits, bool) or not 0 < bits <= 64:
        raise BadFile(path, f"quantization_config says that {which} take {bits!r} bits a weight")
    return name, float(bits)


def packed_tensors(source: ModelSource, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Every tensor of such a folder. Raises BadFile for one that is missing, too many or of another type."""
    import torch

    there, found = dict.fromkeys(source.tensor_names()), {}
    for name, types in _expected(spec):
        if name not in there:
            close = nearest(name, there)
            raise BadFile(source.path, f"tensor {name!r} is missing" + (f"; the nearest is {close!r}" if close else ""))
        del there[name]
        stored = source.stored_type(name)
        if stored not in types:
            raise BadFile(source.path, f"tensor {name!r} is stored as {stored}, expected is {' or '.join(types)}")
        if types == _FLOATS:
            found[name] = source.tensor(name, torch.float32)
            continue
        raw = source.raw_tensor(name)
        data = raw.data.clone() if types == _SHAPE else raw.data
        found[name] = data.view(torch.int64 if types == _SHAPE else torch.uint8).reshape(raw.shape)
    for name in there:
        raise BadFile(source.path, f"tensor {name!r} is not part of this model")
    return found


_FLOATS, _SHAPE, _STREAM = ("F32", "F16", "BF16"), ("I64",), ("U8",)


def _expected(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    packed = packed_names(spec)
    for tensor in spec.tensors():
        stem, _, part = tensor.name.rpartition(".")
        if part == "weight" and stem in packed:
            yield f"{stem}.stream", _STREAM
            yield f"{stem}.shape", _SHAPE
        else:
            yield tensor.name, _FLOATS


def packing_of(spec: ModelSpec, tensors: Mapping[str, torch.Tensor], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config of packed tensors, with the bits a weight that they really take."""
    packed = packed_names(spec)

    def said(names: list[str], form: str) -> dict[str, Any]:
        values = sum(math.prod(tensors[f"{name}.shape"].tolist()) for name in names)
        size = sum(tensors[f"{name}.stream"].nbytes for name in names)
        return {"format": form, "bits": round(8 * size / values, 4) if values else None}

    ends = [name for name in packed if name in ("embed", "head")]
    layers = [name for name in packed if name not in ("embed", "head")]
    return {
        "quant_method": PACKED_HERE,
        "version": VERSION,
        "matrices": said(layers, packed[layers[0]]) if layers else {"format": "dense"},
        "head": said(ends, spec.embed_format) if ends else {"format": "dense"},
        "recipe": dict(recipe),
    }


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, tensors whose size is a multiple of 64 first, so that each of those begins at one.

    `metadata` stands in the header. Raises OSError.
    """
    import json

    import torch

    names = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    ordered = sorted(tensors, key=lambda name: bool(tensors[name].nbytes % 64))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in ordered:
        tensor = tensors[name]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(memoryview(tensors[name].contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
