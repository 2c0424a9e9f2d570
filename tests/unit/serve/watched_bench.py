"""An engine over the null runner whose requests are watched as the server watches them, on a clock that is told."""

from __future__ import annotations

from typing import Any

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.clock import VirtualClock
from millstream.core.registry import Choice
from millstream.core.request import Limits, Request, SamplingParams, Slo, Tokens
from millstream.engine.engine import Engine
from millstream.memory.ledger import Ledger
from millstream.runner.null_runner import NullRunner
from millstream.sched.scheduler import Scheduler
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import KINDS, Call, Observatory


class WatchedBench:
    """`step` takes one second. Every call is a request of its own, with one id more than the one before it."""

    def __init__(self, num_blocks: int = 64, budget: int = 8) -> None:
        self.clock = VirtualClock(100.0)
        groups = (CacheGroup("full"),)
        runner = NullRunner(50, groups, 4, num_blocks, 0, 1)
        self.ledger = Ledger(groups, 4, runner.capacity().blocks, registry.make("prefix", "radix"), {})
        meters = [Choice("splitfuse", {"budget": budget}), "seats", "kv-blocks"]
        scheduler = Scheduler(
            self.ledger,
            [registry.make("policy", "fcfs")],
            [registry.make("meter", meter, ledger=self.ledger) for meter in meters],
        )
        self.engine = Engine(scheduler, runner, self.clock, Limits(50, 256, num_blocks * 4), seed=1)
        self.watched = Observatory(Metrics("tiny", 256, process=False), now=self.clock.now)
        self.engine.listeners.append(lambda event: self.watched.hear(event) if type(event) in KINDS else None)
        self.calls: list[Call] = []

    def begin(self, prompt: list[int], max_tokens: int, n: int = 1, tenant: str = "acme", **slo: float) -> Call:
        number = len(self.calls)
        call = self.watched.begin(f"call-{number:032x}", "chat", "/v1/chat/completions")
        call.tenant, call.model, call.n, call.max_tokens, call.slo = tenant, "tiny", n, max_tokens, Slo(**slo)
        call.inside(number)
        params = SamplingParams(n=n, temperature=0.0, max_tokens=max_tokens)
        request = Request(number, (Tokens(tuple(prompt)),), params, arrival=self.clock.now(), tenant=tenant)
        self.engine.submit(request, call.heard)
        self.calls.append(call)
        return call

    def step(self) -> None:
        self.clock.advance(1.0)
        self.engine.step()

    def run(self) -> None:
        while self.engine.busy:
            self.step()

    def finish(self) -> None:
        """Every call that has not ended is told that it went well."""
        self.run()
        self.watched.metrics.loaded(self.engine.load())
        for call in self.calls:
            call.end(200)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Name and labels (without those that all have) of every sample, and its value."""
        from prometheus_client.parser import text_string_to_metric_families

        out: dict[Any, float] = {}
        for family in text_string_to_metric_families(self.watched.metrics.text().decode()):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                out[(sample.name, tuple(sorted(labels.items())))] = sample.value
        return out
