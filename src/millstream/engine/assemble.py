"""The composition root: a model's name and a config become an engine that answers.

Here, and only here, the deciding stack meets the computing one, by name: `millstream.runner.compose` is imported when a
model is loaded, not before.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from millstream import __version__
from millstream.config.load import tree_of
from millstream.config.schema import EngineConfig
from millstream.core import registry
from millstream.core.client import ModelFacts
from millstream.core.clock import Clock, WallClock
from millstream.core.errors import BadRequest, RequestFault
from millstream.core.events import Event
from millstream.core.request import Kind, Limits, Request
from millstream.decode.protocol import GuideMaker, Observer
from millstream.engine.check import check
from millstream.engine.engine import Engine
from millstream.engine.knee import Bench, first_knee, keep_knee, known_knee, measured_on
from millstream.engine.resolve import (
    Machine,
    Resolved,
    kv_choice,
    resolve,
    resolve_encoder,
    whole_blocks,
    with_knee,
)
from millstream.memory.ledger import Ledger
from millstream.models.encoder_spec import AnySpec, EncoderSpec
from millstream.sched import profiles
from millstream.sched.protocol import StepCost
from millstream.sched.scheduler import Scheduler
from millstream.text.tokenizer import Tokenizer

COMPOSE = "millstream.runner.compose"
FILES = "millstream.models.opened"


@dataclass(slots=True)
class Assembled:
    """An engine and what there is to know of it. `phases` are seconds of the start, in order."""

    engine: Engine
    tokenizer: Tokenizer
    spec: AnySpec
    resolved: Resolved
    built: Any
    source: Any
    phases: dict[str, float] = field(default_factory=dict)


def facts_of(made: Assembled, model: str) -> ModelFacts:
    """What there is to tell of an engine's model. `model` is the name that it was asked for by."""
    config = replace(made.resolved.config, sched=replace(made.resolved.config.sched, meters=made.resolved.meters))
    return ModelFacts(
        model=model,
        path=str(made.source.path),
        family=made.spec.family,
        num_parameters=made.spec.num_parameters,
        quantization=made.source.quantization,
        weights=config.model.weights,
        dtype=config.model.dtype,
        limits=made.engine.limits,
        block_size=made.resolved.block_size,
        total_blocks=made.engine.scheduler.ledger.total(),
        decode=made.engine.decode,
        generation_config=made.source.generation_config,
        config=tree_of(config),
        decisions=tuple((one.name, one.value, one.reason) for one in made.resolved.decisions),
        phases=made.phases,
        weight_bytes=made.built.weight_bytes,
        kv_bytes=made.built.kv_bytes,
        seed=config.seed,
        version=__version__,
        vectors=made.spec.vectors,
    )


def assemble(
    model: str,
    config: EngineConfig | None = None,
    *,
    clock: Clock | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    progress: Any = None,
    notice: Any = None,
    tune: bool = False,
) -> Assembled:
    """Loads `model` (short name, org/name[:file] or path) and builds its engine.

    `tune` measures what no start before has measured here: how many tokens a step should have.

    Raises UnknownModel, ModelError, ConfigError or DownloadError.
    """
    given = config or EngineConfig()
    check(given)
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
    knee = known_knee(opened.source, given.model.weights)
    resolved = resolve_for(opened, given, knee)
    config = resolved.config
    if isinstance(spec, EncoderSpec):
        built = compose.build_encoder_runner(
            opened.source,
            config.model.dtype,
            resolved.blocks[spec.groups[0].name],
            resolved.max_context,
            resolved.plans,
            resolved.threads,
            config.runner.ops,
            notice,
        )
    else:
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
    tunable = not isinstance(spec, EncoderSpec) and given.sched.step_tokens == given.sched.meters == "auto"
    if tune and knee[0] is None and tunable:
        resolved = _tuned(opened, resolved, built.runner, notice)
        lap("step size")
    aside.join()
    if isinstance(tokenizer[0], BaseException):
        raise tokenizer[0]
    if isinstance(spec, EncoderSpec):
        built.runner.pair_id = tokenizer[0].last_id
    lap("tokenizer")
    engine = build_engine(built.runner, spec, tokenizer[0], config, resolved, clock, listeners, spec.name)
    lap("engine")
    return Assembled(engine, tokenizer[0], spec, resolved, built, opened.source, phases)


def resolve_for(opened: Any, config: EngineConfig, knee: tuple[int | None, str] | None = None) -> Resolved:
    """A config without "auto" for a model that is open, on this machine. Raises ConfigError.

    `knee` is what is known of its step size, where the caller has looked already.
    """
    compose = importlib.import_module(COMPOSE)
    if isinstance(opened.spec, EncoderSpec):
        return resolve_encoder(config, opened.spec, Machine("cpu", compose.usable_cores(), compose.free_memory()))
    kv, dtype = registry.make("kv", kv_choice(config)[0]), config.model.dtype
    found = known_knee(opened.source, config.model.weights) if knee is None else knee
    machine = Machine("cpu", compose.usable_cores(), compose.free_memory(), *found)
    return resolve(config, opened.spec, machine, lambda group, size: int(kv.page_bytes(group, size, dtype)))


def _tuned(opened: Any, resolved: Resolved, runner: Any, notice: Any) -> Resolved:
    """`resolved` with a step size measured now, and kept for the next start. No start fails for want of it."""
    if notice is not None:
        notice("measuring how many tokens a step should have; that is done once a model and takes a few seconds")
    config, counters = resolved.config, replace(runner.counters)
    try:
        knee = first_knee(Bench(runner, opened.spec, resolved.max_context, config.decode.name))
        keep_knee(opened.source, config.model.weights, knee, model=opened.spec.name)
    except (RequestFault, BadRequest, OSError) as error:
        if notice is not None:
            notice(f"the step size stays at its default: {error}")
        return resolved
    finally:
        runner.counters = counters
    return with_knee(resolved, knee.step_tokens, measured_on(knee.date))


def build_engine(
    runner: Any,
    spec: AnySpec,
    tokenizer: Tokenizer,
    config: EngineConfig,
    resolved: Resolved,
    clock: Clock | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    key: str = "",
    cost: StepCost | None = None,
    watch: Callable[[Request], list[Observer]] = lambda request: [],
) -> Engine:
    """An engine over a runner that exists: experiments build several over one.

    `cost` stands for the profile that the config names, `watch` makes observers of outputs beside the engine's own.
    """
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
        cost=cost or (profiles.load(config.sched.profile).step_cost() if config.sched.profile else None),
    )
    tokens = whole_blocks(spec, resolved.blocks) * capacity.block_size
    limits = Limits(spec.vocab_size, resolved.max_context, tokens, spec.kinds)
    makers = [
        cast(GuideMaker, registry.get("logits", name)(tokenizer.vocabulary, spec.vocab_size, tokenizer.stop_ids))
        for name in registry.names("logits")
        if Kind.GENERATE in spec.kinds and registry.has("logits", name, "host")
    ]
    watchers = [registry.get("observer", name) for name in registry.names("observer")]

    def observers(request: Request) -> list[Observer]:
        own = [cast(Observer, kind(request, tokenizer.vocabulary)) for kind in watchers if kind.wanted(request)]
        return [*own, *watch(request)]

    lengths = config.sched.lengths
    return Engine(
        scheduler,
        runner,
        clock or WallClock(),
        limits,
        stop_ids=frozenset(tokenizer.stop_ids),
        decode=config.decode,
        observers=observers,
        guides=makers,
        listeners=listeners,
        seed=config.seed,
        lengths=None if lengths is None else registry.make("length", lengths, text=tokenizer.decode),
    )
