"""The computing side put together: a model's files -> a TorchRunner. Reached by name: planners need no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from millstream.config.load import home
from millstream.core import registry
from millstream.core.registry import Choice
from millstream.models.load import load_encoder, load_model
from millstream.models.source import ModelSource
from millstream.models.spec import ModelSpec
from millstream.ops import table
from millstream.ops.attention.protocol import AttentionAsk, AttentionBackend, choose
from millstream.ops.cpu import build
from millstream.runner.encoder_runner import EncoderRunner
from millstream.runner.torch_runner import TorchRunner


@dataclass(slots=True)
class Built:
    """A runner and what was decided on the way: which implementation of each op, and why not the others.

    `program` is why layers are not run as one native call, None where they are; `formats` are bytes by weight format.
    """

    runner: TorchRunner
    weight_bytes: int
    kv_bytes: int
    attention: dict[str, str]
    refusals: dict[str, tuple[tuple[str, str], ...]]
    program: str | None
    formats: dict[str, int]
    phases: dict[str, float] = field(default_factory=dict)


def build_runner(
    source: ModelSource,
    spec: ModelSpec,
    dtype: str,
    weights: str,
    kv: Choice,
    block_size: int,
    blocks: Mapping[str, int],
    host_blocks: Mapping[str, int],
    plans: int,
    threads: int,
    attention: str,
    ops: str,
    prefix_levels: int,
    notice: Callable[[str], None] | None = None,
) -> Built:
    """Loads the weights and allocates the pages. Raises ModelError and ConfigError."""
    build.configure(directory=home() / "kernels", notice=notice)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with table.use("ref" if ops == "ref" else "auto"):
        loaded = load_model(source, dtype, weights=weights)
        start = time.perf_counter()
        formats = registry.make("kv", kv, device=True)
        pages, backends = {}, {}
        names: dict[str, str] = {}
        refusals: dict[str, tuple[tuple[str, str], ...]] = {}
        known: dict[str, AttentionBackend] = {}
        for group in spec.groups:
            held = formats.allocate(group, blocks[group.name], block_size, dtype, host_blocks[group.name])
            mixer = next(layer.mixer for layer in spec.layers if layer.mixer.group == group.name)
            ask = AttentionAsk(
                device="cpu",
                dtype=dtype,
                page_dtype=str(held.dtype).removeprefix("torch."),
                page_layout=held.layout,
                query_heads=mixer.heads,
                kv_heads=mixer.kv_heads,
                head_dim=mixer.head_dim,
                block_size=block_size,
                window=mixer.window,
                softcap=mixer.softcap,
            )
            choice = choose(ask, attention)
            # Groups that chose the same backend share one, and with it what it prepares for a step.
            backends[group.name] = known.setdefault(choice.name, choice.backend)
            pages[group.name] = held
            names[group.name], refusals[group.name] = choice.name, choice.refused
        phases = {**loaded.report.phases, "pages": time.perf_counter() - start}
    host = registry.make("kv", kv)
    kv_bytes = sum(blocks[g.name] * host.page_bytes(g, block_size, dtype) for g in spec.groups)
    runner = TorchRunner(loaded.decoder, pages, backends, plans, prefix_levels)
    program = loaded.decoder.program
    why = program.reason if isinstance(program, table.Refusal) else None
    if why is None and not all(backend.in_program for backend in backends.values()):
        why = "attention is " + ", ".join(sorted(set(names.values())))
    return Built(
        runner, loaded.report.weight_bytes, kv_bytes, names, refusals, why, loaded.decoder.format_bytes(), phases
    )


@dataclass(slots=True)
class BuiltEncoder:
    """The same of an encoder, which keeps no keys and values."""

    runner: EncoderRunner
    weight_bytes: int
    formats: dict[str, int]
    kv_bytes: int = 0
    attention: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    program: str | None = "an encoder"
    phases: dict[str, float] = field(default_factory=dict)


def build_encoder_runner(
    source: ModelSource,
    dtype: str,
    rows: int,
    context: int,
    plans: int,
    threads: int,
    ops: str,
    notice: Callable[[str], None] | None = None,
) -> BuiltEncoder:
    """Loads an encoder's weights. Raises ModelError and ConfigError."""
    build.configure(directory=home() / "kernels", notice=notice)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with table.use("ref" if ops == "ref" else "auto"):
        loaded = load_encoder(source, dtype)
    runner = EncoderRunner(loaded.encoder, rows, context, plans)
    return BuiltEncoder(
        runner, loaded.report.weight_bytes, {"dense": loaded.report.weight_bytes}, phases=loaded.report.phases
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that could be taken now without swapping, as the system estimates it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
