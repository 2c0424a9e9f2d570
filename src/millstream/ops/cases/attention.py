"""Paged attention: the shapes of the models at hand and the edges of tiles, segments, blocks, windows and rows.

Not a Table: a backend is run over pages, which a KV format builds from the dense keys and values given here.
Shapes: T new tokens of all rows, H query heads, K kv heads, D head dimension, L tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """`rows` are (new tokens, tokens attended over, these included). Tolerances are against the float64 formula."""

    name: str
    rows: tuple[tuple[int, int], ...]
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    block_size: int = 64
    window: int | None = None
    softcap: float | None = None
    page_dtype: str = "float32"
    atol: float = 5e-6
    # Over pages of codes, against the reference over what these hold: the 16 bits of queries and softmax weights.
    codes_atol: float = 1.5e-4
    # Queries and keys this many times larger: sharp distributions, scores far apart.
    sharp: float = 1.0

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.dim)

    def inputs(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """q (T, H, D) and for each row k, v (L, K, D), float32 but exactly representable in the page dtype."""
        generator = torch.Generator().manual_seed(len(self.rows) * 1000 + self.dim)
        dtype = getattr(torch, self.page_dtype)
        num_tokens = sum(n for n, _ in self.rows)
        q = torch.randn(num_tokens, self.heads, self.dim, generator=generator) * self.sharp
        keys, values = [], []
        for _, length in self.rows:
            shape = (length, self.kv_heads, self.dim)
            keys.append((torch.randn(shape, generator=generator) * self.sharp).to(dtype).float())
            values.append(torch.randn(shape, generator=generator).to(dtype).float())
        return q, keys, values

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out (T, H, D) and lse (T, H) in float64, one query and head at a time."""
        q, keys, values = self.inputs()
        outs, lses, token = [], [], 0
        for (n, length), k, v in zip(self.rows, keys, values, strict=True):
            k, v = k.double(), v.double()
            for position in range(length - n, length):
                low = 0 if self.window is None else max(0, position - self.window + 1)
                for head in range(self.heads):
                    kv_head = head * self.kv_heads // self.heads
                    scores = k[low : position + 1, kv_head] @ q[token, head].double() * self.scale
                    if self.softcap is not None:
                        scores = self.softcap * torch.tanh(scores / self.softcap)
                    outs.append(torch.softmax(scores, 0) @ v[low : position + 1, kv_head])
                    lses.append(torch.logsumexp(scores, 0))
                token += 1
        if not outs:
            return torch.zeros(0, self.heads, self.dim).double(), torch.zeros(0, self.heads).double()
        shape = (token, self.heads, self.dim)
        return torch.stack(outs).view(shape), torch.stack(lses).view(shape[:2])


GEMMA: dict[str, Any] = {"heads": 4, "kv_heads": 1, "dim": 256}
QWEN: dict[str, Any] = {"heads": 12, "kv_heads": 2, "dim": 128}

CASES = (
    AttentionCase("first token", ((1, 1),)),
    AttentionCase("no rows", ()),
    AttentionCase("an empty row among others", ((1, 70), (0, 20), (3, 3))),
    AttentionCase("decode", ((1, 64), (1, 65), (1, 63), (1, 511), (1, 512), (1, 513), (1, 1200))),
    AttentionCase("prefill", ((100, 100),)),
    AttentionCase("prefill at the end of a long row", ((13, 1037),)),
    AttentionCase("decode and chunks mixed", ((1, 130), (40, 600), (1, 5), (17, 17), (2, 1025))),
    AttentionCase("small blocks", ((1, 130), (40, 300)), block_size=16),
    AttentionCase("blocks that are no power of two", ((1, 530), (40, 300)), block_size=48),
    AttentionCase("large blocks", ((1, 530), (40, 300)), block_size=256),
    AttentionCase("gemma", ((1, 600), (20, 90)), **GEMMA),
    AttentionCase("gemma window", ((1, 700), (40, 640), (90, 90)), **GEMMA, window=64),
    AttentionCase("window across segments", ((1, 1500), (30, 1100)), window=513),
    AttentionCase("window of one", ((1, 100), (20, 40)), window=1),
    AttentionCase("softcap", ((1, 300), (20, 90)), softcap=5.0, sharp=3.0, atol=2e-5),
    AttentionCase("qwen", ((1, 400), (20, 90)), **QWEN),
    AttentionCase("one head each", ((1, 200), (9, 99)), heads=5, kv_heads=5, dim=64),
    AttentionCase("one kv head, many queries", ((1, 200), (9, 99)), heads=20, kv_heads=1, dim=64),
    AttentionCase("head of 8", ((1, 200), (9, 99)), heads=2, kv_heads=1, dim=8),
    AttentionCase("head of 72", ((1, 200), (9, 99)), heads=6, kv_heads=2, dim=72),
    AttentionCase("head of 96", ((1, 200), (9, 99)), heads=3, kv_heads=1, dim=96),
    AttentionCase("sharp", ((1, 600), (20, 90)), sharp=6.0, atol=1e-4, codes_atol=1e-2),
    AttentionCase("bfloat16 pages", ((1, 600), (20, 90)), page_dtype="bfloat16"),
    AttentionCase("bfloat16 pages, gemma", ((1, 70), (20, 90)), **GEMMA, page_dtype="bfloat16", window=33),
)
