"""Any mix of requests, arrivals, aborts and cache sizes gives each request what it gets cold and alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millstream.core.request import SamplingParams
from millstream.core.sequence import Finish


@dataclass(frozen=True)
class Ask:
    """`shared` tokens of a text that all requests begin with, then `own` ones; comes and goes at these steps."""

    shared: int
    own: int
    seed: int
    max_tokens: int
    temperature: float
    n: int
    arrives: int
    aborted: int | None
    stop: bool


@dataclass(frozen=True)
class Machine:
    """How the engine is built. `spare` blocks beyond those that the largest request needs."""

    spare: int
    budget: int
    max_rows: int
    plans: int
    preemption: str
    host_blocks: int
    prefix: str
    policy: str


asks = st.builds(
    Ask,
    shared=st.integers(0, 40),
    own=st.integers(1, 30),
    seed=st.integers(0, 5),
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    n=st.sampled_from([1, 1, 1, 3]),
    arrives=st.integers(0, 20),
    aborted=st.one_of(st.none(), st.none(), st.integers(0, 30)),
    stop=st.booleans(),
)
machines = st.builds(
    Machine,
    spare=st.sampled_from([0, 1, 3, 40]),
    budget=st.integers(1, 60),
    max_rows=st.sampled_from([1, 2, 5, 64]),
    plans=st.sampled_from([1, 2]),
    preemption=st.sampled_from(["recompute", "swap"]),
    host_blocks=st.sampled_from([0, 2, 20]),
    prefix=st.sampled_from(["radix", "none"]),
    policy=st.sampled_from(["fcfs", "shortest-remaining", "prefill-first"]),
)


def mix(subject, machine: Machine, mixed: list[Ask]) -> None:
    size = subject.block_size
    text = subject.prompt(40, 1)
    most = max(ask.shared + ask.own + ask.max_tokens for ask in mixed)
    bench = subject.bench(
        blocks=-(-most // size) + 1 + machine.spare,
        budget=machine.budget,
        max_rows=machine.max_rows,
        plans=machine.plans,
        preemption=machine.preemption,
        host_blocks=machine.host_blocks,
        prefix=machine.prefix,
        policy=machine.policy,
    )
    waiting = sorted(enumerate(mixed), key=lambda pair: pair[1].arrives)
    running, step = [], 0
    while waiting or bench.engine.busy:
        while waiting and (waiting[0][1].arrives <= step or not bench.engine.busy):
            place, ask = waiting.pop(0)
            ids = [*text[: ask.shared], *subject.prompt(ask.own, 10 + ask.seed)]
            # A stop token that a sampled text may or may not meet.
            stop = {"stop_token_ids": [ids[-1], 3, 4, 5, 6, 7]} if ask.stop else {}
            params = SamplingParams(
                temperature=ask.temperature, seed=place, n=ask.n, max_tokens=ask.max_tokens, logprobs=1, **stop
            )
            running.append((ask, step, bench.add(ids, params)))
        for ask, since, heard in running:
            if ask.aborted is not None and step - since == ask.aborted:
                bench.engine.abort(heard.request.id)
        assert bench.step() or not bench.engine.busy
        step += 1
        assert step < 4000, "no end in sight"
    for ask, _, heard in running:
        assert len(heard.chunks) == ask.n
        ends = {heard.finish(index) for index in heard.chunks}
        assert ends <= {Finish.STOP, Finish.LENGTH} | ({Finish.ABORT} if ask.aborted is not None else set())
        if Finish.ABORT not in ends:
            subject.judge(heard)
    bench.close()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(machine=machines, mixed=st.lists(asks, min_size=1, max_size=7))
def test_any_mix_gives_each_request_what_it_gets_alone(subject, machine, mixed):
    mix(subject, machine, mixed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(machine=machines, mixed=st.lists(asks, min_size=1, max_size=9))
def test_any_mix_of_many_gives_each_request_what_it_gets_alone(subject, machine, mixed):
    mix(subject, machine, mixed)
