"""What attention asks of the pages it reads, and what it promises.

Shapes: T new tokens of a step, H query heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.errors import ConfigError
from millstream.ops.table import Refusal, Use, in_use

if TYPE_CHECKING:
    import torch

    from millstream.ops.layout import BatchLayout


@dataclass(slots=True)
class CopyCounts:
    """Bytes of K/V copied so far. Reading pages in place copies nothing and counts nothing."""

    write_bytes: int = 0
    move_bytes: int = 0
    gather_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.write_bytes + self.move_bytes + self.gather_bytes


class Pages(Protocol):
    """The K/V of one cache group: all its layers, in blocks. A slot is block * block_size + offset.

    `layer` counts within the group. `layout` names the arrangement in memory: a backend that reads pages in place
    accepts the layouts it knows; `read` works for every one of them.
    """

    group: CacheGroup
    block_size: int
    num_blocks: int
    layout: str
    dtype: torch.dtype
    copied: CopyCounts

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None: ...

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def wrote(self, num_tokens: int, num_layers: int) -> None:
        """Counts what a native program wrote itself: `num_tokens` in each of some layers."""
        ...

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where the keys and the values of a layer begin in memory, the same where one block holds both."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionAsk:
    """What a model needs of attention for one cache group. dtypes by name ("float32")."""

    device: str
    dtype: str
    page_dtype: str
    page_layout: str
    query_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int | None = None
    softcap: float | None = None
    tree: bool = False


class AttentionBackend(Protocol):
    """Scaled dot-product attention of new tokens over paged keys and values.

    Row s attends with its last n tokens (n = query_start[s + 1] - query_start[s]) over its first seq_lens[s] ones, each
    token over itself and those before it; with `window` w over itself and the w - 1 before it. Blocks that no query of
    the row can see may be NO_BLOCK. The keys of the new tokens are in the pages before `run` is called.

    `preference` orders backends that accept the same ask, highest first. `in_program` says that a native program which
    runs whole layers computes the same attention itself, to the last bit, and may be used in this backend's place.
    """

    preference: int
    in_program: bool

    def accepts(self, ask: AttentionAsk) -> Refusal | None:
        """None, or why not. May compile kernels; asked once per model and group, not per step."""
        ...

    def prepare(self, layout: BatchLayout, buffers: MutableMapping[str, torch.Tensor] | None = None) -> Any:
        """What every layer of a step shares. `buffers` outlive the step, for backends that record graphs."""
        ...

    def run(
        self,
        q: torch.Tensor,
        pages: Pages,
        layer: int,
        state: Any,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (T, H, D) -> out (T, H, D) in q's dtype, lse (T, H) float32 (natural log; -inf where nothing is seen)."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The backend for an ask, and why each of the others was passed over: (name, reason)."""

    name: str
    backend: AttentionBackend
    refused: tuple[tuple[str, str], ...] = field(default=())


def choose(ask: AttentionAsk, name: str = "auto", use: Use | None = None) -> AttentionChoice:
    """The preferred accepting backend; `name` asks for one, `use="ref"` for the reference (default: `ops.table.use`).

    Raises UnknownName for a name that does not exist and ConfigError when the named one refuses or none accepts.
    """
    if name != "auto":
        backend = registry.make("attention", name)
        refusal = backend.accepts(ask)
        if refusal is not None:
            raise ConfigError(f"attention {name!r} refuses: {refusal.reason}")
        return AttentionChoice(name, backend)
    refused: list[tuple[str, str]] = []
    backends = [(n, registry.make("attention", n)) for n in registry.names("attention")]
    for candidate, backend in sorted(backends, key=lambda pair: (-pair[1].preference, pair[0])):
        if (use or in_use()) == "ref" and backend.preference > 0:
            refused.append((candidate, "the reference was asked for"))
            continue
        refusal = backend.accepts(ask)
        if refusal is None:
            return AttentionChoice(candidate, backend, tuple(refused))
        refused.append((candidate, refusal.reason))
    raise ConfigError(f"no attention backend accepts {ask}: " + "; ".join(f"{n}: {r}" for n, r in refused))
