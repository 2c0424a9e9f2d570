"""The GGUF header reader against the reference reader, and against files that lie."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millstream.core.errors import BadFile, ModelError
from millstream.models.gguf import BLOCKS, TENSOR_TYPES, Strings, is_gguf, read_gguf
from millstream.models.gguf_names import GgufModel

from .conftest import tiny_llama, write_gguf


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    content = head + b"".join(keys) + b"".join(tensors)
    return content + bytes(-len(content) % alignment) + data


def plain(value: Any) -> Any:
    """Strings and arrays as lists, to be compared with what the reference reader gives."""
    if isinstance(value, Strings | array):
        return list(value)
    return value


def same_as_reference(path: Path) -> None:
    ours, reference = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert {k: plain(v) for k, v in ours.metadata.items()} == fields
    assert [t.name for t in reference.tensors] == list(ours.tensors)
    for t in reference.tensors:
        found = ours.tensors[t.name]
        assert found.shape == tuple(reversed(t.shape.tolist()))
        assert (found.type, found.offset, found.nbytes) == (t.tensor_type.name, t.data_offset, t.n_bytes)
        assert bytes(ours.raw(t.name)[:4096]) == t.data.tobytes()[:4096]


def test_block_geometry_is_that_of_the_reference() -> None:
    for kind, (block, size) in gguf.constants.GGML_QUANT_SIZES.items():
        if kind.value in TENSOR_TYPES:
            assert TENSOR_TYPES[kind.value] == (kind.name, block, size)
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"} <= set(BLOCKS)


def test_header_equals_the_reference_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = {
        "a.bool": True,
        "a.count": 7,
        "a.real": 0.25,
        "a.text": "zwei Ströme, 水, 🙂",
        "a.numbers": [1, 2, 3],
        "a.reals": [0.5, -2.0],
        "a.bools": [True, False, True],
        "a.words": ["", "x", "naïve"],
    }
    tensors = {
        "plain": rng.standard_normal((3, 5), dtype=np.float32),
        "half": rng.standard_normal((2, 4, 8)).astype(np.float16),
        "packed": (rng.standard_normal((4, 64), dtype=np.float32), "Q8_0"),
        "five": (rng.standard_normal((2, 32), dtype=np.float32), "Q5_1"),
    }
    same_as_reference(write_gguf(tmp_path / "a.gguf", "llama", keys, tensors, ["a", "b"]))


def test_every_scalar_type_is_read(tmp_path: Path) -> None:
    values = {0: ("B", 250), 1: ("b", -3), 2: ("H", 65000), 3: ("h", -300), 4: ("I", 1 << 31), 5: ("i", -5)}
    values |= {6: ("f", 0.5), 7: ("B", 1), 10: ("Q", 1 << 63), 11: ("q", -(1 << 62)), 12: ("d", 0.1)}
    path = tmp_path / "a.gguf"
    scalars = [key(f"s{k}", k, struct.pack("<" + code, v)) for k, (code, v) in values.items()]
    arrays = [key(f"a{k}", 9, struct.pack(f"<IQ2{code}", k, 2, v, v)) for k, (code, v) in values.items()]
    path.write_bytes(build(scalars + arrays))
    for version in (2, 3):
        path.write_bytes(build(scalars + arrays, version=version))
        metadata = read_gguf(path).metadata
        for kind, (_, value) in values.items():
            assert metadata[f"s{kind}"] == (bool(value) if kind == 7 else value)
            assert list(metadata[f"a{kind}"]) == [value, value]


def test_nested_arrays_keep_their_shape(tmp_path: Path) -> None:
    keys = {"nested": [[1, 2], [3, 4], [5]], "words": [["a", "b"], ["c"]]}
    metadata = read_gguf(write_gguf(tmp_path / "a.gguf", keys=keys)).metadata
    assert [list(inner) for inner in metadata["nested"]] == keys["nested"]
    assert [list(inner) for inner in metadata["words"]] == keys["words"]


def test_bytes_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    words = text(b"ok") + text(b"\xff\xfe") + text("é")
    path.write_bytes(build([key("one", 8, text(b"\x80abc")), key("many", 9, struct.pack("<IQ", 8, 3) + words)]))
    metadata = read_gguf(path).metadata
    assert metadata["one"].encode("utf-8", "surrogateescape") == b"\x80abc"
    assert metadata["many"].raw(1) == b"\xff\xfe"
    assert metadata["many"][1].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert (metadata["many"][0], metadata["many"][-1], len(metadata["many"])) == ("ok", "é", 3)
    assert metadata["many"][::2] == ["ok", "é"]
    with pytest.raises(IndexError):
        metadata["many"][3]


def test_writing_to_a_tensors_bytes_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build([], [tensor("t", [8], 0, 0)], bytes(32)))
    before = path.read_bytes()
    read_gguf(path).raw("t")[0] = 255
    assert path.read_bytes() == before


BIG = 1 << 62
WORDS = struct.pack("<IQ", 8, 3)
LIES = {
    "empty": (b"", "too few"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "not a GGUF"),
    "version 1": (build(version=1), "version 1"),
    "version 99": (build(version=99), "version 99"),
    "big endian": (build(version=3 << 24), "big-endian"),
    "lying key count": (build(num_keys=BIG), "keys"),
    "lying tensor count": (build(num_tensors=BIG), "tensors"),
    "key without end": (build([struct.pack("<Q", BIG) + b"abc"]), "name"),
    "key without name": (build([key("", 4, bytes(4))]), "name"),
    "key not utf8": (build([text(b"\xff") + struct.pack("<II", 4, 1)]), "UTF-8"),
    "key twice": (build([key("k", 4, bytes(4))] * 2), "'k' appears twice"),
    "unknown value type": (build([key("k", 13, bytes(8))]), "value type 13"),
    "string without end": (build([key("k", 8, struct.pack("<Q", BIG))]), "'k'"),
    "array without end": (build([key("k", 9, struct.pack("<IQ", 6, BIG))]), "'k'"),
    "bools without end": (build([key("k", 9, struct.pack("<IQ", 7, BIG))]), "'k'"),
    "strings without end": (build([key("k", 9, struct.pack("<IQ", 8, BIG))]), "'k'"),
    "a long string in an array": (build([key("k", 9, WORDS + text("a") + struct.pack("<Q", BIG))]), "string 1 of 3"),
    "array of an unknown type": (build([key("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))]), "value type 77"),
    "arrays without end": (build([key("k", 9, struct.pack("<IQ", 9, BIG))]), "'k'"),
    "deep arrays": (build([key("k", 9, struct.pack("<IQ", 9, 1) * 500 + bytes(64))]), "nested"),
    "alignment not a power": (build([key("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment zero": (build([key("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment huge": (build([key("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of two"),
    "alignment a word": (build([key("general.alignment", 8, text("32"))]), "power of two"),
    "five dimensions": (build([], [tensor("t", [1] * 5, 0, 0)], bytes(32)), "'t' has 5 dimensions"),
    "no dimensions": (build([], [tensor("t", [], 0, 0)], bytes(32)), "'t' has 0 dimensions"),
    "a dimension of 0": (build([], [tensor("t", [4, 0], 0, 0)], bytes(32)), "'t'"),
    "overflowing product": (build([], [tensor("t", [1 << 32, 1 << 32], 0, 0)], bytes(32)), "'t'"),
    "product that wraps to 4": (build([], [tensor("t", [(1 << 62) + 1, 4], 0, 0)], bytes(32)), "'t'"),
    "unknown tensor type": (build([], [tensor("t", [8], 4, 0)], bytes(32)), "'t' has the unknown type 4"),
    "row not whole blocks": (build([], [tensor("t", [33], 8, 0)], bytes(64)), "'t': rows of 33"),
    "offset past the end": (build([], [tensor("t", [8], 0, 64)], bytes(32)), "'t' needs bytes"),
    "offset that overflows": (build([], [tensor("t", [8], 0, (1 << 64) - 32)], bytes(32)), "'t' needs bytes"),
    "offset not aligned": (build([], [tensor("t", [8], 0, 4)], bytes(64)), "not a multiple"),
    "truncated data": (build([], [tensor("t", [8], 0, 0)], bytes(31)), "truncated"),
    "overlap": (build([], [tensor("a", [16], 0, 0), tensor("b", [8], 0, 32)], bytes(64)), "'a' and 'b' overlap"),
    "tensor twice": (build([], [tensor("t", [8], 0, 0), tensor("t", [8], 0, 32)], bytes(64)), "'t' appears twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    content, said = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_gguf(path)
    assert said in caught.value.what
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_a_bad_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BadFile, match="cannot be read"):
            read_gguf(path)
        assert not is_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "a.gguf", np.random.default_rng(0))[0].read_bytes()
    read_gguf(tmp_path / "a.gguf")
    cut = tmp_path / "cut.gguf"
    # Every place in the header, then some in the data; the padding after the last tensor is nobody's.
    for length in [*range(0, 2600, 7), *range(2600, len(whole) - 64, 4001)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            read_gguf(cut)


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_llama(tmp_path_factory.mktemp("seed") / "a.gguf", np.random.default_rng(1))[0].read_bytes()


LIAR = st.sampled_from(
    [0, 1, 3, 4, 5, 7, 8, 9, 12, 255, 256, 65536, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]
)


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_in_bounded_time_and_memory(
    data: st.DataObject, seed_file: bytes, tmp_path: Path
) -> None:
    content = bytearray(seed_file)
    header = 2600
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        match data.draw(st.sampled_from(["byte", "u32", "u64", "cut", "insert", "delete"])):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "u32":
                content[at : at + 4] = struct.pack("<I", data.draw(LIAR) & 0xFFFFFFFF)
            case "u64":
                content[at : at + 8] = struct.pack("<Q", data.draw(LIAR))
            case "cut":
                del content[data.draw(st.integers(0, len(content))) :]
                content.extend(bytes(max(0, header + 8 - len(content))) if data.draw(st.booleans()) else b"")
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=16))
            case "delete":
                del content[at : at + data.draw(st.integers(0, 16))]
        if len(content) <= header:
            break
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = read_gguf(path)
        for name, t in file.tensors.items():
            assert len(file.raw(name)) == t.nbytes
    except BadFile:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(seed_file) + 1_000_000
    # What the header is taken to mean must not fall over either.
    try:
        GgufModel(file)
    except ModelError:
        return


def test_a_header_is_read_without_torch_or_numpy(tmp_path: Path) -> None:
    path, _ = tiny_llama(tmp_path / "a.gguf", np.random.default_rng(0))
    code = (
        "import sys\n"
        "from millstream.models import cache, gguf, home, hub, safetensors_file, source, store\n"
        "source.open_source(sys.argv[1])\n"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "limit_s"), [("smollm2-135m", 0.15), ("gemma3-270m", 0.3)])
def test_a_real_header_is_read_fast(name: str, limit_s: float, real_model: Any) -> None:
    path = real_model(name)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        read_gguf(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit_s


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_real_header_equals_the_reference_reader(name: str, real_model: Any) -> None:
    same_as_reference(real_model(name))


@pytest.mark.large
def test_the_large_models_header_equals_the_reference_reader(real_model: Any) -> None:
    same_as_reference(real_model("qwen2.5-coder-1.5b"))
