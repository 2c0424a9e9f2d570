"""The composition root: a model's name and a config become an engine that answers.

Here, and only here, the deciding stack meets the computing one, by name: `millstream.runner.compose` is imported when a
model is loaded, not before.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from millstream.config.load import home
from millstream.config.schema import EngineConfig
from millstream.core import registry
from millstream.core.clock import Clock, WallClock
from millstream.core.events import Event
from millstream.core.request import Limits, Request
from millstream.decode.protocol import Observer
from millstream.engine.check import check
from millstream.engine.engine import Engine
from millstream.engine.resolve import Machine, Resolved, kv_choice, resolve, whole_blocks
from millstream.memory.ledger import Ledger
from millstream.models.spec import ModelSpec
from millstream.sched.scheduler import Scheduler
from millstream.text.tokenizer import Tokenizer

COMPOSE = "millstream.runner.compose"
FILES = "millstream.models.opened"


@dataclass(slots=True)
class Assembled:
    """An engine and what there is to know of it. `phases` are seconds of the start, in order."""

    engine: Engine
    tokenizer: Tokenizer
    spec: ModelSpec
    resolved: Resolved
    built: Any
    source: Any
    phases: dict[str, float] = field(default_factory=dict)


def assemble(
    model: str,
    config: EngineConfig | None = None,
    *,
    clock: Clock | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    progress: Any = None,
    notice: Any = None,
) -> Assembled:
    """Loads `model` (short name, org/name[:file] or path) and builds its engine.

    Raises UnknownModel, ModelError, ConfigError or DownloadError.
    """
    config = config or EngineConfig()
    check(config)
    phases: dict[str, float] = {}
    start = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal start
        now = time.perf_counter()
        phases[phase] = phases.get(phase, 0.0) + now - start
        start = now

    opened = importlib.import_module(FILES).open_model(model, progress, notice)
    lap("open")
    tokenizer: list[Tokenizer | BaseException] = []

    def load_tokenizer() -> None:
        try:
            tokenizer.append(opened.tokenizer())
        except BaseException as error:
            tokenizer.append(error)

    # Tokenizer and torch are both slow to load and mostly native: side by side they cost little more than one.
    aside = threading.Thread(target=load_tokenizer, name="millstream-tokenizer")
    aside.start()
    spec = opened.spec
    compose = importlib.import_module(COMPOSE)
    lap("import torch")
    dtype = config.model.dtype
    kv = registry.make("kv", kv_choice(config)[0])
    machine = Machine(
        "cpu", compose.usable_cores(), compose.free_memory(), *measured_knee(opened.source, config.model.weights)
    )
    resolved = resolve(config, spec, machine, lambda group, size: int(kv.page_bytes(group, size, dtype)))
    config = resolved.config
    built = compose.build_runner(
        opened.source,
        spec,
        config.model.dtype,
        config.model.weights,
        kv_choice(config)[0],
        resolved.block_size,
        resolved.blocks,
        resolved.host_blocks,
        resolved.plans,
        resolved.threads,
        config.runner.attention,
        config.runner.ops,
        resolved.prefix_levels,
        notice,
    )
    phases.update({f"load: {name}": seconds for name, seconds in built.phases.items()})
    start = time.perf_counter()
    aside.join()
    if isinstance(tokenizer[0], BaseException):
        raise tokenizer[0]
    lap("tokenizer")
    engine = build_engine(built.runner, spec, tokenizer[0], config, resolved, clock, listeners, spec.name)
    lap("engine")
    return Assembled(engine, tokenizer[0], spec, resolved, built, opened.source, phases)


def build_engine(
    runner: Any,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    config: EngineConfig,
    resolved: Resolved,
    clock: Clock | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    key: str = "",
) -> Engine:
    """An engine over a runner that exists: experiments build several over one."""
    capacity = runner.capacity()
    ledger = Ledger(
        spec.groups,
        capacity.block_size,
        resolved.blocks,
        registry.make("prefix", config.cache.prefix),
        resolved.host_blocks,
        (key, config.model.weights, str(config.cache.kv)),
    )
    scheduler = Scheduler(
        ledger,
        [registry.make("policy", choice) for choice in config.sched.policies],
        [registry.make("meter", choice, ledger=ledger) for choice in resolved.meters],
        config.sched.preemption,
    )
    limits = Limits(spec.vocab_size, resolved.max_context, whole_blocks(spec, resolved.blocks) * capacity.block_size)
    watchers = [registry.get("observer", name) for name in registry.names("observer")]

    def observers(request: Request) -> list[Observer]:
        return [cast(Observer, kind(request, tokenizer.vocabulary)) for kind in watchers if kind.wanted(request)]

    return Engine(
        scheduler,
        runner,
        clock or WallClock(),
        limits,
        stop_ids=frozenset(tokenizer.stop_ids),
        decode=config.decode,
        observers=observers,
        listeners=listeners,
        seed=config.seed,
    )


def measured_knee(source: Any, weights: str) -> tuple[int | None, str]:
    """The step size that `millstream bench knee` measured for these weights, kept so, on this machine, and when."""
    path = knee_file(source, weights)
    try:
        found = json.loads(path.read_text())
        return int(found["step_tokens"]), f"measured on {found['date']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def knee_file(source: Any, weights: str) -> Any:
    return home() / "profiles" / f"knee-{source.checksum()[:16]}-{weights}.json"
