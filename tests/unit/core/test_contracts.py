"""The house keeps its layers: import contracts hold, and the deciding stack runs where there is no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_import_contracts_hold():
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


NO_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is asked for, and there is none here")

sys.meta_path.insert(0, Refuse())
sys.path[:0] = [FOLDERS]
"""

ENGINE = """
from harness import Bench
from millstream.core.registry import Choice
from millstream.core.request import Kind

for plans in (1, 2):
    for preemption in ("recompute", "swap"):
        bench = Bench(num_blocks=9, host_blocks=6, plans=plans, preemption=preemption)
        asked = [bench.add([n, *range(n)], 6, params={"n": 2, "temperature": 1.0, "seed": n}) for n in range(6)]
        beams = bench.add([3, 1], 4, decode=Choice("beam", {"width": 3}))
        score = bench.add([3, 1, 4], 1, kind=Kind.SCORE, params={"prompt_logprobs": 0})
        bench.run()
        assert all(bench.output(r, i) == bench.truth(r, i) for r in asked for i in range(2))
        bench.clean()
assert not {"torch", "triton"} & {name.partition(".")[0] for name in sys.modules}
print("decided")
"""

IMPORTS = """
import importlib
import pkgutil

for root in ROOTS:
    package = importlib.import_module("millstream." + root)
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
        importlib.import_module(info.name)
import millstream
for info in pkgutil.walk_packages(millstream.__path__, "millstream."):
    if info.name.rpartition(".")[2] in ("host", "protocol"):
        importlib.import_module(info.name)
from millstream.core import registry
for point in registry.points():
    for name in registry.names(point):
        if point in ("policy", "meter", "length", "prefix", "evict", "tier", "decode", "observer", "family", "kv"):
            registry.get(point, name)
assert not {"torch", "triton"} & {name.partition(".")[0] for name in sys.modules}
print("imported")
"""

ROOTS = ["config", "core", "memory", "sched", "engine", "text", "models.spec", "models.families", "runner.null_runner"]


def run_without_torch(code: str) -> str:
    folders = repr(str(ROOT / "tests" / "unit" / "engine"))
    whole = NO_TORCH.replace("FOLDERS", folders) + code
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_engine_runs_where_torch_cannot_be_imported():
    assert run_without_torch(ENGINE) == "decided"


def test_the_whole_deciding_stack_is_imported_where_torch_cannot_be():
    assert run_without_torch(IMPORTS.replace("ROOTS", repr(ROOTS))) == "imported"
