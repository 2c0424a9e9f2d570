"""C++ kernels compiled for the machine they run on, at first use, by the system compiler.

A library is cached under the hash of its source, flags, compiler and CPU and appears there in one rename, so any number
of processes may build at once. Kernels start no threads of their own: they borrow the OpenMP runtime that torch has
already mapped (`team`), because two runtimes in one process fight over the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from millstream.core.errors import MillstreamError
from millstream.ops.table import ops

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# -fno-math-errno changes no result; everything that would reorder sums stays off.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-pthread")
# The first that the compiler takes: clang on some ARM machines only knows -mcpu.
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
COMPILE_LIMIT_S = 120


class KernelWarning(UserWarning):
    """Native kernels are not in use, and why."""


class KernelError(MillstreamError):
    """A native kernel could not be built or loaded."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where compiled kernels are kept, and which compiler makes them (None: the first of COMPILERS on the path)."""

    directory: Path
    compiler: str | None = None


# Told before a compiler is started; set by `configure`.
_notice: Callable[[str], None] | None = None
_settings = Settings(Path.home() / ".cache" / "millstream" / "kernels")
_libraries: dict[tuple[Settings, str], ctypes.CDLL | KernelError] = {}
_lock = threading.Lock()
_warned = False


def configure(
    directory: str | Path | None = None,
    compiler: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Sets the kernel directory and compiler of this process; libraries already loaded stay loaded.

    Ops choose anew when something changed: what was native may have no kernel under the new settings. `notice` gets a
    sentence before something is compiled.
    """
    global _settings, _notice
    if notice is not None:
        _notice = notice
    settings = Settings(Path(directory) if directory is not None else _settings.directory, compiler)
    if settings != _settings:
        _settings = settings
        for op in ops().values():
            op.forget()


def settings() -> Settings:
    """What `configure` last set."""
    return _settings


def library(name: str) -> ctypes.CDLL:
    """The library of `ops/cpu/<name>.cpp`, built when it is not cached. Raises KernelError, each time alike."""
    key = (_settings, name)
    with _lock:
        found = _libraries.get(key)
        if found is None:
            try:
                found = _load(build(SOURCES / f"{name}.cpp", _settings.directory, _settings.compiler))
            except KernelError as error:
                found = error
            _libraries[key] = found
    if isinstance(found, KernelError):
        _warn_once(found)
        raise found
    return found


def build(source: Path, directory: Path, compiler: str | None = None, extra: tuple[str, ...] = ()) -> Path:
    """Compiles one source into `directory`, or finds it there. Raises KernelError with the compiler's last words."""
    program = find_compiler(compiler)
    text = source.read_bytes() + b"".join(header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    identity = "\n".join([*FLAGS, *extra, _version(program), cpu()])
    digest = hashlib.sha256(text + identity.encode()).hexdigest()[:20]
    target = directory / f"{source.stem}-{digest}.so"
    if target.exists():
        return target
    if _notice is not None:
        _notice(f"compiling {source.name} for this machine; that is done once and takes some seconds")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
            made = Path(scratch) / target.name
            said = ""
            for machine in MACHINE_FLAGS:
                command = [program, *FLAGS, *machine, *extra, str(source), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
                if done.returncode == 0:
                    if said and platform.machine() == "x86_64":
                        _warn_slow(source.name, said)
                    os.replace(made, target)
                    return target
                said = said or done.stderr
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{source.name} could not be built in {directory}: {error}") from error
    raise KernelError(f"{program} could not compile {source.name}: {said.strip()[-600:]}")


def find_compiler(compiler: str | None = None) -> str:
    """Path of the C++ compiler. Raises KernelError when there is none."""
    for name in (compiler,) if compiler else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise KernelError(f"no C++ compiler: looked for {compiler or ', '.join(COMPILERS)}")


@functools.cache
def team() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses, 0 where torch has none: one thread then.

    Looked up through torch's own library, so that it is the runtime torch is bound to even if others are mapped.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                return 0
    return 0


@functools.cache
def cpu() -> str:
    """What -march=native depends on: the CPU's model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        told = [line for line in lines if line.split(":")[0].strip() in wanted]
    except OSError:
        told = []
    return "\n".join([platform.system(), platform.machine(), *(told or [platform.processor()])])


@functools.cache
def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{program} does not run: {error}") from error
    return program + "\n" + done.stdout.partition("\n")[0]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # A damaged file: the next start builds it anew.
        path.unlink(missing_ok=True)
        raise KernelError(f"{path} does not load: {error}") from error


def _warn_slow(name: str, said: str) -> None:
    """A kernel for any CPU of its kind runs at a tenth of the speed: nobody should wonder why."""
    warnings.warn(
        f"{name} is built for any CPU of this kind, which is much slower: for this one the compiler refused with "
        f"{said.strip()[:300]}",
        KernelWarning,
        stacklevel=4,
    )


def _warn_once(error: KernelError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"running without native kernels, on torch: {error}", KernelWarning, stacklevel=3)
