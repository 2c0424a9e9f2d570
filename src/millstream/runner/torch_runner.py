"""A plan carried out with torch: one ragged forward pass a step.

Shapes: T tokens of the step, C width, R rows that sample, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from millstream.core import registry
from millstream.core.cache import ALL_LEVELS
from millstream.core.plan import (
    FROM_PREVIOUS,
    Extend,
    Logprob,
    SampleAsk,
    Settled,
    StepPlan,
    StepResult,
    Tier,
    TokenLogprobs,
    in_bulk,
)
from millstream.decode.protocol import NOT_FINITE
from millstream.formats.kv.protocol import KvPages
from millstream.models.blocks.attention import step_context
from millstream.models.decoder import Decoder
from millstream.ops.attention.protocol import AttentionBackend
from millstream.runner.layout import LayoutBuilder
from millstream.runner.protocol import Capacity

# Logits of prompt positions are made in slices: at 262,144 tokens of vocabulary one position is a megabyte.
_SCORE_BYTES = 64 << 20


@dataclass(slots=True)
class TorchTicket:
    """A launched plan: its result when it runs on the runner's own thread, else the plan itself until collected."""

    plan: StepPlan
    future: Future[StepResult] | None


@dataclass(slots=True)
class Counters:
    """What the runner did since it was made."""

    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    moves: int = 0
    busy_s: float = 0.0
    sample_s: float = 0.0


@dataclass(slots=True)
class _Row:
    extend: Extend
    first: int  # its first token's place in the step
    tokens: list[int] = field(default_factory=list)


class TorchRunner:
    """Runs `decoder` over `pages`; `plans` may be 2, then plans run on a thread while the host prepares the next.

    `prefix_levels` of the tree that the rows' block tables make may be read once for all rows (`ops/layout.py`). It may
    be set between steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        pages: Mapping[str, KvPages],
        backends: Mapping[str, AttentionBackend],
        plans: int = 1,
        prefix_levels: int = ALL_LEVELS,
    ) -> None:
        self.decoder, self.pages, self.backends, self.plans = decoder, dict(pages), dict(backends), plans
        self.prefix_levels = prefix_levels
        first = next(iter(self.pages.values()))
        self._block_size = first.block_size
        self._layouts = LayoutBuilder(list(self.pages), self._block_size)
        self._last: dict[int, int] = {}
        self._methods: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(1, "millstream-runner") if plans > 1 else None
        self.counters = Counters()

    def capacity(self) -> Capacity:
        return Capacity(
            self.plans,
            self._block_size,
            {name: pages.num_blocks for name, pages in self.pages.items()},
            {name: pages.num_host_blocks for name, pages in self.pages.items()},
        )

    def launch(self, plan: StepPlan) -> TorchTicket:
        return TorchTicket(plan, self._pool.submit(self._run, plan) if self._pool else None)

    def collect(self, ticket: TorchTicket) -> StepResult:
        return self._run(ticket.plan) if ticket.future is None else ticket.future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        start = time.perf_counter()
        self.counters.steps += 1
        self.counters.tokens += plan.num_tokens
        for seq in plan.forgotten:
            self._last.pop(seq, None)
            self._layouts.forget(seq)
        for bulk in in_bulk(plan.moves):
            self.pages[bulk.group].move(bulk.sources, bulk.targets, bulk.source_tier, bulk.target_tier)
        self.counters.moves += len(plan.moves)
        settled = self._settle(plan.extends) if plan.extends else []
        seconds = time.perf_counter() - start
        self.counters.busy_s += seconds
        return StepResult(plan.id, seconds, tuple(settled))

    def _settle(self, extends: Sequence[Extend]) -> list[Settled]:
        try:
            return self._forward(extends)
        except Exception as error:
            # One bad row must not end the others: each is run alone, and what fails alone is to blame.
            if len(extends) > 1:
                return [row for extend in extends for row in self._settle([extend])]
            return [Settled(extends[0].seq, 0, fault=f"{type(error).__name__} in the forward pass: {error}")]

    def _forward(self, extends: Sequence[Extend]) -> list[Settled]:
        self.counters.forwards += 1
        rows, tokens = [], []
        for extend in extends:
            row = _Row(extend, len(tokens), list(extend.tokens))
            if row.tokens[-1] == FROM_PREVIOUS:
                row.tokens[-1] = self._last[extend.seq]
            tokens += row.tokens
            rows.append(row)
        layout = self._layouts.build(extends, self.prefix_levels)
        assert all(holding.tier is Tier.DEVICE for extend in extends for holding in extend.holdings)
        step = step_context(layout, self.pages, self.backends)
        x = self.decoder.forward(torch.from_numpy(np.array(tokens, np.int64)), step)
        start = time.perf_counter()
        sampled, logprobs, faults = self._sample(x, rows)
        settled = []
        for row in rows:
            extend = row.extend
            fault = faults.get(extend.seq)
            if fault is not None:
                settled.append(Settled(extend.seq, 0, fault=fault))
                continue
            token = sampled.get(extend.seq)
            own = logprobs.get(extend.seq)
            settled.append(
                Settled(
                    extend.seq,
                    len(row.tokens),
                    () if token is None else (token,),
                    () if own is None else (own,),
                    self._score(x, row),
                )
            )
            if token is not None:
                self._last[extend.seq] = token
        self.counters.sample_s += time.perf_counter() - start
        return settled

    def _sample(
        self, x: torch.Tensor, rows: Sequence[_Row]
    ) -> tuple[dict[int, int], dict[int, TokenLogprobs], dict[int, str]]:
        """One token for every row that asks, by sequence id: the tokens, their logprobs, what went wrong."""
        asking = [row for row in rows if row.extend.sample is not None]
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        faults: dict[int, str] = {}
        if not asking:
            return tokens, logprobs, faults
        asking = self._best(x, asking, tokens, faults)
        if not asking:
            return tokens, logprobs, faults
        last = torch.tensor([row.first + len(row.tokens) - 1 for row in asking])
        logits = self.decoder.head(x if len(asking) == x.shape[0] else x[last])
        for name in dict.fromkeys(row.extend.decode for row in asking):
            places = [place for place, row in enumerate(asking) if row.extend.decode == name]
            group = [asking[place] for place in places]
            asks = [row.extend.sample for row in group if row.extend.sample is not None]
            own = logits if len(places) == len(asking) else logits[places]
            chosen, records, bad = self._method(name).settle(own, asks, [self._history(row) for row in group])
            for row, token, record, fault in zip(group, chosen, records, bad, strict=True):
                if fault is not None:
                    faults[row.extend.seq] = fault
                    continue
                tokens[row.extend.seq] = token
                if record is not None:
                    logprobs[row.extend.seq] = record
        return tokens, logprobs, faults

    def _best(self, x: torch.Tensor, asking: list[_Row], tokens: dict[int, int], faults: dict[int, str]) -> list[_Row]:
        """Settles the rows that have no choice, or of which only the likeliest token matters; returns the others."""
        rest: list[_Row] = []
        plain: list[tuple[_Row, SampleAsk]] = []
        for row in asking:
            ask, method = row.extend.sample, self._method(row.extend.decode)
            assert ask is not None
            forced = method.forced(ask)
            if forced is not None and forced < self.decoder.spec.vocab_size:
                tokens[row.extend.seq] = forced
            elif method.only_best(ask):
                plain.append((row, ask))
            else:
                rest.append(row)
        if plain:
            best, most = self.decoder.best(x, [row.first + len(row.tokens) - 1 for row, _ in plain])
            for (row, ask), token, logit in zip(plain, best, most, strict=True):
                if not math.isfinite(logit):
                    faults[row.extend.seq] = NOT_FINITE
                elif ask.may(token):
                    tokens[row.extend.seq] = token
                else:
                    rest.append(row)
        return rest

    def _history(self, row: _Row) -> list[int]:
        ask: SampleAsk | None = row.extend.sample
        history = list(ask.history) if ask is not None else []
        if history and history[-1] == FROM_PREVIOUS:
            history[-1] = row.tokens[-1]
        return history

    def _score(self, x: torch.Tensor, row: _Row) -> tuple[TokenLogprobs, ...]:
        ask = row.extend.score
        if ask is None:
            return ()
        out: list[TokenLogprobs] = []
        width = max(1, _SCORE_BYTES // (4 * self.decoder.spec.vocab_size))
        for lo in range(0, len(ask.targets), width):
            targets = torch.tensor(ask.targets[lo : lo + width])
            hidden = x[row.first + lo : row.first + lo + len(targets)]
            logprobs = torch.log_softmax(self.decoder.head(hidden), dim=-1)
            own = logprobs.gather(1, targets[:, None])
            if not bool(torch.isfinite(own).all()):
                raise ArithmeticError(NOT_FINITE)
            ranks = ((logprobs > own).sum(dim=1) + 1).tolist()
            top = torch.topk(logprobs, ask.top, dim=-1) if ask.top else None
            for place, (target, value, rank) in enumerate(
                zip(targets.tolist(), own[:, 0].tolist(), ranks, strict=True)
            ):
                best: tuple[Logprob, ...] = ()
                if top is not None:
                    pairs = zip(top.indices[place].tolist(), top.values[place].tolist(), strict=True)
                    best = tuple(Logprob(token, logprob, nth) for nth, (token, logprob) in enumerate(pairs, start=1))
                out.append(TokenLogprobs(Logprob(target, value, rank), best))
        return tuple(out)

    def _method(self, name: str) -> Any:
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = registry.get_device("decode", name)()
        return method
