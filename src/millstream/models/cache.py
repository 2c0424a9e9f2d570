"""Converted weights, kept on disk and mapped into memory.

Unpacking a GGUF file to float takes time and memory of its own at each start. Done once, the result is kept as

    $MILLSTREAM_HOME/converted/<checksum>-<kind>-v<CONVERTER>/weights.bin      tensors, each at a multiple of 64 bytes
                                                             /manifest.json    names, types, shapes, offsets, checks

where the kind is a dtype (all tensors in it) or a way to keep matrices (`models/blocks_of.py`),

and a later start maps it: pages come from the page cache, are shared by all processes and can be dropped under memory
pressure. The folder appears whole or not at all. Before it is trusted, its size and the edges of each tensor are
checked; if the file was touched since it was written, all of it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.core.errors import ModelError
from millstream.models.home import home, locked
from millstream.models.source import GgufSource, ModelSource

if TYPE_CHECKING:
    import torch

# Rises whenever the same file would be converted to other numbers or another layout.
CONVERTER = 2
ALIGNMENT = 64
_EDGE_BYTES = 4096


def load_tensors(
    source: ModelSource, dtype: torch.dtype | None = None, cached: bool = True
) -> Mapping[str, torch.Tensor]:
    """All tensors of a source under their Hugging Face names, as `dtype` (float32 when not said).

    A GGUF source is converted once and mapped from then on; with `cached=False`, or when the cache cannot be written
    (a warning says why), it is converted into memory. A folder's tensors are mapped from their own files and converted
    on access where the dtype differs. Raises BadFile and Unsupported as the source does.
    """
    import torch

    dtype = dtype or torch.float32
    if not isinstance(source, GgufSource):
        return _OnAccess(source, dtype)
    if cached:
        try:
            names = _side_by_side(source.tensor_names())
            room = sum(math.prod(source.shape(name)) for name in names) * dtype.itemsize
            return _kept(
                source,
                str(dtype).removeprefix("torch."),
                lambda: ((name, source.tensor(name, dtype)) for name in names),
                room,
            )
        except OSError as error:
            warnings.warn(f"converted weights of {source.id} are not kept: {error.strerror or error}", stacklevel=2)
    return {name: source.tensor(name, dtype) for name in source.tensor_names()}


def converted_folder(checksum: str, kind: str) -> Path:
    """Where the converted weights of the file with that sha256 are, or will be."""
    return home() / "converted" / f"{checksum}-{kind}-v{CONVERTER}"


def forget_converted(checksum: str) -> int:
    """Removes the converted weights of a file in every dtype and version. Returns the bytes freed."""
    freed = 0
    for folder in (home() / "converted").glob(f"{checksum}-*"):
        freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        shutil.rmtree(folder, ignore_errors=True)
    return freed


class _OnAccess(Mapping[str, "torch.Tensor"]):
    """Tensors that are read when they are looked at and not kept."""

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._names = dict.fromkeys(source.tensor_names())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._source.tensor(name, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def keep(
    source: ModelSource, kind: str, make: Callable[[], Iterator[tuple[str, torch.Tensor]]], cached: bool = True
) -> Mapping[str, torch.Tensor]:
    """The tensors that `make` yields, made once for these weights and this `kind` and mapped from then on.

    With `cached=False`, or when the cache cannot be written (a warning says why), they are made into memory.
    """
    if cached:
        try:
            return _kept(source, kind, make)
        except OSError as error:
            warnings.warn(f"converted weights of {source.id} are not kept: {error.strerror or error}", stacklevel=2)
    return dict(make())


def _kept(
    source: ModelSource, kind: str, make: Callable[[], Iterator[tuple[str, torch.Tensor]]], room: int = 0
) -> Mapping[str, torch.Tensor]:
    folder = converted_folder(source.checksum(), kind)
    found = _mapped(folder)
    if found is not None:
        return found
    with locked(f"converted-{folder.name}"):
        # Somebody else may have written it while this process waited.
        found = _mapped(folder)
        if found is None:
            _write(folder, source, make(), room or source.stored_bytes())
            found = _mapped(folder)
    if found is None:
        raise OSError(f"{folder} cannot be read back")
    return found


def _write(folder: Path, source: ModelSource, tensors: Iterator[tuple[str, torch.Tensor]], room: int) -> None:
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < room * 1.05:
        raise OSError(f"they need {room / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        entries: dict[str, dict[str, Any]] = {}
        crc = 0
        with open(temporary / "weights.bin", "wb") as file:
            for name, tensor in tensors:
                padding = bytes(-file.tell() % ALIGNMENT)
                data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                entries[name] = {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "offset": file.tell() + len(padding),
                    "nbytes": len(data),
                    "edges": _edges(data),
                }
                for part in (padding, data):
                    file.write(part)
                    crc = zlib.crc32(part, crc)
            file.flush()
            stat = os.fstat(file.fileno())
        manifest = {
            "source": str(source.path),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "crc32": crc,
            "tensors": entries,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# Projections of one input lie one after the other, so that whoever stacks them into one matrix need not copy.
_NEIGHBOURS = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}


def _side_by_side(names: list[str]) -> list[str]:
    """The names in order, but those of one block and kind come together, projections in stacking order."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        block, _, part = module.rpartition(".")
        groups.setdefault((block, kind), []).append((_NEIGHBOURS.get(part, len(_NEIGHBOURS)), name))
    return [name for group in groups.values() for _, name in sorted(group, key=lambda ranked: ranked[0])]


def _edges(data: memoryview) -> int:
    return zlib.crc32(data[-_EDGE_BYTES:], zlib.crc32(data[:_EDGE_BYTES]))


def _mapped(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a cache folder, or None when there is none that can be trusted."""
    import torch

    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        with open(folder / "weights.bin", "rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_size != manifest["size"]:
                return None
            mapped = mmap.mmap(file.fileno(), stat.st_size, access=mmap.ACCESS_COPY)
        data = memoryview(mapped)
        if stat.st_mtime_ns != manifest["mtime_ns"]:
            if zlib.crc32(data) != manifest["crc32"]:
                return None
            # Touched, but whole: a restored backup, say. Later starts need not read it all again.
            with contextlib.suppress(OSError):
                os.utime(folder / "weights.bin", ns=(stat.st_atime_ns, manifest["mtime_ns"]))
        tensors: dict[str, torch.Tensor] = {}
        whole = torch.frombuffer(data, dtype=torch.uint8)
        for name, entry in manifest["tensors"].items():
            begin, nbytes = entry["offset"], entry["nbytes"]
            if _edges(data[begin : begin + nbytes]) != entry["edges"]:
                return None
            dtype = getattr(torch, entry["dtype"])
            tensors[name] = whole[begin : begin + nbytes].view(dtype).view(tuple(entry["shape"]))
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ModelError):
        return None
