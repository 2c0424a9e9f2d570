"""Where a model's numbers come from: a GGUF file or a Hugging Face folder, seen alike.

Whoever builds a model asks a `ModelSource` for its config and for its tensors, both in Hugging Face's terms; how they
are stored stays here. Opening reads headers only; a tensor is read, and converted, when it is asked for.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from millstream.core.errors import BadFile, UnknownModel, Unsupported
from millstream.models.gguf import is_gguf, read_gguf
from millstream.models.gguf_names import GgufModel, Piece
from millstream.models.home import checksum
from millstream.models.safetensors_file import (
    INDEX,
    WEIGHT_DTYPES,
    SafetensorsFile,
    StoredTensor,
    read_folder,
    read_json,
)

if TYPE_CHECKING:
    import torch


# The `quant_method` of a folder that was packed here.
PACKED_HERE = "millstream"


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it is stored: `data` is uint8 [nbytes], rows in order, in blocks of `type` (F32, Q4_K, ...)."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: torch.Tensor


class ModelSource(Protocol):
    """A model on disk, of any format.

    Names and config are Hugging Face's ("model.layers.0.self_attn.q_proj.weight"). A tensor that is not there raises
    BadFile naming it; one of a type that cannot be read raises Unsupported.
    """

    @property
    def id(self) -> str:
        """The name that the model was asked for by."""
        ...

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def generation_config(self) -> dict[str, Any]: ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The keys of a GGUF file (its tokenizer among them); empty for a folder."""
        ...

    @property
    def packing(self) -> Mapping[str, Any]:
        """How `millstream quantize` packed the matrices (`models/packed.py`); empty for floats and for GGUF files."""
        ...

    @property
    def quantization(self) -> str:
        """How most weights are stored, in a word: "Q4_K_M", "BF16"."""
        ...

    def tensor_names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_type(self, name: str) -> str:
        """How a tensor is stored: "Q4_K", "BF16"."""
        ...

    def stored_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        ...

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor converted to `dtype` (float32 when not said).

        It may share memory with a private mapping of the file: writing to it never reaches the file.
        """
        ...

    def raw_tensor(self, name: str) -> RawTensor: ...

    def checksum(self) -> str:
        """sha256 over all that decides the weights, remembered by path, size, mtime and inode. Raises BadFile."""
        ...


class GgufSource:
    """A GGUF file. Q and K rows of arch llama are put back in order, Gemma's norms are as in its own checkpoints."""

    def __init__(self, path: Path, id: str | None = None) -> None:
        self.path = path
        self.id = id or str(path)
        self._model = GgufModel(read_gguf(path))

    def __repr__(self) -> str:
        return f"GgufSource({self.id!r}, {self._model.arch}, {self.quantization})"

    @property
    def config(self) -> dict[str, Any]:
        return self._model.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._model.generation_config

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._model.file.metadata

    @property
    def packing(self) -> Mapping[str, Any]:
        return {}

    @property
    def quantization(self) -> str:
        return self._model.quantization()

    def tensor_names(self) -> list[str]:
        return list(self._model.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._piece(name).shape

    def stored_type(self, name: str) -> str:
        return self._piece(name).stored.type

    def stored_bytes(self) -> int:
        return sum(t.nbytes for t in self._model.file.tensors.values())

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        from millstream.models.dequant import dequantize

        raw = self.raw_tensor(name)
        return dequantize(raw.data, raw.type, raw.shape, dtype or torch.float32, f"{self.path}: tensor {name!r}")

    def raw_tensor(self, name: str) -> RawTensor:
        import torch

        piece = self._piece(name)
        stored = piece.stored
        data = torch.frombuffer(self._model.file.raw(stored.name), dtype=torch.uint8)
        if piece.expert is not None:
            each = stored.nbytes // stored.shape[0]
            data = data[piece.expert * each : (piece.expert + 1) * each]
        if piece.heads:
            # Blocks lie along rows, so rows can change places while still packed.
            rows = piece.shape[0]
            pairs = data.view(piece.heads, rows // piece.heads // 2, 2, stored.nbytes // rows)
            data = pairs.transpose(1, 2).reshape(-1)
        if piece.shift:
            data = (data.clone().view(torch.float32) + piece.shift).view(torch.uint8)
        return RawTensor(name, stored.type, piece.shape, data)

    def checksum(self) -> str:
        return _checksum(self.path)

    def _piece(self, name: str) -> Piece:
        piece = self._model.pieces.get(name)
        if piece is None:
            raise BadFile(self.path, f"tensor {name!r} is missing")
        return piece


class FolderSource:
    """A Hugging Face folder: config.json beside one safetensors file or an index and its shards."""

    def __init__(self, path: Path, id: str | None = None) -> None:
        self.path = path
        self.id = id or str(path)
        self.config = read_json(path / "config.json")
        if "auto_map" in self.config:
            warnings.warn(
                f"{path / 'config.json'} names code of its own (auto_map); it is ignored and never run", stacklevel=3
            )
            self.config = {k: v for k, v in self.config.items() if k != "auto_map"}
        quantized = self.config.pop("quantization_config", None)
        self.packing: Mapping[str, Any] = {}
        if isinstance(quantized, dict) and quantized.get("quant_method") == PACKED_HERE:
            self.packing = quantized
        elif quantized:
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
            raise Unsupported(
                f"{path} is quantized by {method}; read here are {', '.join(WEIGHT_DTYPES)} weights, "
                "GGUF files and what `millstream quantize` made"
            )
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        self._tensors = read_folder(path)

    def __repr__(self) -> str:
        return f"FolderSource({self.id!r}, {self.config.get('model_type')}, {self.quantization})"

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def quantization(self) -> str:
        if self.packing:
            matrices = self.packing.get("matrices")
            return str(matrices.get("format")) if isinstance(matrices, dict) else PACKED_HERE
        held: Counter[str] = Counter()
        for _, t in self._tensors.values():
            held[t.dtype] += t.nbytes
        return held.most_common(1)[0][0] if held else "none"

    def stored_bytes(self) -> int:
        return sum(t.nbytes for _, t in self._tensors.values())

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def stored_type(self, name: str) -> str:
        return self._find(name)[1].dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        raw = self.raw_tensor(name)
        if raw.type not in WEIGHT_DTYPES:
            raise Unsupported(
                f"{self._find(name)[0].path}: tensor {name!r} is stored as {raw.type}, "
                f"weights are read from {', '.join(WEIGHT_DTYPES)}"
            )
        stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[raw.type]
        data = raw.data.clone() if raw.data.data_ptr() % stored.itemsize else raw.data
        return data.view(stored).reshape(raw.shape).to(dtype or torch.float32)

    def raw_tensor(self, name: str) -> RawTensor:
        import torch

        file, t = self._find(name)
        data = torch.frombuffer(file.raw(name), dtype=torch.uint8) if t.nbytes else torch.empty(0, dtype=torch.uint8)
        return RawTensor(name, t.dtype, t.shape, data)

    def checksum(self) -> str:
        files = {file.path for file, _ in self._tensors.values()} | {self.path / "config.json"}
        if (self.path / INDEX).is_file():
            files.add(self.path / INDEX)
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(f"{file.name} {_checksum(file)}\n".encode())
        return digest.hexdigest()

    def _find(self, name: str) -> tuple[SafetensorsFile, StoredTensor]:
        found = self._tensors.get(name)
        if found is None:
            raise BadFile(self.path, f"tensor {name!r} is missing")
        return found


def open_source(path: str | Path, id: str | None = None) -> ModelSource:
    """Opens a GGUF file or a Hugging Face folder and checks its headers.

    `id` is the name that the model was asked for by (the path when not given). Raises UnknownModel when nothing is
    there, BadFile when what is there is damaged, Unsupported when it is sound but not of a known kind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, id)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UnknownModel(str(path), [n for n in beside if n.endswith(".gguf")], "No file or folder is at this path")
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"} and not is_gguf(path):
        raise Unsupported(
            f"{path} is a pickle, which can run code when opened and is not read here; use safetensors or GGUF"
        )
    if path.suffix == ".safetensors":
        raise Unsupported(
            f"{path} is one file of a model; name the folder that also holds its config.json: {path.parent}"
        )
    return GgufSource(path, id)


def _open_folder(path: Path, id: str | None) -> ModelSource:
    if (path / "config.json").is_file():
        return FolderSource(path, id)
    packed = sorted(path.glob("*.gguf"))
    if len(packed) == 1:
        return GgufSource(packed[0], id)
    if packed:
        raise UnknownModel(str(path), [p.name for p in packed], "The folder holds several; name one of the files")
    raise BadFile(path, "holds neither a config.json with safetensors nor a .gguf file")


def _checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror or error}") from error
