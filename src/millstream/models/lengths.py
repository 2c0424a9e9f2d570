"""A model of how long answers will be: an encoder, and two linear heads on the vector that it gives of a prompt.

One head scores (a higher score ends sooner; only the order counts), the other says which of a few buckets the length
falls into. Heads are small enough to be fitted anew from what was seen (`train/lengths.py`), so the file keeps that as
well: vectors of prompts and the lengths of their answers. The encoder, here the trunk, is a model by name; where some
of its weights were trained too, the file keeps those.

    __metadata__  trunk, cap, served, frame: JSON, told: JSON, changed: JSON, names of weights of the trunk
    score.weight (V,)   score.bias ()   buckets.weight (B, V)   buckets.bias (B,)   seen.vectors (N, V) F32
    seen.lengths (N,) I64   trunk.NAME of each name in changed, F32

Shapes: N prompts, V numbers of a vector, B buckets of equal width up to `cap` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from millstream.core.errors import BadFile
from millstream.models.encoder import Encoder
from millstream.models.load import load_encoder
from millstream.models.opened import open_model
from millstream.models.packed import write_safetensors
from millstream.models.safetensors_file import read_safetensors
from millstream.text.tokenizer import Tokenizer

TRUNK = "all-minilm-l6-v2"
# What is read of a prompt: what it asks for stands at its beginning or at its end.
READ = 64
_TRUNK = "trunk."
_DTYPES = {"F32": torch.float32, "I64": torch.int64}


class Trunk:
    """Vectors (N, V) of texts, of length 1. `changed` are weights in the place of the encoder's own, by the names of
    `EncoderSpec.tensors()`. Raises what loading a model raises."""

    def __init__(self, name: str = TRUNK, changed: Mapping[str, torch.Tensor] | None = None) -> None:
        opened = open_model(name)
        self.name, self.changed = name, dict(changed or {})
        self.tokenizer: Tokenizer = opened.tokenizer()
        # Where products of bfloat16 are native they take a third less, and orders stay the same.
        native = torch.cpu._is_avx512_bf16_supported()
        self.encoder: Encoder = load_encoder(opened.source, "bfloat16" if native else "float32", changed).encoder

    def weights(self) -> Mapping[str, torch.Tensor]:
        """All weights of the encoder in float32, as training takes them."""
        return load_encoder(open_model(self.name).source, "float32", self.changed).encoder.tensors

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        return read(self.encoder, [self.ids(text) for text in texts])

    def ids(self, text: str) -> list[int]:
        """The tokens that are read of a text, `READ` at most."""
        # A long text is cut before it is tokenized: no token has more than these characters on the mean.
        most = 8 * READ
        if len(text) > 2 * most:
            text = text[:most] + text[-most:]
        ids = self.tokenizer.encode(text)
        return ids if len(ids) <= READ else ids[: READ // 2] + ids[-READ // 2 :]


def read(encoder: Encoder, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Vectors (N, V) of length 1 of texts of tokens, none of them empty."""
    bounds = torch.tensor([0, *map(len, rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.tensor([token for row in rows for token in row])
    return torch.nn.functional.normalize(encoder.vectors(encoder.forward(tokens, bounds), bounds), dim=-1)


@dataclass(slots=True)
class Heads:
    """`cap` is the most tokens that an answer had."""

    score: torch.Tensor  # (V,)
    score_bias: torch.Tensor  # ()
    buckets: torch.Tensor  # (B, V)
    buckets_bias: torch.Tensor  # (B,)
    cap: int

    @property
    def width(self) -> int:
        """Tokens of a bucket."""
        return -(-self.cap // len(self.buckets))

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """(N,), higher ends sooner."""
        return vectors @ self.score + self.score_bias

    def lengths(self, vectors: torch.Tensor, sure: float = 0.0) -> list[int]:
        """The upper edge of each one's bucket: the most probable (`sure` 0), or the first within which an answer ends
        with that probability."""
        logits = vectors @ self.buckets.T + self.buckets_bias
        if sure > 0:
            place = (logits.softmax(-1).cumsum(-1) < sure).sum(-1).clamp(max=len(self.buckets) - 1)
        else:
            place = logits.argmax(-1)
        return [min(self.cap, (one + 1) * self.width) for one in place.tolist()]


@dataclass(slots=True)
class Seen:
    """Prompts whose answers are known."""

    vectors: torch.Tensor  # (N, V)
    lengths: torch.Tensor  # (N,) int64


@dataclass(slots=True)
class LengthModel:
    """`served` is the model whose answers were measured, `told` what the training found. `frame` is what every prompt
    begins and ends with (a chat template, a system prompt), of which there is nothing to learn. `changed` are weights
    of the trunk that were trained (`Trunk`); `seen` and the heads are of vectors by these."""

    heads: Heads
    seen: Seen
    trunk: str = TRUNK
    served: str = ""
    frame: tuple[str, str] = ("", "")
    told: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)

    def bare(self, text: str) -> str:
        """A prompt without the frame, as far as it has it."""
        return text.removeprefix(self.frame[0]).removesuffix(self.frame[1]) or " "

    def save(self, path: Path) -> None:
        """Raises OSError."""
        heads = self.heads
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        write_safetensors(
            part,
            {
                "score.weight": heads.score,
                "score.bias": heads.score_bias.reshape(1),
                "buckets.weight": heads.buckets,
                "buckets.bias": heads.buckets_bias,
                "seen.vectors": self.seen.vectors,
                "seen.lengths": self.seen.lengths,
                **{_TRUNK + name: tensor for name, tensor in self.changed.items()},
            },
            {
                "kind": "millstream-lengths",
                "trunk": self.trunk,
                "cap": str(heads.cap),
                "served": self.served,
                "frame": json.dumps(self.frame),
                "told": json.dumps(self.told),
                "changed": json.dumps(list(self.changed)),
            },
        )
        part.replace(path)


def load(path: Path) -> LengthModel:
    """What `LengthModel.save` wrote. Raises BadFile for anything else, and where it holds weights of the trunk what
    opening that raises."""
    file = read_safetensors(path)
    if file.metadata.get("kind") != "millstream-lengths":
        raise BadFile(path, "is no model of lengths; `millstream train-ranker` writes those")
    found: dict[str, torch.Tensor] = {}
    for name, stored in file.tensors.items():
        if stored.dtype not in _DTYPES:
            raise BadFile(path, f"tensor {name!r} is {stored.dtype}, allowed are {', '.join(_DTYPES)}")
        found[name] = torch.frombuffer(file.raw(name), dtype=_DTYPES[stored.dtype]).reshape(stored.shape).clone()
    try:
        heads = Heads(
            found["score.weight"],
            found["score.bias"].reshape(()),
            found["buckets.weight"],
            found["buckets.bias"],
            int(file.metadata["cap"]),
        )
        seen = Seen(found["seen.vectors"], found["seen.lengths"])
        told = json.loads(file.metadata.get("told", "{}"))
        before, after = map(str, json.loads(file.metadata.get("frame", '["", ""]')))
    except (KeyError, ValueError, RuntimeError) as error:
        raise BadFile(path, f"is not whole ({type(error).__name__}: {error})") from None
    count, width = heads.buckets.shape if heads.buckets.dim() == 2 else (0, 0)
    if not (
        heads.cap > 0
        and count > 1
        and heads.score.shape == (width,)
        and heads.buckets_bias.shape == (count,)
        and seen.vectors.shape == (len(seen.lengths), width)
        and all(bool(torch.isfinite(one).all()) for one in (heads.score, heads.buckets, seen.vectors))
    ):
        raise BadFile(path, "its tensors do not fit together")
    trunk, served = file.metadata.get("trunk", TRUNK), file.metadata.get("served", "")
    return LengthModel(heads, seen, trunk, served, (before, after), told, _changed(path, file.metadata, found, trunk))


def _changed(
    path: Path, metadata: Mapping[str, str], found: Mapping[str, torch.Tensor], trunk: str
) -> dict[str, torch.Tensor]:
    """The weights of the trunk in a file: those that it says it has, each as the trunk's own. Raises BadFile."""
    there = {name.removeprefix(_TRUNK): tensor for name, tensor in found.items() if name.startswith(_TRUNK)}
    try:
        said = [str(name) for name in json.loads(metadata.get("changed", "[]"))]
    except (ValueError, TypeError) as error:
        raise BadFile(path, f"does not say which weights of its trunk changed ({error})") from None
    if odd := sorted(there.keys() ^ set(said)):
        fault = "is missing" if odd[0] in said else "is not among those that changed"
        raise BadFile(path, f"tensor {_TRUNK + odd[0]!r} {fault}")
    # Without such weights the trunk need not be on this machine for the file to be read.
    shapes = {tensor.name: tensor.shape for tensor in open_model(trunk).spec.tensors()} if there else {}
    for name, tensor in there.items():
        if name not in shapes:
            raise BadFile(path, f"tensor {_TRUNK + name!r} is not part of {trunk}")
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name]:
            raise BadFile(
                path,
                f"tensor {_TRUNK + name!r} is {list(tensor.shape)} of {tensor.dtype}, "
                f"{trunk} asks for {list(shapes[name])} of torch.float32",
            )
        if not torch.isfinite(tensor).all():
            raise BadFile(path, f"tensor {_TRUNK + name!r} holds what is no finite number")
    return there
