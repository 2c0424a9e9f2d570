"""Converted weights on disk: the same numbers, whole or not at all, and never trusted when damaged."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from millstream.models import cache, store
from millstream.models.cache import converted_folder, forget_converted, load_tensors
from millstream.models.source import GgufSource, ModelSource, open_source

from .conftest import tiny_llama
from .test_safetensors_file import folder_of


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_source(tiny_llama(tmp_path / "m.gguf", np.random.default_rng(0))[0])


def assert_equal(found: Mapping[str, torch.Tensor], source: ModelSource, dtype: torch.dtype = torch.float32) -> None:
    assert set(found) == set(source.tensor_names())
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, source.tensor(name, dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cold_and_warm_give_the_sources_tensors(source: ModelSource, dtype: torch.dtype) -> None:
    assert_equal(load_tensors(source, dtype), source, dtype)
    assert_equal(load_tensors(source, dtype), source, dtype)
    folder = converted_folder(source.checksum(), str(dtype).removeprefix("torch."))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "weights.bin"]


def test_a_warm_start_converts_nothing(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tensors(source)

    def fail(*args: object) -> None:
        raise AssertionError("a tensor was converted")

    monkeypatch.setattr(GgufSource, "tensor", fail)
    assert len(load_tensors(source)) == len(source.tensor_names())


def test_tensors_are_aligned_and_projections_lie_side_by_side(source: ModelSource) -> None:
    load_tensors(source)
    tensors = load_tensors(source)
    assert all(t.data_ptr() % cache.ALIGNMENT == 0 for t in tensors.values())
    for block, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        row = [tensors[f"model.layers.0.{block}.{p}_proj.weight"] for p in parts]
        for first, second in itertools.pairwise(row):
            assert first.data_ptr() + first.nbytes == second.data_ptr()


def test_writing_to_a_tensor_never_reaches_the_cache(source: ModelSource) -> None:
    load_tensors(source)["model.norm.weight"].fill_(3)
    assert_equal(load_tensors(source), source)


def damaged(source: ModelSource, damage: Callable[[Path], None], keep_time: bool = True) -> None:
    load_tensors(source)
    weights = converted_folder(source.checksum(), "float32") / "weights.bin"
    stamp = weights.stat()
    damage(weights)
    if keep_time and weights.exists():
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert_equal(load_tensors(source), source)
    assert_equal(load_tensors(source), source)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def test_a_truncated_cache_is_written_anew(source: ModelSource) -> None:
    damaged(source, lambda p: os.truncate(p, p.stat().st_size - 1))


def test_a_cache_with_a_damaged_tensor_is_written_anew(source: ModelSource) -> None:
    damaged(source, lambda p: overwrite(p, 64, b"\xff"))


def test_a_cache_that_was_touched_is_read_whole(source: ModelSource) -> None:
    # In the middle of the largest tensor, where its edges do not reach.
    entry_at = 12 * 1024
    damaged(source, lambda p: overwrite(p, entry_at, b"\xff" * 64), keep_time=False)


def test_a_touched_but_whole_cache_is_kept(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tensors(source)
    os.utime(converted_folder(source.checksum(), "float32") / "weights.bin", ns=(1, 1))
    monkeypatch.setattr(cache, "_write", lambda *args: pytest.fail("written anew"))
    load_tensors(source)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"size": 1', '{"size": 1, "dtype": 2}'])
def test_a_cache_with_a_damaged_manifest_is_written_anew(content: str, source: ModelSource) -> None:
    damaged(source, lambda p: (p.parent / "manifest.json").write_text(content) and None)


def test_a_cache_without_its_weights_is_written_anew(source: ModelSource) -> None:
    damaged(source, Path.unlink)


def test_a_full_disk_means_weights_in_memory_and_a_warning(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.warns(UserWarning, match="are not kept: they need .* GB free"):
        found = load_tensors(source)
    assert_equal(found, source)
    assert not list((store.home() / "converted").iterdir())


def test_a_write_that_fails_half_way_leaves_nothing(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_edges", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert_equal(load_tensors(source), source)
    assert not list((store.home() / "converted").iterdir())


def test_a_home_that_cannot_be_written_is_a_warning(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "file" / "home"))
    with pytest.warns(UserWarning, match="not kept"):
        assert_equal(load_tensors(source), source)


def test_without_the_cache_nothing_is_written(source: ModelSource, home: Path) -> None:
    assert_equal(load_tensors(source, cached=False), source)
    assert not (home / "converted").exists()


def test_what_was_converted_can_be_forgotten(source: ModelSource, home: Path) -> None:
    load_tensors(source)
    load_tensors(source, torch.bfloat16)
    assert forget_converted(source.checksum()) > 0
    assert list((home / "converted").iterdir()) == []


def test_a_folders_tensors_are_mapped_and_not_copied_to_a_cache(tmp_path: Path, home: Path) -> None:
    folder = open_source(folder_of(tmp_path / "m", {"a": torch.randn(3), "b": torch.randn(2).bfloat16()}))
    found = load_tensors(folder, torch.bfloat16)
    assert_equal(found, folder, torch.bfloat16)
    assert len(found) == 2 and "c" not in found
    with pytest.raises(KeyError):
        found["c"]
    assert not (home / "converted").exists()


def test_two_processes_that_convert_at_once_agree(source: ModelSource) -> None:
    code = textwrap.dedent("""
        import sys, torch
        from millstream.models.cache import load_tensors
        from millstream.models.source import open_source
        print(float(sum(t.double().sum() for t in load_tensors(open_source(sys.argv[1])).values())))
    """)
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(source.path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = {run.communicate(timeout=120)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs) and len(said) == 1
    assert_equal(load_tensors(source), source)


@pytest.mark.long
def test_a_real_model_starts_warm_in_no_time(real_model: Callable[[str], Path]) -> None:
    source = open_source(real_model("smollm2-135m"))
    load_tensors(source)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tensors = load_tensors(source)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    for name in source.tensor_names()[::40]:
        assert torch.equal(tensors[name], source.tensor(name))
