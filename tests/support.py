"""Engines over small models with any cache, budget and composition, and how their outputs are held to the oracle.

A `Bench` is a whole engine over torch, stepped by hand. What it says is held to the naive generator by teacher forcing:
one naive forward pass over the prompt and the output gives, for each output token, the logprobs that it had to be
chosen from. So every token of an output is checked, also those behind a near tie.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

import oracle
from millstream.config.schema import CacheConfig, EngineConfig, SchedConfig
from millstream.core import registry
from millstream.core.client import Chunk
from millstream.core.clock import VirtualClock
from millstream.core.plan import TokenLogprobs
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish, State
from millstream.engine.assemble import build_engine
from millstream.engine.engine import GUIDES
from millstream.engine.resolve import Resolved
from millstream.models.decoder import Decoder, build
from millstream.models.families.protocol import find_family
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import quantize
from millstream.models.spec import ModelSpec
from millstream.ops import table
from millstream.ops.attention.protocol import AttentionAsk, choose
from millstream.ops.ref.random import uniform
from millstream.runner.torch_runner import TorchRunner
from millstream.text.vocabulary import Vocabulary

VOCAB = 199
CONTEXT = 512

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
TINY: dict[str, dict[str, Any]] = {
    "tiny-llama": {**_SIZES, "model_type": "llama"},
    # Two cache groups; the window is shorter than most prompts of the suites.
    "tiny-gemma": {
        **_SIZES,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 24,
        # Tied, random weights say the last token again and nothing else.
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
    "tiny-moe": {**_SIZES, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
}


@functools.cache
def tiny_tensors(name: str) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """A spec and random weights, wide enough that a wrong key or position shows in the first digit."""
    config = TINY[name]
    spec = find_family(config).spec(config)
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for tensor in spec.tensors():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in tensor.name:
            offset = spec.final_norm.offset
            tensors[tensor.name] = noise * 0.2 + (1.0 - offset)
        else:
            tensors[tensor.name] = noise * (1.0 if "embed" in tensor.name else 0.15)
    return spec, tensors


@functools.cache
def tiny_decoder(name: str, ops: str, weights: str = "dense") -> Decoder:
    spec, tensors = tiny_tensors(name)
    if weights == "blocks":
        spec, tensors = quantize(spec, tensors, Recipe.plain("block4"))
    with table.use("ref" if ops == "ref" else "auto"):
        return build(spec, tensors)


def token_text(token: int) -> bytes:
    """The digits, a blank, and numbers with a blank behind them: any text of these can be written."""
    return b"%d" % token if token < 10 else b" " if token == 10 else b"%d " % token


def prompt(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Random token ids, the same for the same seed."""
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Heard:
    """Everything that one request's sink got."""

    request: Request
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)

    def take(self, chunk: Chunk) -> None:
        self.chunks.setdefault(chunk.index, []).append(chunk)

    def tokens(self, index: int = 0) -> list[int]:
        chunks = self.chunks[index]
        if chunks[-1].replaced is not None:
            return list(chunks[-1].replaced)
        return [token for chunk in chunks for token in chunk.tokens]

    def logprobs(self, index: int = 0) -> list[TokenLogprobs]:
        return [entry for chunk in self.chunks[index] for entry in chunk.logprobs]

    def prompt_logprobs(self) -> list[TokenLogprobs | None]:
        return next(list(c.prompt_logprobs) for c in self.chunks[0] if c.prompt_logprobs is not None)

    def last(self, index: int = 0) -> Chunk:
        return self.chunks[index][-1]

    def finish(self, index: int = 0) -> Finish | None:
        return self.last(index).finish if index in self.chunks else None


class Bench:
    """An engine over `decoder`; `blocks` of `block_size` in each cache group. `budget` None: no step is cut."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        ops: str = "ref",
        attention: str = "torch-ref",
        block_size: int = 16,
        blocks: int = 64,
        host_blocks: int = 0,
        budget: int | None = None,
        max_rows: int = 64,
        plans: int = 1,
        preemption: str = "recompute",
        prefix: str = "radix",
        policy: str = "fcfs",
        kv: str = "plain",
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        spec = decoder.spec
        form = registry.make("kv", kv, device=True)
        pages, backends = {}, {}
        known: dict[str, Any] = {}
        for group in spec.groups:
            held = form.allocate(group, blocks, block_size, decoder.dtype, host_blocks)
            mixer = next(layer.mixer for layer in spec.layers if layer.mixer.group == group.name)
            ask = AttentionAsk(
                "cpu",
                str(decoder.dtype).removeprefix("torch."),
                str(held.dtype).removeprefix("torch."),
                held.layout,
                mixer.heads,
                mixer.kv_heads,
                mixer.head_dim,
                block_size,
                mixer.window,
                mixer.softcap,
            )
            with table.use("ref" if ops == "ref" else "auto"):
                choice = choose(ask, attention)
            pages[group.name], backends[group.name] = held, known.setdefault(choice.name, choice.backend)
        self.attention = sorted(known)
        self._ops = ops
        self.runner = TorchRunner(decoder, pages, backends, plans)
        meters = (
            Choice("splitfuse", {"budget": budget or 1 << 20}),
            Choice("seats", {"max_rows": max_rows}),
            Choice("kv-blocks"),
        )
        counts = {group.name: blocks for group in spec.groups}
        config = EngineConfig(
            cache=CacheConfig(prefix=Choice(prefix)),
            sched=SchedConfig(policies=(Choice(policy),), preemption=preemption),
            seed=1,
        )
        context = min(spec.context, blocks * block_size)
        resolved = Resolved(
            config, context, block_size, counts, dict.fromkeys(counts, host_blocks), plans, 1, meters, ()
        )
        tokenizer = SimpleNamespace(stop_ids=stop_ids, vocabulary=Vocabulary(spec.vocab_size, token_text))
        self.clock = VirtualClock()
        self.events: list[Any] = []
        self.engine = build_engine(
            self.runner, spec, tokenizer, config, resolved, self.clock, [self.events.append], spec.name
        )
        self.ledger = self.engine.scheduler.ledger
        self.heard: list[Heard] = []

    def add(self, ids: Sequence[int], params: SamplingParams, **given: Any) -> Heard:
        request = Request(len(self.heard), (Tokens(tuple(ids)),), params, arrival=self.clock.now(), **given)
        heard = Heard(request)
        self.heard.append(heard)
        self.engine.submit(request, heard.take)
        return heard

    def step(self) -> bool:
        self.clock.advance(1.0)
        # Ops that were not resolved when the model was built are resolved in a step.
        with table.use("ref" if self._ops == "ref" else "auto"):
            done = self.engine.step()
        self.ledger.check()
        return done

    def run(self, limit: int = 5000, between: Callable[[int], None] | None = None) -> int:
        """Steps until nothing is left. A stall or a livelock fails. `between(step)` runs before each step."""
        steps = 0
        while self.engine.busy:
            if between is not None:
                between(steps)
            if not self.step() and self.engine.busy:
                assert any(GUIDES in seq.gates for seq in self.engine.scheduler.live.values()), (
                    "there is work, and none of it can be launched"
                )
                time.sleep(0.001)  # a grammar is being built on another thread
            steps += 1
            assert steps < limit, "no end in sight"
        return steps

    def close(self) -> None:
        """Nothing may be left behind: every block is free once the prefix index forgets."""
        assert not self.engine.busy and not self.engine.scheduler.live
        self.ledger.index.clear()
        self.ledger.check()
        assert self.ledger.free() == self.ledger.total()
        self.engine.close()

    @property
    def preemptions(self) -> int:
        return sum(chunks[-1].metrics.preemptions for heard in self.heard for chunks in heard.chunks.values())

    @property
    def swapped(self) -> bool:
        """Whether a sequence lies on the host now."""
        return any(seq.state is State.SWAPPED for seq in self.engine.scheduler.live.values())


# -- the oracle's judgement


def sampling_race(row: torch.Tensor, params: SamplingParams, index: int, position: int) -> torch.Tensor:
    """Logprob and Gumbel noise of every token, for plain temperature sampling: the largest wins."""
    numbers = torch.tensor([uniform(params.seed, index, position, token) for token in range(row.shape[0])]).double()
    return torch.log_softmax(row.double() / params.temperature, -1) - torch.log(-torch.log(numbers))


def judge(
    decoder: Decoder,
    heard: Heard,
    atol: float,
    near_tie: float,
    index: int = 0,
    count: int | None = None,
) -> None:
    """Holds one output, its logprobs and its alternatives to the naive generator.

    Greedy rows take the oracle's best token unless its two best are within `near_tie`. Sampled ones (temperature only)
    take the winner of the race with their counter-based noise, to `near_tie` of it. Raises AssertionError.
    """
    request = heard.request
    params, ids, tokens = request.params, request.prompt_ids, heard.tokens(index)
    assert heard.finish(index) in (Finish.LENGTH, Finish.STOP), heard.last(index).error
    if count is not None:
        assert len(tokens) == count
    rows = oracle.logprobs(decoder, [*ids, *tokens])
    told = heard.logprobs(index)
    if params.logprobs is not None:
        assert len(told) == len(tokens)
    for at, token in enumerate(tokens):
        row = rows[len(ids) + at - 1]
        where = f"request {request.id}.{index}, output token {at}"
        if params.greedy:
            best = torch.topk(row, 2)
            gap = float(best.values[0] - best.values[1])
            assert token == int(best.indices[0]) or (gap <= near_tie and token in best.indices.tolist()), (
                f"{where}: {token}, the oracle has {best.indices[0]} by {gap:.2e}"
            )
        else:
            race = sampling_race(row, params, index, len(ids) + at)
            behind = float(race.max() - race[token])
            assert behind <= near_tie, f"{where}: {token} is {behind:.2e} behind the winner {int(race.argmax())}"
        if told:
            close(told[at], row, token, atol, near_tie, where)


def close(entry: TokenLogprobs, row: torch.Tensor, token: int, atol: float, near_tie: float, where: str) -> None:
    """One position's record against the oracle's row of logprobs."""
    assert entry.chosen.token == token, where
    off = abs(entry.chosen.logprob - float(row[token]))
    assert off <= atol, f"{where}: logprob {entry.chosen.logprob}, the oracle has {float(row[token])} (off {off:.2e})"
    surely, possibly = int((row > row[token] + near_tie).sum()), int((row >= row[token] - near_tie).sum())
    assert surely < entry.chosen.rank <= possibly, f"{where}: rank {entry.chosen.rank} of {surely + 1}..{possibly}"
    for rank, other in enumerate(entry.top, 1):
        assert other.rank == rank and abs(other.logprob - float(row[other.token])) <= atol, where
    best = torch.topk(row, len(entry.top)).values if entry.top else ()
    for other, value in zip(entry.top, best, strict=True):
        assert abs(other.logprob - float(value)) <= atol, where
