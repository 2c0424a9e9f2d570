"""safetensors files and folders of them, read without trusting them.

    8 bytes: length of the header (little endian) | header: JSON, name -> dtype, shape, data_offsets | the data

The header is checked whole before a byte of data is used: the offsets lie inside the file, leave no gap and no
overlap, and agree with dtype and shape. The data is memory-mapped. Every fault is a `BadFile` naming file and tensor.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millstream.core.errors import BadFile, Unsupported

MAX_HEADER_BYTES = 100 * 1000 * 1000
MAX_DIMS = 16
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# dtype -> bits of a value
DTYPES: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
# Those that a weight can be read from.
WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked header over a mapped file."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    _map: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> memoryview:
        """The stored bytes of a tensor, no copy, in a private mapping. KeyError on unknown names."""
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.offset : tensor.offset + tensor.nbytes]


def read_safetensors(path: str | Path) -> SafetensorsFile:
    """Maps one file and checks its header. Raises BadFile."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 10:
                raise BadFile(path, f"{size} bytes are too few for a safetensors file")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise BadFile(path, "is missing") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror or error}") from error
    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadFile(
            path, f"the header says it has {length} bytes, allowed are {MAX_HEADER_BYTES}: not a safetensors file?"
        )
    if length > size - 8:
        raise BadFile(path, f"the header says it has {length} bytes, the file has {size}: it is truncated or lies")
    header = _parse(path, mapped[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadFile(path, "__metadata__ is not a map of strings")
    start, room = 8 + length, size - 8 - length
    found = [_entry(path, name, entry, start, room) for name, entry in header.items()]
    expected = start
    for t in sorted(found, key=lambda t: (t.offset, t.nbytes)):
        if t.offset != expected:
            fault = "overlaps the tensor before it" if t.offset < expected else "leaves a gap before it"
            raise BadFile(path, f"tensor {t.name!r} at byte {t.offset} {fault}, which ends at {expected}")
        expected = t.offset + t.nbytes
    if expected != size:
        raise BadFile(path, f"{size - expected} bytes follow the last tensor, which ends at {expected}")
    return SafetensorsFile(path, {t.name: t for t in found}, metadata, mapped)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise BadFile(path, f"{key!r} appears twice in the header")
            seen[key] = value
        return seen

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadFile(path, "the header is not a JSON object")
    return header


def _entry(path: Path, name: str, entry: Any, start: int, room: int) -> StoredTensor:
    def bad(what: str) -> BadFile:
        return BadFile(path, f"tensor {name!r}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("its entry is not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {dtype!r:.40}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(d) is int and d >= 0 for d in shape):
        raise bad(f"shape {shape!r:.80} is not a list of at most {MAX_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise bad(f"data_offsets {offsets!r:.80} are not two positions")
    begin, end = offsets
    if begin > end or end > room:
        raise bad(f"data_offsets {begin} to {end} are not inside the {room} bytes of data: truncated or lying")
    values = 1
    for d in shape:
        values *= d
        if values > room:
            break
    if values * DTYPES[dtype] != (end - begin) * 8:
        raise bad(f"{end - begin} bytes do not hold the shape {shape} of {dtype}")
    return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB. Raises BadFile."""
    content = _read_json(path)
    if not isinstance(content, dict):
        raise BadFile(path, "is not a JSON object")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects from a file of at most 100 MB. Raises BadFile."""
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise BadFile(path, "is not a JSON list of objects")
    return content


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise BadFile(path, f"is larger than {MAX_HEADER_BYTES} bytes")
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadFile(
            path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"is not JSON: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files that make up the weights in a folder. Raises BadFile or Unsupported.

    With an index: the shards it names, whether or not they are there. Else the single file.
    """
    if (folder / INDEX).is_file():
        return sorted(set(_weight_map(folder).values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    there = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(there) == 1:
        return there
    if there:
        raise BadFile(
            folder, f"has {len(there)} safetensors files ({there[0]}, ...) but no {INDEX} that says what is where"
        )
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise Unsupported(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when opened and is not read "
            "here; convert it to safetensors (transformers: model.save_pretrained(folder, safe_serialization=True))"
        )
    if (folder / "adapter_config.json").is_file():
        raise Unsupported(f"{folder} is an adapter, not a whole model; name its base model instead")
    raise BadFile(folder, f"holds no weights: neither {SINGLE}, nor {INDEX}, nor a .gguf file")


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(index, "has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadFile(
                index, f"tensor {name!r}: {shard!r:.80} is not the name of a safetensors file beside the index"
            )
    return weight_map


def read_folder(folder: Path) -> dict[str, tuple[SafetensorsFile, StoredTensor]]:
    """Every tensor of a folder: name -> the file it is in, and where. Raises BadFile or Unsupported."""
    shards = weight_files(folder)
    files = {shard: read_safetensors(folder / shard) for shard in shards}
    tensors: dict[str, tuple[SafetensorsFile, StoredTensor]] = {}
    if (folder / INDEX).is_file():
        for name, shard in _weight_map(folder).items():
            if name not in files[shard].tensors:
                raise BadFile(folder / shard, f"tensor {name!r} is missing, though {INDEX} says that it is here")
            tensors[name] = (files[shard], files[shard].tensors[name])
        return tensors
    for file in files.values():
        for name, tensor in file.tensors.items():
            tensors[name] = (file, tensor)
    return tensors
