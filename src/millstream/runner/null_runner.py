"""A runner without a model: it answers with a hash of what the plan says, read through the block tables.

Every slot remembers its position, its token and a rolling hash of the prefix that was written before it. A sampled
token is a hash of the whole chain found in the sequence's own blocks. So when the deciding stack shares, copies, swaps
or frees a block wrongly, the text changes, and tests see it within milliseconds, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millstream.core.cache import CacheGroup, Keep
from millstream.core.plan import (
    FROM_PREVIOUS,
    NO_BLOCK,
    Extend,
    Holding,
    Logprob,
    SampleAsk,
    Settled,
    StepPlan,
    StepResult,
    Tier,
    TokenLogprobs,
)
from millstream.runner.protocol import Capacity

_MASK = (1 << 64) - 1
_START = 0x9E3779B97F4A7C15

_Slot = tuple[int, int, int]  # position, token, rolling hash


class NullRunner:
    """`step_s` is how long a step claims to take; `fail` maps a token to a fault of the row that computes it."""

    def __init__(
        self,
        vocab_size: int,
        groups: Sequence[CacheGroup] = (CacheGroup("full"),),
        block_size: int = 4,
        num_blocks: int = 64,
        host_blocks: int = 0,
        plans: int = 1,
        step_s: float = 0.0,
        fail: Mapping[int, str] | None = None,
    ) -> None:
        self.vocab_size, self.groups, self.block_size = vocab_size, tuple(groups), block_size
        self.plans, self.step_s, self.fail = plans, step_s, dict(fail or {})
        self._num_blocks, self._host_blocks = num_blocks, host_blocks
        self._slots: dict[tuple[str, Tier, int], dict[int, _Slot]] = {}
        self._last: dict[int, int] = {}
        self._broken: set[int] = set()  # a row of theirs failed: what later plans in flight read is not there
        self._launched: list[StepPlan] = []
        self.steps = 0

    def capacity(self) -> Capacity:
        return Capacity(
            self.plans,
            self.block_size,
            {group.name: self._num_blocks for group in self.groups},
            {group.name: self._host_blocks for group in self.groups},
        )

    def launch(self, plan: StepPlan) -> StepPlan:
        assert len(self._launched) < self.plans, "more plans in flight than the runner takes"
        self._launched.append(plan)
        return plan

    def collect(self, ticket: StepPlan) -> StepResult:
        plan = self._launched.pop(0)
        assert plan is ticket, "plans are collected in launch order"
        self.steps += 1
        for seq in plan.forgotten:
            self._last.pop(seq, None)
            self._broken.discard(seq)
        for move in plan.moves:
            source = self._slots.get((move.group, move.source_tier, move.source), {})
            self._slots[(move.group, move.target_tier, move.target)] = dict(source)
        return StepResult(plan.id, self.step_s, tuple(self._settle(extend) for extend in plan.extends))

    def close(self) -> None:
        self._slots.clear()

    def _settle(self, extend: Extend) -> Settled:
        if extend.seq in self._broken:
            return Settled(extend.seq, 0, fault="an earlier plan failed for this sequence")
        tokens = [self._last[extend.seq] if token == FROM_PREVIOUS else token for token in extend.tokens]
        for token in tokens:
            if token in self.fail:
                self._broken.add(extend.seq)
                return Settled(extend.seq, 0, fault=self.fail[token])
        # The first group keeps everything: what the others hold is checked against its chain.
        before = chain = None
        for group, holding in zip(self.groups, extend.holdings, strict=True):
            before, chain = self._write(group, holding, extend.start, tokens, before)
        assert chain is not None
        settled: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if extend.sample is not None:
            settled, logprobs = self._sample(extend.sample, chain)
            self._last[extend.seq] = settled[0]
        scores: tuple[TokenLogprobs, ...] = ()
        if extend.score is not None:
            scores = tuple(TokenLogprobs(Logprob(token, -float(token % 7), 1)) for token in extend.score.targets)
        return Settled(extend.seq, len(tokens), settled, logprobs, scores)

    def _write(
        self, group: CacheGroup, holding: Holding, start: int, tokens: list[int], before: int | None
    ) -> tuple[int, int]:
        assert holding.group == group.name and holding.tier is Tier.DEVICE
        assert holding.length >= start + len(tokens), "a token without a slot"
        first = 0
        if group.keep is Keep.WINDOW:
            assert group.window is not None
            first = max(0, start - group.window + 1)
        chain = _START if first == 0 else None
        for position in range(first, start):
            slot = self._read(holding, position)
            assert slot is not None, f"{group.name}: position {position} is not held"
            held, token, known = slot
            assert held == position, f"{group.name}: slot of position {position} holds {held}"
            assert chain is None or known == mix(chain, token), f"{group.name}: {position} is of another prefix"
            chain = known
        chain = before if chain is None else chain
        assert chain is not None and before in (None, chain), f"{group.name}: holds another prefix"
        running = chain
        for position, token in enumerate(tokens, start):
            running = mix(running, token)
            block = holding.blocks[position // self.block_size]
            assert block != NO_BLOCK, f"{group.name}: no block for position {position}"
            self._slots.setdefault((group.name, Tier.DEVICE, block), {})[position % self.block_size] = (
                position,
                token,
                running,
            )
        return chain, running

    def _read(self, holding: Holding, position: int) -> _Slot | None:
        block = holding.blocks[position // self.block_size]
        return self._slots.get((holding.group, Tier.DEVICE, block), {}).get(position % self.block_size)

    def _sample(self, ask: SampleAsk, chain: int) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        token = choose(ask, chain, self.vocab_size)
        if ask.top_logprobs is None:
            return (token,), ()
        ranked = candidates(ask, chain, self.vocab_size)[: max(1, ask.top_logprobs)]
        top = tuple(Logprob(t, -0.5 * rank, rank) for rank, t in enumerate(ranked, start=1))
        own = Logprob(token, -0.5 * (ranked.index(token) + 1), ranked.index(token) + 1)
        return (token,), (TokenLogprobs(own, top[: ask.top_logprobs]),)


def mix(state: int, value: int) -> int:
    """One step of the rolling hash."""
    state = ((state ^ (value + 0x517CC1B7)) * 0xBF58476D1CE4E5B9) & _MASK
    return state ^ (state >> 29)


def prefix_hash(tokens: Sequence[int]) -> int:
    state = _START
    for token in tokens:
        state = mix(state, token)
    return state


def candidates(ask: SampleAsk, chain: int, vocab_size: int) -> list[int]:
    """The tokens that may follow, the likeliest first: a fixed shuffle by the prefix and the sample's own key."""
    key = mix(chain, 0 if ask.params.greedy else ask.seed + ask.index)
    return sorted((token for token in range(vocab_size) if ask.may(token)), key=lambda token: mix(key, token))


def choose(ask: SampleAsk, chain: int, vocab_size: int) -> int:
    return candidates(ask, chain, vocab_size)[0]


def expected(prompt: Sequence[int], ask: SampleAsk, count: int, vocab_size: int) -> list[int]:
    """What a sequence of `count` tokens must come to, whatever shares the batch: the oracle of the deciding stack."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(choose(ask, prefix_hash(tokens), vocab_size))
    return tokens[len(prompt) :]
