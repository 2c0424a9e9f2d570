"""`millstream collect-env`: versions, hardware and folders for a bug report. Names no person and no host."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from millstream.cli.output import emit, json_only, memory_in_words, print_table

PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "jinja2",
    "rich",
    "msgspec",
    "PyYAML",
    "transformers",
    "triton",
    "ray",
    "matplotlib",
)
VARIABLES = ("MILLSTREAM_HOME", "MILLSTREAM_DATA", "OMP_NUM_THREADS", "HF_ENDPOINT", "HF_HUB_OFFLINE")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    with json_only(args.json):
        found = collect()
        if args.json:
            emit(found)
            return 0
        rows: list[tuple[str, str]] = []
        for key, value in found.items():
            rows += _rows(key, value)
        print_table(("what", "found"), rows)
    return 0


def collect() -> dict[str, Any]:
    """Everything, as JSON values, with private folders and names replaced."""
    from millstream import __version__
    from millstream.config.load import data_dir, home
    from millstream.models import store
    from millstream.reproduce import machine
    from millstream.reproduce.ledger import SOURCE_ROOT

    torch_error = None
    try:
        import torch  # noqa: F401  (the machine's description reads its threads and its GPU)
    except Exception as error:
        torch_error = f"{type(error).__name__}: {error}"
    here = machine.describe(machine.load())
    head, dirty = machine.commit(SOURCE_ROOT)
    data = data_dir()
    found = {
        "millstream": __version__,
        "commit": head + ("-dirty" if dirty else "") if head else None,
        "python": f"{platform.python_implementation()} {here.python}",
        "os": here.os,
        "arch": here.arch,
        "cpu": here.cpu,
        "cores": here.cores,
        "cpu_flags": list(here.flags),
        "memory_bytes": here.memory_bytes,
        "gpu": here.gpu or None,
        "torch_threads": here.torch_threads,
        "torch_error": torch_error,
        "load_average": here.load_before,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "compiler": _compiler(),
        "kernels_built": sorted(path.name for path in _children(home() / "kernels") if path.suffix == ".so"),
        "home": {
            "path": str(home()),
            "writable": os.access(home() if home().is_dir() else home().parent, os.W_OK),
            "free_bytes": _free(home()),
        },
        "models": {model.name: model.origin for model in store.list_models() if model.here},
        "data": None if data is None else {"path": str(data), "found": sorted(path.name for path in _children(data))},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    cleaned: dict[str, Any] = machine.without_private(found)
    return cleaned


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    try:
        from millstream.ops.cpu.build import find_compiler

        program = find_compiler()
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except Exception:
        # Without torch the kernels' module cannot be imported either; its answer would be the same.
        return None
    return said.splitlines()[0] if said else Path(program).name


def _children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _free(folder: Path) -> int | None:
    for place in (folder, *folder.parents):
        if place.is_dir():
            return shutil.disk_usage(place).free
    return None


def _rows(key: str, value: Any) -> list[tuple[str, str]]:
    name = key.removesuffix("_bytes").replace("_", " ")
    if isinstance(value, dict):
        return [row for part, item in value.items() for row in _rows(f"{key}: {part}", item)] or [(name, "-")]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)) or "-")]
    if key.endswith("_bytes") and value is not None:
        return [(name, memory_in_words(value))]
    return [(name, "-" if value is None else str(value))]
