"""What a run record says of its machine: hardware and versions, nothing that names a person or a host."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Instruction sets that decide which kernel runs; the rest of the flags say nothing here.
TELLING_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and software of a run. `cores` are those this process may use; memory is in bytes (None: unknown)."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int | None
    gpu: str
    os: str
    arch: str
    python: str
    torch: str
    torch_threads: int | None
    load_before: float | None


def describe(load_before: float | None = None) -> Machine:
    """The machine as it is now. torch's threads and the GPU are told only when torch is loaded already."""
    torch: Any = sys.modules.get("torch")
    return Machine(
        cpu=_cpu(),
        cores=usable_cores(),
        flags=_flags(),
        memory_bytes=_memory_bytes(),
        gpu=_gpu(torch),
        os=_os(),
        arch=platform.machine(),
        python=platform.python_version(),
        torch=str(torch.__version__) if torch is not None else _version("torch"),
        torch_threads=int(torch.get_num_threads()) if torch is not None else None,
        load_before=load_before,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """Runnable processes over the last minute, None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def commit(root: Path) -> tuple[str, bool]:
    """(commit of the source tree at `root`, whether tracked files differ from it); ("", False) outside of git."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False
    return head, dirty


def without_private(value: Any) -> Any:
    """`value` (JSON-like) with this machine's folders, user and host name replaced in every string."""
    swaps = _private_names()
    return _replace(value, swaps)


def _replace(value: Any, swaps: Mapping[re.Pattern[str], str]) -> Any:
    if isinstance(value, str):
        for pattern, public in swaps.items():
            value = pattern.sub(public, value)
        return value
    if isinstance(value, Mapping):
        return {_replace(key, swaps): _replace(item, swaps) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, swaps) for item in value]
    return value


def _private_names() -> dict[re.Pattern[str], str]:
    folders = {
        str(Path.cwd()): "<here>",
        str(Path(__file__).resolve().parents[3]): "<source>",
        tempfile.gettempdir(): "<temp>",
        sys.prefix: "<python>",
        str(Path.home()): "<home>",
    }
    swaps = {
        re.compile(re.escape(folder) + r"(?![\w-])"): public
        for folder, public in sorted(folders.items(), key=lambda pair: -len(pair[0]))
        if len(folder) > 1
    }
    swaps[re.compile(r"(?<![\w.>])/(?:home|Users)/[^/\s]+")] = "<home>"
    for word, public in ((socket.gethostname(), "<host>"), (_user(), "<user>")):
        # Short or everyday words (root, runner, main) would also hit sentences that name nobody.
        if len(word) >= 6 and word not in ("runner", "ubuntu", "docker", "localhost", "debian", "builder"):
            swaps[re.compile(rf"\b{re.escape(word)}\b")] = public
    return swaps


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _cpuinfo(*keys: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for key in keys:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def _cpu() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    return _cpuinfo("model name", "Hardware", "cpu model") or platform.processor() or platform.machine()


def _flags() -> tuple[str, ...]:
    if sys.platform == "darwin":
        return ()
    have = set(_cpuinfo("flags", "Features").split())
    return tuple(flag for flag in TELLING_FLAGS if flag in have)


def _memory_bytes() -> int | None:
    if sys.platform == "darwin":
        size = _sysctl("hw.memsize")
        return int(size) if size.isdigit() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _os() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {release}"
    except (OSError, KeyError):
        return f"{platform.system()} {release}"


def _gpu(torch: Any) -> str:
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name(0))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sysctl(key: str) -> str:
    try:
        return subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
