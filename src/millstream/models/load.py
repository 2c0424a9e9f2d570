"""From a model's files to a decoder that runs: family, spec, weights, build, each step timed.

Where the checkpoint keeps apart what we keep as one matrix (q, k and v; gate and up), its tensors are stacked here.
Tensors that already lie one after the other in the same mapping become one without a copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from millstream.core import registry
from millstream.core.errors import BadFile, ConfigError, Unsupported, nearest
from millstream.models.cache import keep, load_tensors
from millstream.models.decoder import Decoder, build
from millstream.models.encoder import Encoder, build_encoder
from millstream.models.encoder_spec import AnySpec, EncoderSpec
from millstream.models.families.protocol import Family, find_family
from millstream.models.opened import model_spec
from millstream.models.source import ModelSource
from millstream.models.spec import ModelSpec, TensorSpec, dtype_bytes


@dataclass(slots=True)
class LoadReport:
    """Seconds of each phase, in order, and what became of the tensors."""

    phases: dict[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    copied_bytes: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class LoadedModel:
    spec: ModelSpec
    decoder: Decoder
    report: LoadReport


def load_model(source: ModelSource, dtype: str = "float32", cached: bool = True, weights: str = "dense") -> LoadedModel:
    """Loads a model whole. `cached` lets converted weights be kept on disk for the next start.

    `weights` is how matrices are kept: "dense" (in `dtype`), "blocks" (`models/blocks_of.py`), or the name of a weight
    format, into which floats are packed (`models/packed_as.py`). A folder that `millstream quantize` made keeps its own
    formats, whatever "dense" says.

    Raises Unsupported for a family, a config field or a scaling that is not known, BadFile for a value that cannot be
    and for tensors that are missing, too many or of the wrong shape, ConfigError for a dtype that does not exist,
    UnknownName for weights that do not.
    """
    report = LoadReport()
    dtype_bytes(dtype)
    start = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal start
        now = time.perf_counter()
        report.phases[phase] = now - start
        start = now

    family = find_family(source.config)
    spec = model_spec(source, family)
    if not isinstance(spec, ModelSpec):
        raise Unsupported(f"{source.id} is an encoder: it gives vectors and no tokens")
    lap("config")
    if source.packing:
        from millstream.models.packed import packed_tensors

        if dtype != "float32" or weights != "dense":
            raise ConfigError(
                f"{source.id} holds its matrices as {source.quantization} and computes in float32: "
                f"model.dtype {dtype} with model.weights {weights!r} is for models stored otherwise"
            )
        ready: Mapping[str, torch.Tensor] = packed_tensors(source, spec)
        lap("weights")
    elif weights == "blocks":
        # Here, so that a dense start does not load it.
        from millstream.models.blocks_of import blocks_spec, blocks_tensors

        spelled = _spelled(source, family, spec, _parts(spec))
        _check_shapes(source, spec, spelled)
        spec = blocks_spec(spec, source, spelled)
        ready = keep(source, "blocks", lambda: blocks_tensors(spec, source, spelled), cached)
        lap("weights")
    elif weights != "dense":
        from millstream.models.packed_as import packed_spec, packed_tensors

        registry.card("weights", weights)
        spelled = _spelled(source, family, spec, _parts(spec))
        _check_shapes(source, spec, spelled)
        spec = packed_spec(spec, weights)
        ready = keep(source, weights, lambda: packed_tensors(spec, source, spelled), cached)
        spec = packed_spec(spec, weights, ready)
        lap("weights")
    else:
        tensors = load_tensors(source, getattr(torch, dtype), cached)
        lap("weights")
        ready, report.copied_bytes = prepare(source, family, spec, tensors)
        del tensors
        lap("fuse")
    try:
        decoder = build(spec, ready, dtype)
    except BadFile as error:
        raise BadFile(source.path, str(error)) if source.packing else error from None
    report.weight_bytes = sum(tensor.nbytes for tensor in ready.values())
    lap("build")
    return LoadedModel(spec, decoder, report)


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    encoder: Encoder
    report: LoadReport


def load_encoder(
    source: ModelSource, dtype: str = "float32", changed: Mapping[str, torch.Tensor] | None = None
) -> LoadedEncoder:
    """Loads an encoder whole. `changed` are tensors, by the names of its spec, in the place of the checkpoint's own.

    Raises as `load_model`, and Unsupported for a model that is none.
    """
    report = LoadReport()
    dtype_bytes(dtype)
    start = time.perf_counter()
    family = find_family(source.config)
    spec = model_spec(source, family)
    if not isinstance(spec, EncoderSpec):
        raise Unsupported(f"{source.id} is a model of the family {spec.family!r}, which is no encoder")
    ready, report.copied_bytes = prepare(source, family, spec, load_tensors(source, getattr(torch, dtype)))
    report.phases["weights"] = time.perf_counter() - start
    encoder = build_encoder(spec, {**ready, **(changed or {})}, dtype)
    report.weight_bytes = encoder.weight_bytes
    report.phases["build"] = time.perf_counter() - start - report.phases["weights"]
    return LoadedEncoder(encoder, report)


def prepare(
    source: ModelSource, family: Family, spec: AnySpec, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of `spec.tensors()` out of a checkpoint's, and how many bytes had to be copied for it.

    Every tensor of the checkpoint is used, or known not to be needed. Raises BadFile naming one that is missing, too
    many or of another shape, in the checkpoint's own spelling.
    """
    spelled = _spelled(source, family, spec, _parts(spec))
    _check_shapes(source, spec, spelled)
    ready: dict[str, torch.Tensor] = {}
    copied = 0
    for tensor in spec.tensors():
        pieces = [tensors[spelled[name]] for name, _ in tensor.parts]
        whole = pieces[0] if len(pieces) == 1 else _adjoining(pieces, tensor.shape)
        if whole is None:
            whole = torch.cat(pieces)
            copied += whole.nbytes
        ready[tensor.name] = whole
    return ready, copied


def _parts(spec: AnySpec) -> dict[str, tuple[int, TensorSpec]]:
    return {name: (rows, tensor) for tensor in spec.tensors() for name, rows in tensor.parts}


def _check_shapes(source: ModelSource, spec: AnySpec, spelled: Mapping[str, str]) -> None:
    for name, (rows, tensor) in _parts(spec).items():
        shape, found = (rows, *tensor.shape[1:]), tuple(source.shape(spelled[name]))
        if found != shape:
            raise BadFile(
                source.path, f"tensor {spelled[name]!r} has shape {list(found)}, the config asks for {list(shape)}"
            )


def _spelled(
    source: ModelSource, family: Family, spec: AnySpec, parts: Mapping[str, tuple[int, TensorSpec]]
) -> dict[str, str]:
    """Our name of each part -> the checkpoint's name of it."""
    spelled: dict[str, str] = {}
    for name in source.tensor_names():
        ours = family.rename(name)
        if ours is None or ours in spec.spare:
            continue
        if ours not in parts:
            raise BadFile(source.path, f"tensor {name!r} is not one that this {family.name} model has")
        if ours in spelled:
            raise BadFile(source.path, f"tensors {spelled[ours]!r} and {name!r} are the same part of the model")
        spelled[ours] = name
    for ours, (_, tensor) in parts.items():
        if ours not in spelled:
            close = nearest(ours, spelled)
            raise BadFile(
                source.path,
                f"the tensor for {ours!r} {list(tensor.shape)} is missing"
                + (f"; the nearest that is there is {spelled[close]!r}" if close else ""),
            )
    return spelled


def _adjoining(pieces: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor | None:
    """One view over tensors that follow each other in the same memory, or None."""
    first = pieces[0]
    address = first.data_ptr()
    for piece in pieces:
        if not piece.is_contiguous() or piece.data_ptr() != address:
            return None
        if piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        address += piece.nbytes
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return first.as_strided(shape, strides)
