"""Models from a Hugging Face style hub: `org/name` (a folder of safetensors) and `org/name:file.gguf`.

Only what a model is made of is taken: safetensors, JSON and tokenizer files, or the one GGUF file that was named. Files
land in `$MILLSTREAM_HOME/hub/<org>--<name>/<revision>/`; a file under way ends in `.part` and is continued by the next
attempt. Sizes and hashes are checked against what the hub says of the revision. Nothing is ever executed.

`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. Models that are already in its
own cache are used from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from millstream.core.errors import DownloadError, ModelError, UnknownModel, Unsupported
from millstream.models.home import home, locked, sha256_of, write_atomically
from millstream.models.safetensors_file import INDEX, SINGLE, weight_files

LARGE_BYTES = 1_000_000_000
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(?P<file>[\w][\w./ +-]{0,250}))?")
_COMPLETE = "complete.json"
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|.*\.json|merges\.txt|vocab\.txt|.*\.tiktoken|.*\.jinja|LICENSE.*|NOTICE.*)", re.I
)

# Of sentence-transformers: how rows become one vector, the one small file that lies in a folder of its own.
_POOLING = re.compile(r"\d+_Pooling/config\.json")


class Progress(Protocol):
    """Told how far a step is. `stage` is "waiting", "download", "assemble" or "verify"; `total_bytes` 0 is unknown."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...


Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class HubName:
    """`org/name` or `org/name:file.gguf`."""

    repo: str
    file: str | None

    @property
    def folder(self) -> Path:
        return home() / "hub" / self.repo.replace("/", "--")

    def __str__(self) -> str:
        return f"{self.repo}:{self.file}" if self.file else self.repo


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    name: str
    size: int
    sha256: str | None
    git_sha1: str | None


def parse(name: str) -> HubName | None:
    """A hub name, or None when the text is not one."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or "--" in match["repo"]:
        return None
    return HubName(match["repo"], match["file"])


def find_local(name: HubName) -> Path | None:
    """The model's folder or file if it is already here and whole; asks no network."""
    for folder in _revisions(name):
        files = _complete(folder)
        if name.file is not None and name.file in files:
            return folder / name.file
        if name.file is None and "config.json" in files:
            return folder
        if name.file is None and len(packed := [f for f in files if f.endswith(".gguf")]) == 1:
            return folder / packed[0]
    return _in_library_cache(name)


def pull(name: HubName, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Downloads a model (continuing what an earlier attempt left) and returns its folder or GGUF file.

    Raises UnknownModel when the hub has no such model or file, Unsupported when it has no weights that are read here,
    DownloadError when the hub cannot be reached, refuses, or sends something else than it announced.
    """
    if _offline():
        raise DownloadError(
            f"{name} is not on this machine and HF_HUB_OFFLINE is set; unset it, or name a model by its path"
        )
    with locked(f"hub-{name.repo}", (lambda: progress("waiting", 0, 0)) if progress else None):
        revision, listed = _listing(name)
        wanted = _wanted(name, listed)
        folder = name.folder / revision
        done = _complete(folder)
        missing = [f for f in wanted if f.name not in done]
        total = sum(f.size for f in missing)
        if total > LARGE_BYTES and notice is not None:
            notice(f"{name}: downloading {total / 1e9:.2f} GB into {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise DownloadError(f"{name} needs {total / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free")
            before = 0
            for file in missing:
                _fetch(name, revision, file, folder, before, total, progress)
                before += file.size
            files = {**done, **{f.name: f.size for f in wanted}}
            content = {"repo": name.repo, "revision": revision, "files": files}
            write_atomically(folder / _COMPLETE, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise DownloadError(f"{name}: {folder} cannot be written: {error.strerror or error}") from error
    if name.file is not None:
        return folder / name.file
    return folder / wanted[0].name if wanted[0].name.endswith(".gguf") else folder


def stored() -> list[tuple[HubName, Path, int]]:
    """Every whole hub model kept in home: its name, folder or file, and size in bytes."""
    found: dict[str, tuple[HubName, Path, int]] = {}
    for marker in sorted((home() / "hub").glob(f"*/*/{_COMPLETE}")):
        repo = marker.parent.parent.name.replace("--", "/", 1)
        files = _complete(marker.parent)
        packed = {f: size for f, size in files.items() if f.endswith(".gguf")}
        for f, size in packed.items():
            found[f"{repo}:{f}"] = (HubName(repo, f), marker.parent / f, size)
        if "config.json" in files:
            found[repo] = (HubName(repo, None), marker.parent, sum(files.values()) - sum(packed.values()))
    return list(found.values())


def remove(name: HubName) -> int:
    """Removes a model, or one file of it, in every revision, partial downloads included. Returns the bytes freed."""
    freed = 0
    with locked(f"hub-{name.repo}"):
        if name.file is None:
            freed = sum(p.stat().st_size for p in name.folder.rglob("*") if p.is_file())
            shutil.rmtree(name.folder, ignore_errors=True)
            return freed
        for folder in _revisions(name):
            files = _complete(folder)
            for path in (folder / name.file, folder / f"{name.file}.part"):
                if path.is_file():
                    freed += path.stat().st_size
                    path.unlink()
            if files.pop(name.file, None) is not None:
                content = {"repo": name.repo, "revision": folder.name, "files": files}
                write_atomically(folder / _COMPLETE, json.dumps(content, indent=1).encode())
            if not files:
                shutil.rmtree(folder, ignore_errors=True)
    return freed


def _revisions(name: HubName) -> list[Path]:
    if not name.folder.is_dir():
        return []
    return sorted((p for p in name.folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)


def _complete(folder: Path) -> dict[str, int]:
    """The files of a revision that are here and whole: name -> size."""
    try:
        files = json.loads((folder / _COMPLETE).read_bytes())["files"]
        return {f: size for f, size in files.items() if (folder / f).is_file() and (folder / f).stat().st_size == size}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _in_library_cache(name: HubName) -> Path | None:
    cache = (
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    snapshots = Path(cache).expanduser() / f"models--{name.repo.replace('/', '--')}" / "snapshots"
    if not snapshots.is_dir():
        return None
    for folder in sorted(snapshots.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True):
        if name.file is not None:
            if (folder / name.file).is_file():
                return folder / name.file
            continue
        try:
            if (folder / "config.json").is_file() and all((folder / f).is_file() for f in weight_files(folder)):
                return folder
        except ModelError:
            continue
    return None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _listing(name: HubName) -> tuple[str, dict[str, _RemoteFile]]:
    """The newest revision and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    try:
        info = HfApi(endpoint=_endpoint()).model_info(name.repo, files_metadata=True, timeout=30)
    except hub_errors.GatedRepoError as error:
        raise DownloadError(
            f"{name.repo} asks you to accept its terms at {_endpoint()}/{name.repo}; then set HF_TOKEN to your token"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = f"{_endpoint()} has no such model; if it is private, set HF_TOKEN to a token that may read it"
        raise UnknownModel(name.repo, [], hint) from error
    except hub_errors.HfHubHTTPError as error:
        raise DownloadError(f"{name}: {_endpoint()} answered: {_first_line(error)}") from error
    except Exception as error:  # whatever the HTTP library underneath raises when a host is not there
        raise _unreachable(name, error) from error
    revision = info.sha or ""
    if not re.fullmatch(r"[0-9A-Za-z]{6,64}", revision):
        raise DownloadError(f"{name}: {_endpoint()} gave no revision; is it a Hugging Face style hub?")
    listed: dict[str, _RemoteFile] = {}
    for sibling in info.siblings or []:
        path = PurePosixPath(sibling.rfilename)
        if path.is_absolute() or ".." in path.parts or sibling.rfilename == _COMPLETE:
            continue
        size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else None
        listed[sibling.rfilename] = _RemoteFile(
            sibling.rfilename, size or 0, digest, None if digest else sibling.blob_id
        )
    return revision, listed


def _wanted(name: HubName, listed: dict[str, _RemoteFile]) -> list[_RemoteFile]:
    packed = sorted(f for f in listed if f.endswith(".gguf"))
    if name.file is not None:
        if name.file not in listed:
            raise UnknownModel(str(name), [f"{name.repo}:{f}" for f in packed])
        if not name.file.endswith(".gguf"):
            raise Unsupported(
                f"{name}: one file of a model can be taken when it is a .gguf; name {name.repo} for the whole"
            )
        return [listed[name.file]]
    top = {f: listed[f] for f in listed if "/" not in f}
    if INDEX in top:
        weights = [f for f in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f)]
    elif SINGLE in top:
        weights = [SINGLE]
    else:
        weights = [f for f in top if f.endswith(".safetensors")]
    if not weights or "config.json" not in top:
        if len(packed) == 1:
            return [listed[packed[0]]]
        if packed:
            raise UnknownModel(
                str(name), [f"{name.repo}:{f}" for f in packed], "The model is several GGUF files; name one"
            )
        there = ", ".join(sorted(top)) or "nothing"
        raise Unsupported(f"{name} has no safetensors with a config.json and no GGUF file; it has: {there}")
    others = {f for f in top if _TOKENIZER_FILES.fullmatch(f)} | {f for f in listed if _POOLING.fullmatch(f)}
    # Small files first: a model that is not what was hoped for shows it early.
    return [listed[f] for f in [*sorted(others), *sorted(weights)]]


def _fetch(
    name: HubName, revision: str, file: _RemoteFile, folder: Path, before: int, total: int, progress: Progress | None
) -> None:
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()

    def tell(done: int) -> None:
        if progress is not None:
            progress("download", before + done, total)

    _download(name, revision, file, part, tell)
    size = part.stat().st_size
    if size != file.size:
        if size > file.size:
            part.unlink()
        raise DownloadError(f"{name}: {file.name} came with {size} bytes of {file.size}; try again to continue")
    if progress is not None and size > 10_000_000:
        progress("verify", before + size, total)
    digest, expected = _digest(part, file)
    if digest != expected:
        part.unlink()
        raise DownloadError(
            f"{name}: {file.name} has the hash {digest}, {_endpoint()} announced {expected}; it was discarded"
        )
    os.replace(part, target)


def _download(name: HubName, revision: str, file: _RemoteFile, part: Path, tell: Callable[[int], None]) -> None:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        build_hf_headers,
        disable_progress_bars,
        enable_progress_bars,
    )

    url = hf_hub_url(name.repo, file.name, revision=revision, endpoint=_endpoint())
    # Its own bars would draw over ours.
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        with _Told(part, tell) as out:
            out.seek(0, io.SEEK_END)
            start = out.tell()
            tell(start)
            # The length is of the file, not of what a transfer encoding makes of it.
            headers = {**build_hf_headers(library_name="millstream"), "Accept-Encoding": "identity"}
            http_get(url, out, resume_size=start, headers=headers, expected_size=file.size)
    except hub_errors.EntryNotFoundError as error:
        raise DownloadError(f"{name}: {_endpoint()} lists {file.name} but does not have it") from error
    except hub_errors.HfHubHTTPError as error:
        raise DownloadError(f"{name}: {file.name}: {_endpoint()} answered: {_first_line(error)}") from error
    except OSError as error:
        kept = part.stat().st_size if part.is_file() else 0
        raise DownloadError(
            f"{name}: {file.name} stopped after {kept} of {file.size} bytes ({_first_line(error)}); "
            "try again to continue"
        ) from error
    except Exception as error:
        raise _unreachable(name, error) from error
    finally:
        if shown:
            enable_progress_bars()


class _Told(io.FileIO):
    """A file that says how long it is after each write."""

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        super().__init__(path, "r+b" if path.exists() else "w+b")
        self._told = tell

    def write(self, data: Any) -> int:
        written, view = 0, memoryview(data)
        while written < len(view):
            written += super().write(view[written:]) or 0
        self._told(self.tell())
        return written


def _digest(path: Path, file: _RemoteFile) -> tuple[str, str]:
    """The file's hash of the kind that the hub gave, and what the hub gave."""
    if file.sha256 is not None:
        return sha256_of(path), file.sha256
    if file.git_sha1 is not None and re.fullmatch(r"[0-9a-f]{40}", file.git_sha1):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(), file.git_sha1
    return "", ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _unreachable(name: HubName, error: BaseException) -> DownloadError:
    return DownloadError(
        f"{name}: {_endpoint()} cannot be reached ({_first_line(error)}); check the network, set HF_ENDPOINT to a "
        "mirror, or name a model by its path"
    )
