"""A batch of decodes laid out by hand and computed as often as one likes: what a step costs, and nothing but the step.

Rows begin with trunks, stretches of text that they hold in the same blocks, as the prefix index and forks leave them;
behind these each has a text of its own. Keys and values are computed by the model, once. A step over them writes the
same places again and so gives the same tokens each time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from millstream.core.cache import ALL_LEVELS
from millstream.core.plan import Extend, Holding, SampleAsk, Settled, StepPlan
from millstream.core.request import SamplingParams
from millstream.models.blocks.attention import step_context
from millstream.runner.layout import LayoutBuilder
from millstream.runner.torch_runner import TorchRunner

# Tokens of a step while texts are computed for the first time.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Trunk:
    """Tokens that are computed and held: `blocks` of the first `length`, whole ones."""

    blocks: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """The next token of some rows."""

    extends: tuple[Extend, ...]

    def first(self, count: int) -> Step:
        return Step(self.extends[:count])


class Replay:
    """Steps over `runner`, in its blocks from `first_block` on, which nobody else uses. One cache group."""

    def __init__(self, runner: TorchRunner, first_block: int = 0) -> None:
        self._runner = runner
        capacity = runner.capacity()
        (self._group, self.num_blocks), *others = capacity.blocks.items()
        if others:
            raise ValueError(f"one cache group, got {', '.join(capacity.blocks)}")
        self.block_size = capacity.block_size
        self._used, self._seqs, self._plans = first_block, 0, 0

    def trunk(self, tokens: Sequence[int], parent: Trunk | None = None) -> Trunk:
        """Computes `tokens`, a multiple of the block size, behind `parent`."""
        if len(tokens) % self.block_size:
            raise ValueError(f"{len(tokens)} tokens are not whole blocks of {self.block_size}")
        before = parent or Trunk()
        trunk = self._claim(before, tokens, len(tokens) // self.block_size)
        for at in range(0, len(tokens), _CHUNK):
            self._run((self._extend(trunk, before.length + at, tokens[at : at + _CHUNK]),), ALL_LEVELS)
        return trunk

    def step(self, rows: Sequence[tuple[Trunk, Sequence[int]]]) -> Step:
        """A step that gives each row, (its trunk, its own tokens), the token after its last one, greedily."""
        extends, waiting = [], []
        for parent, own in rows:
            row = self._claim(parent, own[:-1], -(-len(own) // self.block_size))
            if len(own) > 1:
                waiting.append(self._extend(row, parent.length, own[:-1]))
            if sum(len(extend.tokens) for extend in waiting) > _CHUNK:
                self._run(tuple(waiting), ALL_LEVELS)
                waiting.clear()
            start = parent.length + len(own) - 1
            ask = SampleAsk(SamplingParams(temperature=0.0), 0, 0, start + 1, start + 1)
            extends.append(self._extend(row, start, own[-1:], ask))
        if waiting:
            self._run(tuple(waiting), ALL_LEVELS)
        return Step(tuple(extends))

    def tokens(self, step: Step, prefix_levels: int) -> list[int]:
        """The tokens that a step gives."""
        settled = self._run(step.extends, prefix_levels)
        return [row.tokens[0] for row in settled]

    def step_s(self, step: Step, prefix_levels: int, count: int) -> float:
        """Seconds of a step, the mean of `count`."""
        start = time.perf_counter()
        for _ in range(count):
            self._run(step.extends, prefix_levels)
        return (time.perf_counter() - start) / count

    def attention(self, step: Step, prefix_levels: int) -> tuple[float, torch.Tensor]:
        """Seconds of attention alone in all layers for drawn queries; outputs and lse (layers, rows, H, D + 1)."""
        runner = self._runner
        layout = LayoutBuilder(list(runner.pages), self.block_size).build(step.extends, prefix_levels)
        layers = [layer.spec.mixer for layer in runner.decoder.layers]
        q = torch.randn(
            (layout.num_tokens, layers[0].heads, layers[0].head_dim), generator=torch.Generator().manual_seed(0)
        )
        start = time.perf_counter()
        group = step_context(layout, runner.pages, runner.backends).groups[self._group]
        seen = [
            group.backend.run(q, group.pages, place, group.state, spec.scale, spec.window, spec.softcap)
            for place, spec in enumerate(layers)
        ]
        seconds = time.perf_counter() - start
        return seconds, torch.stack([torch.cat((out, lse[..., None]), -1) for out, lse in seen])

    def _claim(self, parent: Trunk, tokens: Sequence[int], num_blocks: int) -> Trunk:
        if self._used + num_blocks > self.num_blocks:
            raise ValueError(f"{self.num_blocks} blocks are too few")
        blocks = (*parent.blocks, *range(self._used, self._used + num_blocks))
        self._used += num_blocks
        return Trunk(blocks, (*parent.tokens, *tokens))

    def _extend(self, row: Trunk, start: int, tokens: Sequence[int], ask: SampleAsk | None = None) -> Extend:
        self._seqs += 1
        held = Holding(self._group, row.blocks, start + len(tokens))
        return Extend(self._seqs, start, tuple(tokens), (held,), sample=ask, decode="autoregressive")

    def _run(self, extends: tuple[Extend, ...], prefix_levels: int) -> list[Settled]:
        self._runner.prefix_levels = prefix_levels
        self._plans += 1
        settled = self._runner.collect(self._runner.launch(StepPlan(self._plans, extends))).settled
        for row in settled:
            if row.fault is not None:
                raise RuntimeError(row.fault)
        return list(settled)
