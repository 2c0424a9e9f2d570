"""How each engine's worker is started: its interpreter, its form of the model, what it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.models import store
from peers import install
from peers.install import NotInstalled
from peers.protocol import Worker

HERE = Path(__file__).resolve().parents[1]
CONVERT_LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class Bench:
    """What all workers of a run share. `first_prompt` makes the first token of a start."""

    model: str
    threads: int
    max_context: int
    max_batch: int
    first_prompt: tuple[int, ...]
    place: Path = install.PLACE
    say: Callable[[str], None] = print

    @property
    def folder(self) -> Path:
        """Where the peers' forms of the model are kept."""
        return self.place / "models" / self.model.replace("/", "--").replace(":", "--")

    def setup(self, **own: Any) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "first_prompt": list(self.first_prompt),
            **own,
        }

    def gguf(self) -> Path:
        """The model's GGUF file. Raises NotInstalled for one that has none."""
        path = store.resolve(self.model)
        if path.suffix != ".gguf":
            raise NotInstalled(f"{self.model} is not a GGUF file")
        return path

    def exported(self) -> Path:
        """The model as a Hugging Face folder in bfloat16, written when it is not there."""
        from peers.export_hf import export

        self.say(f"exporting {self.model} to bfloat16")
        return export(self.model, self.folder / "hf-bfloat16")


@dataclass(frozen=True, slots=True)
class Launch:
    """A worker that can be started: as often as wanted, `start` waits for nothing."""

    name: str
    module: str
    python: Path
    setup: Mapping[str, Any]
    env: Mapping[str, str]
    log: Path

    def start(self) -> Worker:
        command = [str(self.python), "-u", "-m", f"peers.engines.{self.module}"]
        return Worker(self.name, command, self.setup, self.log, self.env)


def millstream(bench: Bench, weights: str) -> tuple[str, Path, dict[str, Any]]:
    return "millstream", Path(sys.executable), bench.setup(model=bench.model, weights=weights)


def openvino(bench: Bench, precision: str) -> tuple[str, Path, dict[str, Any]]:
    python = _python(bench, "openvino")
    path = bench.gguf() if precision == "gguf" else _converted(bench, python, precision)
    return "openvino", python, bench.setup(path=str(path), precision=precision)


def vllm(bench: Bench) -> tuple[str, Path, dict[str, Any]]:
    python = _python(bench, "vllm")
    return "vllm", python, bench.setup(path=str(bench.exported()))


def llama_cpp(bench: Bench) -> tuple[str, Path, dict[str, Any]]:
    server = install.found_llama_cpp(bench.place)
    if server is None:
        raise NotInstalled("its server is not built: python -m peers.install llama.cpp")
    return "llama_cpp", Path(sys.executable), bench.setup(path=str(bench.gguf()), binary=str(server))


ENGINES: dict[str, Callable[[Bench], tuple[str, Path, dict[str, Any]]]] = {
    "millstream": lambda bench: millstream(bench, "blocks"),
    "millstream-float32": lambda bench: millstream(bench, "dense"),
    "llama.cpp": llama_cpp,
    "openvino": lambda bench: openvino(bench, "int4"),
    "openvino-int8": lambda bench: openvino(bench, "int8"),
    "openvino-gguf": lambda bench: openvino(bench, "gguf"),
    "vllm": vllm,
}


def prepare(name: str, bench: Bench) -> Launch:
    """Everything that a worker needs, made where it is not there yet. Raises NotInstalled."""
    module, python, setup = ENGINES[name](bench)
    env = {**os.environ, "OMP_NUM_THREADS": str(bench.threads), "TOKENIZERS_PARALLELISM": "false"}
    # Ours needs the package's own folder where it is not installed; the others must not see it.
    own = os.environ.get("PYTHONPATH", "") if module == "millstream" else ""
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), own)))
    if module == "vllm":
        # As its documentation asks for on CPUs: its own OpenMP runtime, tcmalloc where the system has it, threads bound
        # by itself.
        del env["OMP_NUM_THREADS"]
        wanted = [python.parents[1] / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        env["LD_PRELOAD"] = ":".join(str(path) for path in wanted if path.is_file())
        env["VLLM_CACHE_ROOT"] = str(bench.place / "vllm-cache")
    return Launch(name, module, python, setup, env, bench.place / "logs" / f"{name}.log")


def _python(bench: Bench, name: str) -> Path:
    python = install.found_python(bench.place, name)
    if python is None:
        raise NotInstalled(f"its environment is not there: python -m peers.install {name}")
    return python


def _converted(bench: Bench, python: Path, precision: str) -> Path:
    folder = bench.folder / f"openvino-{precision}"
    if (folder / "openvino_detokenizer.xml").is_file():
        return folder
    source = bench.exported()
    bench.say(f"converting {bench.model} to OpenVINO, {precision}")
    command = [str(python), "-m", "peers.engines.openvino", "convert", str(source), str(folder), precision]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=CONVERT_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise NotInstalled(f"converting failed: {done.stderr.strip()[-300:]}")
    return folder
