"""An engine process over the null runner: `python null_process.py --socket PATH --config FILE`, ready at once.

The config file holds its options: `step_s` (seconds that a step really takes), `blocks`, `context`, `budget`, `plans`,
`die_at` (exits with code 9 in that step), `break_at` (the runner raises in that step), `hang_at` (it never ends),
`fail_start` ("usage", "model" or "crash": how the start fails), `helper` (starts a process of its own), `seed`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import EOS, VOCAB, Bench

from millstream.config.load import read_file
from millstream.core import registry
from millstream.core.client import ModelFacts
from millstream.core.clock import WallClock
from millstream.core.errors import BadFile, ConfigError
from millstream.core.registry import Choice
from millstream.engine import process
from millstream.engine.engine import Engine
from millstream.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary(VOCAB, lambda token: b"%d " % token)


class Timed:
    """The null runner, taking its time, and ending badly when told to."""

    def __init__(self, runner: Any, options: dict[str, Any]) -> None:
        self._runner, self._options = runner, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def collect(self, ticket: Any) -> Any:
        step = self._runner.steps
        if step == self._options.get("die_at"):
            os._exit(9)
        if step == self._options.get("break_at"):
            raise RuntimeError("the device is gone")
        if step == self._options.get("hang_at"):
            time.sleep(1000)
        time.sleep(self._options.get("step_s", 0.002))
        return self._runner.collect(ticket)


def observers(request: Any) -> list[Any]:
    kinds = [registry.get("observer", name) for name in registry.names("observer")]
    return [kind(request, VOCABULARY) for kind in kinds if kind.wanted(request)]


def make_null(options: dict[str, Any]) -> tuple[Engine, ModelFacts]:
    failure = options.get("fail_start")
    if failure == "usage":
        raise ConfigError("there is no such setting")
    if failure == "model":
        raise BadFile("model.gguf", "is damaged")
    if failure == "crash":
        raise ZeroDivisionError("a bug")
    time.sleep(options.get("load_s", 0.0))
    if options.get("helper"):
        subprocess.Popen(["sleep", "1000"])
    bench = Bench(
        num_blocks=options.get("blocks", 256),
        context=options.get("context", 512),
        plans=options.get("plans", 1),
        meters=(Choice("splitfuse", {"budget": options.get("budget", 32)}), "seats", "kv-blocks"),
        stop_ids=frozenset({EOS}) if options.get("eos") else frozenset(),
        observers=observers,
    )
    engine = bench.engine
    engine.clock = WallClock()
    engine.runner = Timed(engine.runner, options)
    facts = ModelFacts(
        model="null",
        path="",
        family="null",
        num_parameters=0,
        quantization="none",
        weights="none",
        dtype="none",
        limits=engine.limits,
        block_size=4,
        total_blocks=bench.ledger.total(),
        seed=options.get("seed"),
    )
    return engine, facts


if __name__ == "__main__":
    process.leave(process.main(make=lambda file: make_null(read_file(file))))
