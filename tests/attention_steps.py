"""Attention cases laid out in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.ops.attention.protocol import AttentionAsk, AttentionBackend
from millstream.ops.cases.attention import AttentionCase
from millstream.ops.layout import BatchLayout, GroupLayout


@dataclass
class Step:
    """A case laid out in pages, in blocks drawn at random; positions behind the window have no block."""

    case: AttentionCase
    pages: Any
    tables: list[list[int]]
    q: torch.Tensor

    def layout(self, rows: Sequence[tuple[int, int, int]]) -> BatchLayout:
        """A layout of (row of the case, new tokens, tokens attended over)."""
        width = max((len(t) for t in self.tables), default=1)
        tables = torch.full((len(rows), width), -1, dtype=torch.int32)
        positions: list[int] = []
        for i, (row, n, length) in enumerate(rows):
            held = -(-length // self.case.block_size)
            tables[i, :held] = torch.tensor(self.tables[row][:held], dtype=torch.int32)
            if self.case.window is not None:
                tables[i, : max(0, length - n - self.case.window + 1) // self.case.block_size] = -1
            positions += range(length - n, length)
        counts = torch.tensor([0, *(n for _, n, _ in rows)])
        return BatchLayout(
            query_start=counts.cumsum(0).int(),
            positions=torch.tensor(positions, dtype=torch.int64),
            seq_lens=torch.tensor([length for _, _, length in rows], dtype=torch.int32),
            groups={"full": GroupLayout(torch.zeros(len(positions), dtype=torch.int64), tables)},
            block_size=self.case.block_size,
            max_query=max((n for _, n, _ in rows), default=0),
            max_seq=max((length for *_, length in rows), default=0),
        )

    def run(self, backend: AttentionBackend, layout: BatchLayout, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        return backend.run(q, self.pages, 0, backend.prepare(layout), case.scale, case.window, case.softcap)

    def whole(self, backend: AttentionBackend) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(backend, self.layout([(i, n, length) for i, (n, length) in enumerate(self.case.rows)]), self.q)


def lay_out(case: AttentionCase, kv: str = "plain") -> Step:
    q, keys, values = case.inputs()
    group = CacheGroup("full", num_layers=1, kv_heads=case.kv_heads, head_dim=case.dim)
    needed = [-(-length // case.block_size) for _, length in case.rows]
    pages = registry.make("kv", kv, device=True).allocate(group, sum(needed) + 2, case.block_size, case.page_dtype)
    # What lies in unwritten places must not matter. Read as a float, bytes of ones are not a number.
    for memory in (pages.k, pages.v) if kv == "plain" else (pages.data,):
        memory.view(torch.uint8).fill_(255)
    free = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    tables = []
    for count, k, v in zip(needed, keys, values, strict=True):
        table = [free.pop() for _ in range(count)]
        tables.append(table)
        position = torch.arange(k.shape[0])
        block = torch.tensor(table, dtype=torch.int64)[position // case.block_size]
        pages.write(0, block * case.block_size + position % case.block_size, k, v)
    return Step(case, pages, tables, q)


def ask_of(case: AttentionCase) -> AttentionAsk:
    return AttentionAsk(
        device="cpu",
        dtype="float32",
        page_dtype=case.page_dtype,
        page_layout="k-transposed",
        query_heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.dim,
        block_size=case.block_size,
        window=case.window,
        softcap=case.softcap,
    )
