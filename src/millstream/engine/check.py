"""All rules that span several settings. One place, so that a wrong combination is told before anything is loaded."""

from __future__ import annotations

from millstream.config.schema import SHARED_PREFIX, EngineConfig
from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName
from millstream.core.registry import Card, Choice

DTYPES = ("float32", "bfloat16")
PREEMPTION = ("recompute", "swap")
OPS = ("auto", "ref")
# Besides the weight formats by name.
WEIGHTS = ("blocks",)


def check(config: EngineConfig) -> None:
    """Raises ConfigError or UnknownName for a plug-in that does not exist and for settings that do not go together."""
    if config.model.dtype not in DTYPES:
        raise UnknownName("dtype (model.dtype)", config.model.dtype, DTYPES)
    weights = (*WEIGHTS, *registry.names("weights"))
    if config.model.weights not in weights:
        raise UnknownName("way to keep weights (model.weights)", config.model.weights, weights)
    if config.model.weights != "dense" and config.model.dtype != "float32":
        raise ConfigError(
            f"model.weights {config.model.weights!r} computes in float32, model.dtype is {config.model.dtype}"
        )
    if config.sched.preemption not in PREEMPTION:
        raise UnknownName("preemption (sched.preemption)", config.sched.preemption, PREEMPTION)
    if config.runner.ops not in OPS:
        raise UnknownName("choice of ops (runner.ops)", config.runner.ops, OPS)
    if config.runner.shared_prefix not in ("auto", *SHARED_PREFIX):
        raise UnknownName(
            "way to share prefixes (runner.shared_prefix)", config.runner.shared_prefix, ("auto", *SHARED_PREFIX)
        )
    if not config.sched.policies:
        raise ConfigError("sched.policies is empty; the plainest order is fcfs")
    chosen: dict[str, Card] = {}
    for point, choice in choices(config):
        chosen[f"{point}:{choice.name}"] = registry.card(point, choice.name)
        registry.options(point, choice)
    if config.sched.meters != "auto" and not any(
        getattr(registry.get("meter", choice.name), "relieved_by_preemption", False) for choice in config.sched.meters
    ):
        raise ConfigError("sched.meters has none that keeps account of KV blocks, such as kv-blocks")
    for name, card in chosen.items():
        for need in card.needs:
            if need not in chosen:
                raise ConfigError(f"{name} needs {need}, which is not chosen")
        for enemy in card.conflicts:
            if enemy in chosen:
                raise ConfigError(f"{name} and {enemy} do not go together")


def choices(config: EngineConfig) -> list[tuple[str, Choice]]:
    """Every plug-in that a config names, with its point."""
    found = [("prefix", config.cache.prefix), ("decode", config.decode)]
    if config.cache.kv != "auto":
        found.append(("kv", config.cache.kv))
    found += [("policy", choice) for choice in config.sched.policies]
    if config.sched.lengths is not None:
        found.append(("length", config.sched.lengths))
    if config.sched.meters != "auto":
        found += [("meter", choice) for choice in config.sched.meters]
    return found
