"""safetensors headers and folders: sound ones give the library's tensors, lying ones are refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from millstream.core.errors import BadFile, Unsupported
from millstream.models.safetensors_file import INDEX, read_folder, read_safetensors
from millstream.models.source import FolderSource, open_source


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def folder_of(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def sharded(path: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    for shard, tensors in shards.items():
        save_file(tensors, path / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_tensors_equal_the_librarys_in_every_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "c": torch.randn(2, 2, 3).bfloat16(),
        "empty": torch.empty(0, 4),
    }
    source = open_source(folder_of(tmp_path / "m", tensors))
    assert set(source.tensor_names()) == set(tensors)
    for name, expected in tensors.items():
        assert source.shape(name) == tuple(expected.shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(source.tensor(name, dtype), expected.to(dtype))
    assert source.raw_tensor("c").type == "BF16" and source.raw_tensor("c").data.numel() == 24
    assert source.stored_bytes() == 60 + 14 + 24


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    a, b = torch.randn(4), torch.randn(2, 3)
    source = open_source(sharded(tmp_path / "m", {ONE: {"a": a}, TWO: {"b": b}}))
    assert torch.equal(source.tensor("a"), a) and torch.equal(source.tensor("b"), b)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"a": torch.zeros(4)})
    open_source(folder).tensor("a").fill_(7)
    assert torch.equal(open_source(folder).tensor("a"), torch.zeros(4))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": torch.zeros(1)}, TWO: {"b": torch.zeros(1)}})
    (folder / TWO).unlink()
    with pytest.raises(BadFile, match=rf"{TWO}: is missing"):
        open_source(folder)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": torch.zeros(1)}, TWO: {"b": torch.zeros(1)}})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": TWO, "b": TWO}}))
    with pytest.raises(BadFile, match=rf"{TWO}: tensor 'a' is missing"):
        open_source(folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, None])
def test_an_index_cannot_point_outside_of_its_folder(shard: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": torch.zeros(1)}})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BadFile, match="tensor 'a'"):
        read_folder(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', "[" * 100000])
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": torch.zeros(1)}})
    (folder / INDEX).write_text(index)
    with pytest.raises(BadFile, match=INDEX):
        read_folder(folder)


LIES = {
    "empty": (b"", "too few"),
    "header longer than allowed": (build({}, length=1 << 40), "allowed are"),
    "header longer than the file": (build({}, length=50_000_000), "truncated or lies"),
    "not json": (build(b"{nonsense"), "not JSON"),
    "not an object": (build([1, 2]), "not a JSON object"),
    "deep json": (build(b"[" * 200_000), "not JSON"),
    "not utf8": (build(b'{"\xff": 1}  '), "not JSON"),
    "twice": (build(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"x"), "'a' appears twice"),
    "unknown dtype": (build({"t": entry(dtype="F4_STRANGE")}, bytes(8)), "'t': unknown dtype"),
    "dtype not text": (build({"t": entry(dtype=[])}, bytes(8)), "'t': unknown dtype"),
    "no shape": (build({"t": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "'t': its entry"),
    "one field more": (build({"t": entry(more=1)}, bytes(8)), "'t': its entry"),
    "negative size": (build({"t": entry([-2])}, bytes(8)), "'t': shape"),
    "size a bool": (build({"t": entry([True, 2])}, bytes(8)), "'t': shape"),
    "huge shape": (build({"t": entry([1 << 62, 1 << 62])}, bytes(8)), "'t': 8 bytes do not hold"),
    "too many dimensions": (build({"t": entry([1] * 17)}, bytes(8)), "'t': shape"),
    "bytes and shape differ": (build({"t": entry([3])}, bytes(8)), "'t': 8 bytes do not hold"),
    "offsets backwards": (build({"t": entry(begin=8, end=0)}, bytes(8)), "'t': data_offsets"),
    "offsets not numbers": (build({"t": entry(begin="0")}, bytes(8)), "'t': data_offsets"),
    "truncated": (build({"t": entry()}, bytes(7)), "'t': data_offsets"),
    "trailing bytes": (build({"t": entry()}, bytes(9)), "1 bytes follow"),
    "gap": (build({"a": entry(), "t": entry(begin=12, end=20)}, bytes(20)), "'t' at byte"),
    "overlap": (build({"a": entry(), "t": entry(begin=4, end=12)}, bytes(12)), "'t' at byte"),
    "metadata not text": (build({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    content, said = LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_safetensors(path)
    assert said in caught.value.what and str(path) in str(caught.value)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry([2, 3], 8, 20, "BF16"),
        "c": entry([1], 20, 24),
    }
    content = bytearray(build(header, bytes(24)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "digit", "cut", "insert"])):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "digit":
                digits = [i for i, c in enumerate(content) if 48 <= c <= 57]
                if digits:
                    content[digits[at % len(digits)]] = data.draw(st.integers(48, 57))
            case "cut":
                del content[max(at, 12) :]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        file = read_safetensors(path)
    except BadFile:
        return
    for name, tensor in file.tensors.items():
        assert len(file.raw(name)) == tensor.nbytes


def test_integer_weights_are_refused_by_name(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "m", {"w": torch.zeros(3, dtype=torch.int8)}))
    with pytest.raises(Unsupported, match="tensor 'w' is stored as I8, weights are read from F32, F16, BF16"):
        source.tensor("w")


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not read")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        open_source(tmp_path)
    with pytest.raises(Unsupported, match="is a pickle"):
        open_source(tmp_path / "pytorch_model.bin")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Unsupported, match="adapter"):
        open_source(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": torch.zeros(1)}, TWO: {"b": torch.zeros(1)}})
    (folder / INDEX).unlink()
    with pytest.raises(BadFile, match=INDEX):
        open_source(folder)


def test_code_beside_a_model_is_ignored_with_a_warning(tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    folder = folder_of(tmp_path / "m", {"a": torch.zeros(1)}, config)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.warns(UserWarning, match="auto_map.*never run"):
        source = open_source(folder)
    assert source.config == {"model_type": "llama"}


def test_a_folder_quantized_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"a": torch.zeros(1)}, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(Unsupported, match="gptq"):
        open_source(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "m", {"a": torch.zeros(1)}))
    with pytest.raises(BadFile, match=r"tensor 'lm_head\.weight' is missing"):
        source.tensor("lm_head.weight")


def test_generation_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"a": torch.zeros(1)})
    assert open_source(folder).generation_config == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    assert open_source(folder).generation_config == {"temperature": 0.6}


def test_the_checksum_follows_weights_and_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"a": torch.zeros(1)})
    first = open_source(folder).checksum()
    assert open_source(folder).checksum() == first
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 5}')
    second = open_source(folder).checksum()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert len({first, second, open_source(folder).checksum()}) == 3


def test_the_summary_says_what_most_weights_are(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(64).bfloat16(), "b": torch.zeros(2)}
    source = open_source(folder_of(tmp_path / "m", tensors), "mine")
    assert source.quantization == "BF16" and source.id == "mine"
    assert isinstance(source, FolderSource) and "BF16" in repr(source)
