"""The engine under requests, aborts and steps in any order, over blocks that are too few: every survivor's tokens
are those that it would have had alone, and nothing is left behind."""

from __future__ import annotations

import random

import pytest
from harness import EOS, VOCAB, Bench
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from millstream.core.cache import CacheGroup, Keep
from millstream.core.registry import Choice
from millstream.core.request import Kind
from millstream.core.sequence import Finish

GROUPS = (
    (CacheGroup("full"),),
    (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 5)),
    (CacheGroup("full"), CacheGroup("a", Keep.WINDOW, 1), CacheGroup("b", Keep.WINDOW, 9)),
)
POLICIES = (("fcfs",), ("shortest-remaining",), ("prefill-first", "fcfs"))
COMPOSITIONS = (
    (Choice("splitfuse", {"budget": 1}), "seats", "kv-blocks"),
    (Choice("splitfuse", {"budget": 7}), Choice("seats", {"max_rows": 2}), "kv-blocks"),
    (Choice("splitfuse", {"budget": 16}), "seats", Choice("kv-blocks", {"watermark": 0.2})),
    ("orca", "seats", "kv-blocks"),
)
STEP_BOUND = 4000


def until_stop(tokens, stop):
    """The tokens up to the first stop token, that one included."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1]
    return tokens


def verify(bench: Bench, aborted: set[int]) -> None:
    for request in bench.requests.values():
        for index in range(request.params.n if request.kind is Kind.GENERATE else 1):
            chunks = bench.chunks[(request.id, index)]
            last = chunks[-1]
            assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            if request.kind is Kind.SCORE:
                if last.finish is not Finish.ABORT:
                    assert last.finish is Finish.STOP
                    scores = last.prompt_logprobs
                    assert scores[0] is None
                    assert [entry.chosen.token for entry in scores[1:]] == request.prompt_ids[1:]
                continue
            got = bench.output(request, index)
            stop = set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else {EOS})
            want = until_stop(bench.truth(request, index), stop)
            if request.id in aborted and last.finish is Finish.ABORT:
                assert got == want[: len(got)]
                continue
            assert got == want
            assert last.finish is (Finish.STOP if got[-1] in stop else Finish.LENGTH)
            assert last.usage.prompt_tokens == request.num_prompt and last.usage.output_tokens == len(got)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        plans=st.sampled_from([1, 2]),
        groups=st.sampled_from(GROUPS),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        tokens=st.integers(34, 90),
        host_blocks=st.sampled_from([0, 3, 40]),
        preemption=st.sampled_from(["recompute", "swap"]),
        prefix=st.sampled_from(["none", "radix"]),
        policies=st.sampled_from(POLICIES),
        meters=st.sampled_from(COMPOSITIONS),
    )
    def build(self, tokens, block_size, **given):
        self.aborted: set[int] = set()
        self.bench = Bench(
            block_size=block_size, num_blocks=-(-tokens // block_size), stop_ids=frozenset({EOS}), **given
        )

    @rule(
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=8),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 3]),
        temperature=st.sampled_from([0.0, 1.0]),
        stop=st.sets(st.integers(0, VOCAB - 1), max_size=6),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        hint=st.sampled_from([None, 1, 9]),
    )
    def submit(self, shared, own, max_tokens, prompt_logprobs, **params):
        params.pop("hint")
        params["stop_token_ids"] = tuple(sorted(params.pop("stop")))
        prompt = [*range(shared), *own]
        self.bench.add(prompt, max_tokens, params={**params, "seed": 3, "prompt_logprobs": prompt_logprobs})

    @rule(length=st.integers(1, 30))
    def score(self, length):
        self.bench.add([*range(length)], 1, kind=Kind.SCORE, params={"prompt_logprobs": 1})

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            if self.bench.engine.busy:
                assert self.bench.step() or not self.bench.engine.busy

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick):
        if self.bench.requests:
            victim = sorted(self.bench.requests)[pick % len(self.bench.requests)]
            self.aborted.add(victim)
            self.bench.engine.abort(victim)

    @invariant()
    def the_ledger_adds_up(self):
        if hasattr(self, "bench"):
            self.bench.ledger.check()

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.run(STEP_BOUND)
            verify(self.bench, self.aborted)
            self.bench.clean()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def soak(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 5])
    bench = Bench(
        plans=rng.choice([1, 2]),
        groups=rng.choice(GROUPS),
        block_size=block_size,
        num_blocks=-(-rng.randint(26, 70) // block_size),
        host_blocks=rng.choice([0, 2, 30]),
        preemption=rng.choice(["recompute", "swap"]),
        prefix=rng.choice(["none", "radix"]),
        policies=rng.choice(POLICIES),
        meters=rng.choice(COMPOSITIONS),
        stop_ids=frozenset({EOS}),
    )
    aborted = set()
    for _ in range(rng.randint(2, 14)):
        prompt = [*range(rng.randint(0, 10)), *(rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 6)))]
        params = {"n": rng.choice([1, 1, 2, 4]), "temperature": rng.choice([0.0, 0.7]), "seed": rng.randrange(9)}
        bench.add(prompt, rng.randint(1, 10), params=params)
        for _ in range(rng.randint(0, 4)):
            bench.engine.busy and bench.step()
        if rng.random() < 0.2:
            aborted.add(rng.randrange(len(bench.requests)))
            bench.engine.abort(max(aborted))
    bench.run(STEP_BOUND)
    verify(bench, aborted)
    bench.clean()


# 1793: the only step token is kept for a decode that lacks a block, and the blocks are with the prompt that lacks it.
@pytest.mark.parametrize("seed", [*range(40), 1793])
def test_a_random_crowd_over_few_blocks_ends_with_everybody_s_own_tokens(seed):
    soak(seed)


@pytest.mark.long
def test_random_crowds_for_a_long_time():
    for seed in range(100, 3100):
        soak(seed)
