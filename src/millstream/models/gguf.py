"""GGUF containers, version 2 and 3: a small, bounded, memory-mapped reader.

    magic "GGUF", version, number of tensors, number of keys
    keys:    name, type, value                       (little endian, strings with a length in front)
    tensors: name, dimensions (columns first), type, offset into the data part
    padding to the alignment, then the data part

Nothing here trusts the file: each count and each length is held against the bytes that remain before
anything of that size is allocated, so a lying header costs no more than reading the file once. Every
fault is a `BadFile` that names the key or the tensor. Format: the GGUF specification of the ggml project.

The tokens and merges of a vocabulary stay in the file (`Strings`); they are decoded when looked at.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from millstream.core.errors import BadFile

# Type id -> name, values in a block, bytes of a block.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Block geometry by type name: values in a block, bytes of a block.
BLOCKS: Mapping[str, tuple[int, int]] = {name: (values, size) for name, values, size in TENSOR_TYPES.values()}

# `general.file_type` -> what people call the file.
FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}

MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_NAME_BYTES = 65535
MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type id -> struct code. array.array uses the same codes, with the sizes checked below.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_UNPACK = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_HEAD = struct.Struct("<4sIQQ")
_MIN_STRING = 8  # a length
_MIN_ARRAY = 12  # a type and a count
_MIN_KEY = 8 + 1 + 4 + 1  # name length, one letter, type, one byte of value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, one letter, number of dimensions, one dimension, type, offset


class Strings(Sequence[str]):
    """An array of strings that stays in the mapped file and is decoded on access.

    Bytes that are not UTF-8 come out as surrogate escapes, which keep them: `raw(i)` gives the bytes as stored.
    Equal to any sequence of the same strings.
    """

    __slots__ = ("_ends", "_lengths", "_map")

    def __init__(self, mapped: mmap.mmap, ends: array[int], lengths: array[int]) -> None:
        self._map, self._ends, self._lengths = mapped, ends, lengths

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.raw(i).decode("utf-8", "surrogateescape") for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        mapped = self._map
        for end, length in zip(self._ends, self._lengths, strict=True):
            yield mapped[end - length : end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) or not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(s) for s in self[:3])
        return f"Strings({shown}{', ...' if len(self) > 3 else ''}; {len(self)})"

    def raw(self, index: int) -> bytes:
        """The bytes of one string as they are in the file."""
        end = self._ends[index]
        return self._map[end - self._lengths[index] : end]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch order, rows first; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def num_values(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header over a mapped file.

    Values of `metadata` are int, float, bool, str, `Strings`, array.array (numbers), or lists (of bools, of arrays).
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int
    _map: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> memoryview:
        """The stored bytes of a tensor: uint8, `nbytes` long, no copy.

        The mapping is private: writing to it changes this process' view and never the file. KeyError on unknown names.
        """
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.offset : tensor.offset + tensor.nbytes]


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as GGUF files do. False for what cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_gguf(path: str | Path) -> GgufFile:
    """Maps a GGUF file and reads its header. Raises BadFile, naming the key or tensor at fault, and nothing else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEAD.size:
                raise BadFile(path, f"{size} bytes are too few for a GGUF header of {_HEAD.size}")
            # A private mapping costs nothing until written to, and torch takes its memory without a copy.
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror or error}") from error
    return _Reader(path, mapped, size).file()


class _Reader:
    """Walks one header from front to back. `pos` never passes `size`."""

    __slots__ = ("map", "path", "pos", "size", "where")

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.map, self.size = path, mapped, size
        self.pos = 0
        self.where = "the header"

    def file(self) -> GgufFile:
        magic, version, num_tensors, num_keys = _HEAD.unpack_from(self.map, 0)
        if magic != b"GGUF":
            raise self.bad(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise self.bad("a big-endian GGUF file; only little-endian ones are read")
            raise self.bad(f"GGUF version {version}; versions 2 and 3 are read")
        self.pos = _HEAD.size
        self.room(num_keys, _MIN_KEY, "keys")
        metadata = self.keys(num_keys)
        alignment = self.alignment(metadata)
        self.where = "the tensor list"
        self.room(num_tensors, _MIN_TENSOR, "tensors")
        found = [self.tensor() for _ in range(num_tensors)]
        tensors = self.place(found, alignment)
        return GgufFile(self.path, version, metadata, tensors, self.size, self.map)

    # The bounds

    def bad(self, what: str) -> BadFile:
        return BadFile(self.path, what)

    def room(self, count: int, each: int, what: str) -> None:
        """Refuses `count` things of at least `each` bytes that the rest of the file cannot hold."""
        left = self.size - self.pos
        if count > left // each:
            raise self.bad(
                f"{self.where} says {count} {what}, but the {left} bytes that remain hold at most {left // each}"
            )

    def take(self, length: int, what: str) -> int:
        """Steps over `length` bytes and returns where they begin."""
        start = self.pos
        if length > self.size - start:
            raise self.bad(f"{self.where}: {what} needs {length} bytes at byte {start}, the file ends at {self.size}")
        self.pos = start + length
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.map, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.map, self.take(8, what))[0]
        return value

    # The parts

    def name(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.bad(f"{self.where}: {what} has {length} bytes, allowed are 1 to {MAX_NAME_BYTES}")
        start = self.take(length, what)
        try:
            return self.map[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{self.where}: {what} at byte {start} is not UTF-8") from None

    def keys(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            self.where = f"key {i} of {count}"
            key = self.name("the name")
            if key in metadata:
                raise self.bad(f"key {key!r} appears twice")
            self.where = f"key {key!r}"
            metadata[key] = self.value(self.u32("the type"), 0)
        return metadata

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            length = self.u64("the length of a string")
            start = self.take(length, "a string")
            return self.map[start : start + length].decode("utf-8", "surrogateescape")
        if kind == _BOOL:
            return self.map[self.take(1, "a bool")] != 0
        if kind == _ARRAY:
            return self.array(depth)
        unpack = _UNPACK.get(kind)
        if unpack is None:
            raise self.bad(f"{self.where} has the unknown value type {kind}")
        return unpack.unpack_from(self.map, self.take(unpack.size, "a number"))[0]

    def array(self, depth: int) -> Any:
        if depth >= MAX_ARRAY_DEPTH:
            raise self.bad(f"{self.where}: arrays are nested deeper than {MAX_ARRAY_DEPTH}")
        kind, count = self.u32("the type of an array"), self.u64("the length of an array")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            self.room(count, _MIN_ARRAY, "arrays")
            return [self.array(depth + 1) for _ in range(count)]
        if kind == _BOOL:
            self.room(count, 1, "bools")
            start = self.take(count, "an array of bools")
            return [byte != 0 for byte in self.map[start : start + count]]
        code = _SCALARS.get(kind)
        if code is None:
            raise self.bad(f"{self.where} is an array of the unknown value type {kind}")
        each = _UNPACK[kind].size
        self.room(count, each, "numbers")
        start = self.take(count * each, "an array of numbers")
        numbers = array(code)
        if numbers.itemsize != each:
            return [_UNPACK[kind].unpack_from(self.map, start + i * each)[0] for i in range(count)]
        numbers.frombytes(self.map[start : start + count * each])
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def strings(self, count: int) -> Strings:
        self.room(count, _MIN_STRING, "strings")
        # The one hot loop of a header: a quarter of a million lengths, each known only after the one before.
        pos, size, mapped, unpack = self.pos, self.size, self.map, _U64.unpack_from
        ends, lengths = array("Q"), array("Q")
        add_end, add_length = ends.append, lengths.append
        try:
            for _ in range(count):
                (length,) = unpack(mapped, pos)
                pos += 8 + length
                if pos > size:
                    break
                add_end(pos)
                add_length(length)
        except struct.error:
            pos = size + 1
        if pos > size:
            raise self.bad(f"{self.where}: string {len(ends)} of {count} runs past the end of the file at {size}")
        self.pos = pos
        return Strings(mapped, ends, lengths)

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not 0 < value <= MAX_ALIGNMENT
            or value & (value - 1)
        ):
            raise self.bad(f"key 'general.alignment' is {value!r:.80}, allowed is a power of two up to {MAX_ALIGNMENT}")
        return value

    def tensor(self) -> GgufTensor:
        """One entry of the tensor list, its offset still counted from the start of the data part."""
        self.where = "the tensor list"
        name = self.name("the name of a tensor")
        self.where = f"tensor {name!r}"
        num_dims = self.u32("the number of dimensions")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.bad(f"{self.where} has {num_dims} dimensions, allowed are 1 to {MAX_DIMS}")
        dims = [self.u64("a dimension") for _ in range(num_dims)]
        kind = self.u32("the type")
        if kind not in TENSOR_TYPES:
            raise self.bad(f"{self.where} has the unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        offset = self.u64("the offset")
        values = 1
        for dim in dims:
            values *= dim
            # Also keeps the product small: past this it could not fit anyway.
            if dim == 0 or values // block * block_bytes > self.size:
                raise self.bad(
                    f"{self.where} of shape {dims[::-1]} and type {type_name} cannot be in {self.size} bytes"
                )
        if dims[0] % block:
            raise self.bad(
                f"{self.where}: rows of {dims[0]} values do not divide into the blocks of {block} of {type_name}"
            )
        return GgufTensor(name, tuple(dims[::-1]), type_name, offset, values // block * block_bytes)

    def place(self, found: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for t in found:
            if t.name in tensors:
                raise self.bad(f"tensor {t.name!r} appears twice")
            if t.offset % alignment:
                raise self.bad(f"tensor {t.name!r}: offset {t.offset} is not a multiple of the alignment {alignment}")
            if start + t.offset + t.nbytes > self.size:
                raise self.bad(
                    f"tensor {t.name!r} needs bytes {start + t.offset} to {start + t.offset + t.nbytes}, "
                    f"the file ends at {self.size}: it is truncated or lies"
                )
            tensors[t.name] = GgufTensor(t.name, t.shape, t.type, start + t.offset, t.nbytes)
        last: GgufTensor | None = None
        for t in sorted(tensors.values(), key=lambda t: t.offset):
            if last is not None and t.offset < last.offset + last.nbytes:
                raise self.bad(f"tensors {last.name!r} and {t.name!r} overlap at byte {t.offset}")
            last = t
        return tensors
