"""The configuration tree: small frozen dataclasses, one a component. "auto" is resolved in engine/resolve.py.

Values that name a plug-in are a Choice; in files and options they may be written as "name" or as
{name = "...", option = value}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from millstream.core.cache import ALL_LEVELS
from millstream.core.registry import Choice

Auto = Literal["auto"]

# How many levels of a tree of shared prefixes each value of runner.shared_prefix stands for.
SHARED_PREFIX = {"off": 0, "one-level": 1, "tree": ALL_LEVELS}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`dtype` of weights and activations; `max_context` in tokens, at most what the model was made for.

    `weights` is how matrices are kept: "dense", in the dtype, or "blocks": codes of 4 or 8 bits with scales, as they
    are stored in a GGUF file, multiplied by activations of 8 bits. Faster, and off by what that rounding costs. Or the
    name of a weight format ("fp6-e3m2"), into which floats are packed at the first start. A folder that
    `millstream quantize` made keeps the formats it was packed in.
    """

    dtype: str = "float32"
    weights: str = "dense"
    max_context: int | Auto = "auto"


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache. `bytes` is its budget ("4GiB", "512MB" or a number); `blocks` sets the count itself.

    `kv` is how keys and values are stored: "auto" is plain, or int8 beside weights in blocks. `host_bytes` is what
    swapped-out sequences may take of host memory.
    """

    kv: Choice | Auto = "auto"
    block_size: int | Auto = "auto"
    bytes: int | str = "auto"
    blocks: int | Auto = "auto"
    host_bytes: int | str = "auto"
    prefix: Choice = Choice("radix")


@dataclass(frozen=True, slots=True)
class SchedConfig:
    """Policies stack, the most important first. `meters` are asked in order; the block meter belongs last.

    `step_tokens` and `max_rows` are the options of the meters splitfuse and seats when these are chosen by "auto".
    `profile` is the name or file of a profile of step times (`millstream calibrate`), for policies and meters that go
    by how long a step takes.
    `lengths` guesses how long outputs will be, for policies that order by it (None: nobody does).
    """

    policies: tuple[Choice, ...] = (Choice("fcfs"),)
    meters: tuple[Choice, ...] | Auto = "auto"
    step_tokens: int | Auto = "auto"
    max_rows: int | Auto = "auto"
    preemption: str = "recompute"
    profile: str = ""
    lengths: Choice | None = None


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """`plans` in flight (1 or 2); `threads` for the compute; `attention` and `ops` pick implementations.

    `shared_prefix`: keys and values that several rows of a step hold together are read once for all of them, where that
    pays: "tree" (every level of prefixes within prefixes), "one-level" (what they begin with) or "off".
    """

    plans: int | Auto = "auto"
    threads: int | Auto = "auto"
    attention: str = "auto"
    ops: str = "auto"
    shared_prefix: str = "auto"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """`[log]` of a server: `format` is text or json, `level` the least that is logged."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything one engine needs to know besides the model's name. `seed` makes requests without one repeatable."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    decode: Choice = Choice("autoregressive")
    seed: int | None = None
