"""A model over real pages, driven by hand: one row whose tokens are computed in any pieces."""

from __future__ import annotations

import torch

from millstream.core import registry
from millstream.models.blocks.attention import StepContext, step_context
from millstream.models.decoder import Decoder
from millstream.ops.layout import BatchLayout, GroupLayout

BLOCK = 16


class Row:
    """One sequence with its own blocks, handed out in a scattered order so that none are neighbours by chance."""

    def __init__(self, decoder: Decoder, num_tokens: int, backend: str = "torch-ref", kv: str = "plain") -> None:
        self.decoder = decoder
        self.num_blocks = -(-num_tokens // BLOCK)
        pages = registry.make("kv", kv, device=True)
        groups = decoder.spec.groups
        self.pages = {g.name: pages.allocate(g, 2 * self.num_blocks + 1, BLOCK, decoder.dtype) for g in groups}
        self.backends = {g.name: registry.make("attention", backend) for g in groups}
        self.blocks = torch.arange(self.num_blocks, dtype=torch.int32) * 2 + 1
        self.blocks = self.blocks.flip(0)

    def step(self, start: int, stop: int) -> StepContext:
        """The context of computing the positions [start, stop)."""
        positions = torch.arange(start, stop)
        slots = self.blocks.long()[positions // BLOCK] * BLOCK + positions % BLOCK
        group = GroupLayout(slots, self.blocks[None])
        layout = BatchLayout(
            torch.tensor([0, stop - start], dtype=torch.int32),
            positions,
            torch.tensor([stop], dtype=torch.int32),
            dict.fromkeys(self.pages, group),
            BLOCK,
            stop - start,
            stop,
        )
        return step_context(layout, self.pages, self.backends)

    @torch.inference_mode()
    def run(self, tokens: list[int], start: int, stop: int) -> torch.Tensor:
        """Logits (stop - start, V) of those positions; what is before them must have been run."""
        hidden = self.decoder.forward(torch.tensor(tokens[start:stop]), self.step(start, stop))
        return self.decoder.head(hidden)
