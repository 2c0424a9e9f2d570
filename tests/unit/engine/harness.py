"""A whole engine over the null runner: the deciding stack in milliseconds, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.client import Chunk
from millstream.core.clock import VirtualClock
from millstream.core.plan import SampleAsk
from millstream.core.registry import Choice
from millstream.core.request import Limits, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.core.shape import StepShape
from millstream.engine.engine import Engine
from millstream.memory.ledger import Ledger
from millstream.runner.null_runner import NullRunner, expected
from millstream.sched.protocol import StepCost
from millstream.sched.scheduler import Scheduler

VOCAB = 50


class Paced(StepCost):
    """Steps take a tenth of a second, and a hundredth for each token."""

    def seconds(self, shape: StepShape) -> float:
        return 0.1 + 0.01 * shape.tokens if shape.tokens else 0.0


EOS = 49


class Bench:
    """An engine, the chunks it gave, and what each request must come to."""

    def __init__(
        self,
        *,
        groups: Sequence[CacheGroup] = (CacheGroup("full"),),
        block_size: int = 4,
        num_blocks: int = 32,
        host_blocks: int = 0,
        plans: int = 1,
        policies: Sequence[str | Choice] = ("fcfs",),
        meters: Sequence[str | Choice] = (Choice("splitfuse", {"budget": 8}), "seats", "kv-blocks"),
        prefix: str = "radix",
        preemption: str = "recompute",
        context: int = 256,
        stop_ids: frozenset[int] = frozenset(),
        observers: Any = lambda request: [],
        guides: Sequence[Any] = (),
        fail: dict[int, str] | None = None,
        lengths: Any = None,
    ) -> None:
        self.clock = VirtualClock()
        self.runner = NullRunner(VOCAB, groups, block_size, num_blocks, host_blocks, plans, fail=fail)
        capacity = self.runner.capacity()
        self.ledger = Ledger(groups, block_size, capacity.blocks, registry.make("prefix", prefix), capacity.host_blocks)
        scheduler = Scheduler(
            self.ledger,
            [registry.make("policy", policy) for policy in policies],
            [registry.make("meter", meter, ledger=self.ledger) for meter in meters],
            preemption,
            cost=Paced(),
        )
        self.engine = Engine(
            scheduler,
            self.runner,
            self.clock,
            Limits(VOCAB, context, num_blocks * block_size),
            stop_ids=stop_ids,
            observers=observers,
            guides=guides,
            seed=1,
            lengths=lengths,
        )
        self.chunks: dict[tuple[int, int], list[Chunk]] = {}
        self.requests: dict[int, Request] = {}

    def add(self, prompt: Sequence[int], max_tokens: int = 8, **given: Any) -> Request:
        params = {"temperature": 0.0, "max_tokens": max_tokens, **given.pop("params", {})}
        request = Request(
            len(self.requests), (Tokens(tuple(prompt)),), SamplingParams(**params), arrival=self.clock.now(), **given
        )
        self.requests[request.id] = request

        def sink(chunk: Chunk) -> None:
            self.chunks.setdefault((chunk.request_id, chunk.index), []).append(chunk)

        self.engine.submit(request, sink)
        return request

    def step(self) -> bool:
        self.clock.advance(1.0)
        done = self.engine.step()
        self.ledger.check()
        return done

    def run(self, limit: int = 20_000) -> int:
        """Steps until nothing is left; a stall or a livelock fails. Returns the number of steps."""
        steps = 0
        while self.engine.busy:
            assert self.step() or not self.engine.busy, "there is work, and none of it can be launched"
            steps += 1
            assert steps < limit, "no end in sight"
        return steps

    def output(self, request: Request, index: int = 0) -> list[int]:
        chunks = self.chunks[(request.id, index)]
        if chunks[-1].replaced is not None:
            return list(chunks[-1].replaced)
        return [token for chunk in chunks for token in chunk.tokens]

    def first_token_at(self, request: Request, index: int = 0) -> float:
        """The time of the step that gave its first token."""
        metrics = self.chunks[(request.id, index)][-1].metrics
        assert metrics is not None and metrics.ttft_s is not None
        return request.arrival + metrics.ttft_s

    def finish(self, request: Request, index: int = 0) -> Finish | None:
        return self.chunks[(request.id, index)][-1].finish

    def truth(self, request: Request, index: int = 0) -> list[int]:
        """The output of this request alone, whatever else runs."""
        count = request.params.max_tokens or 0
        seed = request.params.seed or 0
        ask = SampleAsk(request.params, seed, index, 0, request.num_prompt)
        return expected(request.prompt_ids, ask, count, VOCAB)

    def clean(self) -> None:
        """Nothing may be left behind: every block is free once the prefix index forgets."""
        assert not self.engine.scheduler.live and not self.engine.busy
        self.ledger.index.clear()
        self.ledger.check()
        assert self.ledger.free() == self.ledger.total()
