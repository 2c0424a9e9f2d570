""" "auto" -> a decision with its reason. A pure function: what it knows of model and machine are its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from millstream.config.load import parse_bytes
from millstream.config.schema import SHARED_PREFIX, EngineConfig
from millstream.core.cache import ALL_LEVELS, CacheGroup, Keep
from millstream.core.errors import ConfigError
from millstream.core.registry import Choice
from millstream.models.encoder_spec import AnySpec, EncoderSpec
from millstream.models.spec import ModelSpec
from millstream.sched.meters import usual

# Where nothing was measured on this machine: a few times the point where compute overtakes reading the weights.
DEFAULT_STEP_TOKENS = 256
DEFAULT_MAX_ROWS = 256
CPU_BLOCK_SIZE = 64
# The page cache holds the weights of a mapped model, and others live on this machine too.
KV_SHARE = 0.4
MAX_KV_BYTES = 8 << 30
MAX_HOST_BYTES = 4 << 30
# Of an encoder: products are as fast as they get well below, and a text that comes waits for a whole step.
ENCODER_STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Machine:
    """What a decision may depend on. `knee` is the measured step size in tokens, when one was measured."""

    device: str
    cores: int
    memory_bytes: int
    knee: int | None = None
    knee_source: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One setting, what it came to, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config without "auto" in it. Blocks are by cache group."""

    config: EngineConfig
    max_context: int
    block_size: int
    blocks: dict[str, int]
    host_blocks: dict[str, int]
    plans: int
    threads: int
    meters: tuple[Choice, ...]
    decisions: tuple[Decision, ...]
    prefix_levels: int = ALL_LEVELS


def kv_choice(config: EngineConfig) -> tuple[Choice, str]:
    """How keys and values are stored, and why: what "auto" comes to needs neither model nor machine."""
    given = config.cache.kv
    if given != "auto":
        return given, ""
    if config.model.weights == "blocks":
        return Choice(
            "int8"
        ), "weights in blocks are rounded already; a quarter of the memory, and as much less to read"
    return Choice("plain"), "keys and values as they are computed"


def resolve(
    config: EngineConfig,
    spec: ModelSpec,
    machine: Machine,
    page_bytes: Callable[[CacheGroup, int], int],
) -> Resolved:
    """Settles every "auto". `page_bytes(group, block_size)` is what a block costs. Raises ConfigError."""
    notes: list[Decision] = []

    def decide(name: str, value: object, reason: str) -> None:
        notes.append(Decision(name, str(value), reason))

    kv, why = kv_choice(config)
    if why:
        decide("cache.kv", kv, why)
        config = replace(config, cache=replace(config.cache, kv=kv))
    runner, cache, sched = config.runner, config.cache, config.sched
    threads = runner.threads
    if threads == "auto":
        threads = machine.cores
        decide("runner.threads", threads, f"{machine.cores} cores may be used by this process")
    if threads < 1:
        raise ConfigError(f"runner.threads: got {threads}, allowed is 1 or more")
    plans = runner.plans
    if plans == "auto":
        plans = 1 if machine.device == "cpu" else 2
        decide("runner.plans", plans, "on a CPU the host's work would take cores from the forward pass")
    if plans not in (1, 2):
        raise ConfigError(f"runner.plans: got {plans}, allowed is 1 or 2")
    shared_prefix = runner.shared_prefix
    if shared_prefix == "auto":
        shared_prefix = "tree"
        decide("runner.shared_prefix", shared_prefix, "the same bits, and keys that rows share are read once for all")
    if shared_prefix not in SHARED_PREFIX:
        raise ConfigError(f"runner.shared_prefix: got {shared_prefix}, allowed is auto, {', '.join(SHARED_PREFIX)}")

    max_context = config.model.max_context
    if max_context == "auto":
        max_context = spec.context
        decide("model.max_context", max_context, "what the model was made for")
    elif not 2 <= max_context <= spec.context:
        raise ConfigError(f"model.max_context: got {max_context}, allowed is 2 to {spec.context}, the model's own")

    block_size = cache.block_size
    if block_size == "auto":
        block_size = CPU_BLOCK_SIZE
        decide("cache.block_size", block_size, "long runs in memory for each head, and a multiple of 16 for the kernel")
    if block_size < 1:
        raise ConfigError(f"cache.block_size: got {block_size}, allowed is 1 or more")

    max_rows = sched.max_rows
    if max_rows == "auto":
        max_rows = DEFAULT_MAX_ROWS
        decide("sched.max_rows", max_rows, "throughput on a CPU no longer grows beyond")
    step_tokens = sched.step_tokens
    if step_tokens == "auto":
        step_tokens = machine.knee or DEFAULT_STEP_TOKENS
        reason = (
            _at_the_knee(machine.knee_source)
            if machine.knee
            else "a default, until the model's first start measures the knee here (or millstream bench knee MODEL)"
        )
        decide("sched.step_tokens", step_tokens, reason)
    for name, value in (("sched.max_rows", max_rows), ("sched.step_tokens", step_tokens)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, allowed is 1 or more")

    costs = {group.name: page_bytes(group, block_size) for group in spec.groups}
    blocks = _blocks(config, spec, machine, block_size, max_context, max_rows, step_tokens, costs, decide)
    host_blocks = _host_blocks(config, spec, blocks, costs, decide)
    held = whole_blocks(spec, blocks)
    if held * block_size < max_context:
        if config.model.max_context == "auto":
            max_context = held * block_size
            notes[:] = [note for note in notes if note.name != "model.max_context"]
            decide("model.max_context", max_context, f"all that {held} KV blocks hold (the model takes {spec.context})")
        else:
            raise ConfigError(
                f"model.max_context is {max_context} tokens, but the KV cache holds only {held * block_size}: "
                "raise cache.bytes or lower model.max_context"
            )

    meters = sched.meters
    if meters == "auto":
        meters = usual(step_tokens, max_rows)
        notes.append(_metered(meters))
    return Resolved(
        config,
        max_context,
        block_size,
        blocks,
        host_blocks,
        plans,
        threads,
        meters,
        tuple(notes),
        SHARED_PREFIX[shared_prefix],
    )


def resolve_encoder(config: EngineConfig, spec: EncoderSpec, machine: Machine) -> Resolved:
    """Settles every "auto" for an encoder: texts are computed whole and nothing of them is kept. Raises ConfigError."""
    notes: list[Decision] = []

    def decide(name: str, value: object, reason: str) -> None:
        notes.append(Decision(name, str(value), reason))

    if config.model.weights != "dense":
        raise ConfigError(
            f"model.weights is {config.model.weights!r}: {spec.name} is an encoder, whose weights are kept dense"
        )
    threads = config.runner.threads
    if threads == "auto":
        threads = machine.cores
        decide("runner.threads", threads, f"{machine.cores} cores may be used by this process")
    plans = config.runner.plans
    if plans == "auto":
        plans = 1 if machine.device == "cpu" else 2
        decide("runner.plans", plans, "on a CPU the host's work would take cores from the forward pass")
    max_context = config.model.max_context
    if max_context == "auto":
        max_context = spec.usual_context or spec.context
        reason = "what the model was made for"
        if max_context < spec.context:
            reason = f"what its authors advise; it has positions for {spec.context}"
        decide("model.max_context", max_context, reason)
    max_rows = config.sched.max_rows
    if max_rows == "auto":
        max_rows = DEFAULT_MAX_ROWS
        decide("sched.max_rows", max_rows, "texts in one step")
    step_tokens = config.sched.step_tokens
    if step_tokens == "auto":
        step_tokens = ENCODER_STEP_TOKENS
        decide("sched.step_tokens", step_tokens, "larger steps are no faster and make others wait longer")
    for name, value, high in (
        ("runner.threads", threads, None),
        ("runner.plans", plans, 2),
        ("model.max_context", max_context, spec.context),
        ("sched.max_rows", max_rows, None),
        ("sched.step_tokens", step_tokens, None),
    ):
        if value < 1 or (high is not None and value > high):
            raise ConfigError(f"{name}: got {value}, allowed is 1 {'or more' if high is None else f'to {high}'}")
    meters = config.sched.meters
    if meters == "auto":
        meters = (
            Choice("orca", {"max_tokens": step_tokens}),
            Choice("seats", {"max_rows": max_rows}),
            Choice("kv-blocks", {"watermark": 0.0}),
        )
        notes.append(Decision("sched.meters", ", ".join(map(str, meters)), "texts whole, as many as fit a step"))
    group = spec.groups[0].name
    config = replace(
        config,
        cache=replace(config.cache, kv=Choice("plain"), prefix=Choice("none")),
        sched=replace(config.sched, preemption="recompute"),
    )
    return Resolved(
        config, max_context, max_context, {group: max_rows}, {group: 0}, plans, threads, meters, tuple(notes)
    )


def with_knee(resolved: Resolved, step_tokens: int, source: str) -> Resolved:
    """The same with steps of a size measured since, where step size and meters were "auto". Nothing else is decided
    anew: by then the pages exist."""
    composition, *others = resolved.meters
    meters = (Choice(composition.name, {**composition.options, "budget": step_tokens}), *others)
    step = Decision("sched.step_tokens", str(step_tokens), _at_the_knee(source))
    anew = {decision.name: decision for decision in (step, _metered(meters))}
    return replace(resolved, meters=meters, decisions=tuple(anew.get(old.name, old) for old in resolved.decisions))


def _at_the_knee(source: str) -> str:
    return f"the knee of tokens against time, {source}"


def _metered(meters: tuple[Choice, ...]) -> Decision:
    return Decision("sched.meters", ", ".join(map(str, meters)), "steps of equal size, blocks on demand")


def _blocks(
    config: EngineConfig,
    spec: ModelSpec,
    machine: Machine,
    block_size: int,
    max_context: int,
    max_rows: int,
    step_tokens: int,
    costs: dict[str, int],
    decide: Callable[[str, object, str], None],
) -> dict[str, int]:
    cache = config.cache
    if cache.blocks != "auto":
        if cache.blocks < 1:
            raise ConfigError(f"cache.blocks: got {cache.blocks}, allowed is 1 or more")
        return {group.name: cache.blocks for group in spec.groups}
    whole = sum(costs.values())
    if cache.bytes == "auto":
        useful = math.ceil(max_context / block_size) * max_rows * whole
        budget = min(int(machine.memory_bytes * KV_SHARE), MAX_KV_BYTES, useful)
        reason = f"{KV_SHARE:.0%} of the {_gib(machine.memory_bytes)} that are free, at most {_gib(MAX_KV_BYTES)}"
        if budget == useful:
            reason = f"{max_rows} sequences of {max_context} tokens need no more"
        decide("cache.bytes", f"{budget} ({_gib(budget)})", reason)
    else:
        budget = parse_bytes(cache.bytes, "cache.bytes")
    # A window keeps few tokens of a running sequence; what it needs beyond that is only for prefix hits.
    weight = {}
    for group in spec.groups:
        kept = max_context if group.window is None else min(max_context, group.window + step_tokens)
        weight[group.name] = max(kept / max_context, 0.25)
    unit = sum(costs[name] * share for name, share in weight.items())
    blocks = {name: int(budget / unit * share) for name, share in weight.items()}
    least = 2
    for name, count in blocks.items():
        if count < least:
            raise ConfigError(
                f"cache.bytes is {budget}: group {name!r} gets {count} blocks of {costs[name]} bytes, needs {least}"
            )
    decide(
        "cache.blocks",
        ", ".join(f"{name} {count}" for name, count in blocks.items()),
        f"the budget over {', '.join(f'{costs[name]} bytes a block of {name}' for name in blocks)}",
    )
    return blocks


def _host_blocks(
    config: EngineConfig,
    spec: ModelSpec,
    blocks: dict[str, int],
    costs: dict[str, int],
    decide: Callable[[str, object, str], None],
) -> dict[str, int]:
    given = config.cache.host_bytes
    if given == "auto":
        if config.sched.preemption != "swap":
            decide("cache.host_bytes", 0, "preemption recomputes, so nothing is swapped out")
            return dict.fromkeys(blocks, 0)
        budget = min(sum(blocks[name] * costs[name] for name in blocks), MAX_HOST_BYTES)
        decide("cache.host_bytes", budget, f"as much as the device holds, at most {_gib(MAX_HOST_BYTES)}")
    elif given == 0:
        budget = 0
    else:
        budget = parse_bytes(given, "cache.host_bytes")
    total = sum(blocks[name] * costs[name] for name in blocks)
    found = {name: int(count * min(1.0, budget / total)) for name, count in blocks.items()}
    if config.sched.preemption == "swap" and not all(found.values()):
        raise ConfigError(
            f"sched.preemption is 'swap', but cache.host_bytes of {budget} bytes have no room for a block of each "
            "group: raise them, leave them at 'auto', or take preemption 'recompute'"
        )
    return found


def whole_blocks(spec: AnySpec, blocks: Mapping[str, int]) -> int:
    """Blocks that bound how long one sequence can get: those of the groups that keep every token.

    Where no group does, the smallest of all.
    """
    full = [blocks[group.name] for group in spec.groups if group.keep is Keep.FULL]
    return min(full or blocks.values())


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
