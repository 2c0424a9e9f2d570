"""A model of how long answers will be: an encoder that stays as it is, and two linear heads on the vector of a prompt.

One head scores (a higher score ends sooner; only the order counts), the other says which of a few buckets the length
falls into. Heads are small enough to be fitted anew from what was seen (`train/lengths.py`), so the file keeps that as
well: vectors of prompts and the lengths of their answers.

    __metadata__  trunk, cap, served, frame: JSON, told: JSON
    score.weight (V,)   score.bias ()   buckets.weight (B, V)   buckets.bias (B,)   seen.vectors (N, V) F32
    seen.lengths (N,) I64

Shapes: N prompts, V numbers of a vector, B buckets of equal width up to `cap` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
_DTYPES = {"F32": torch.float32, "I64": torch.int64}


class Trunk:
    """Vectors (N, V) of texts, of length 1. Raises what loading a model raises."""

    def __init__(self, name: str = TRUNK) -> None:
        opened = open_model(name)
        self.name = name
        self.tokenizer: Tokenizer = opened.tokenizer()
        # Where products of bfloat16 are native they take a third less, and orders stay the same.
        native = torch.cpu._is_avx512_bf16_supported()
        self.encoder: Encoder = load_encoder(opened.source, "bfloat16" if native else "float32").encoder

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [self._ids(text) for text in texts]
        bounds = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tokens = torch.tensor([token for row in rows for token in row])
        found = self.encoder.vectors(self.encoder.forward(tokens, bounds), bounds)
        return torch.nn.functional.normalize(found, dim=-1)

    def _ids(self, text: str) -> list[int]:
        # A long text is cut before it is tokenized: no token has more than these characters on the mean.
        most = 8 * READ
        if len(text) > 2 * most:
            text = text[:most] + text[-most:]
        ids = self.tokenizer.encode(text)
        return ids if len(ids) <= READ else ids[: READ // 2] + ids[-READ // 2 :]


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
    begins and ends with (a chat template, a system prompt), of which there is nothing to learn."""

    heads: Heads
    seen: Seen
    trunk: str = TRUNK
    served: str = ""
    frame: tuple[str, str] = ("", "")
    told: dict[str, Any] = field(default_factory=dict)

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
            },
            {
                "kind": "millstream-lengths",
                "trunk": self.trunk,
                "cap": str(heads.cap),
                "served": self.served,
                "frame": json.dumps(self.frame),
                "told": json.dumps(self.told),
            },
        )
        part.replace(path)


def load(path: Path) -> LengthModel:
    """What `LengthModel.save` wrote. Raises BadFile for anything else."""
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
    return LengthModel(
        heads, seen, file.metadata.get("trunk", TRUNK), file.metadata.get("served", ""), (before, after), told
    )
