"""Beam search over the null runner: the naive search's outputs, whatever happens to the beams on the way."""

from __future__ import annotations

import itertools
import random

import pytest
from beam_oracle import search
from harness import VOCAB, Bench

from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError
from millstream.core.registry import Choice
from millstream.core.sequence import Finish

PROMPT = [5, 9, 2, 7, 7, 1, 30]


def add_beam(bench: Bench, prompt=PROMPT, max_tokens=6, params=None, **options):
    return bench.add(prompt, max_tokens, decode=Choice("beam", options), params=params or {})


def check(bench: Bench, request, width, max_tokens, **given):
    want = search(request.prompt_ids, width, max_tokens, VOCAB, **given)
    got = [bench.output(request, index) for index in range(width)]
    assert got == [output for _, output in want]
    last = [bench.chunks[(request.id, index)][-1] for index in range(width)]
    assert [chunk.cumulative_logprob for chunk in last] == pytest.approx([score for score, _ in want])


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_the_beams_are_those_of_the_naive_search(width, plans):
    bench = Bench(plans=plans, num_blocks=64)
    request = add_beam(bench, width=width)
    bench.run()
    check(bench, request, width, 6)
    assert all(bench.finish(request, index) is Finish.LENGTH for index in range(width))
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_stop_tokens_end_hypotheses_and_not_the_search(plans, early, penalty):
    stop = frozenset(range(0, VOCAB, 4))
    bench = Bench(plans=plans, num_blocks=64, stop_ids=stop)
    request = add_beam(bench, max_tokens=9, width=3, early_stopping=early, length_penalty=penalty)
    bench.run()
    check(bench, request, 3, 9, stop=stop, early_stopping=early, length_penalty=penalty)
    bench.clean()


def test_min_tokens_keeps_hypotheses_from_ending_early():
    stop = frozenset(range(0, VOCAB, 3))
    bench = Bench(num_blocks=64, stop_ids=stop)
    request = add_beam(bench, max_tokens=8, params={"min_tokens": 4}, width=3)
    bench.run()
    check(bench, request, 3, 8, stop=stop, min_tokens=4)
    assert all(len(bench.output(request, index)) > 4 for index in range(3))


def test_more_stop_tokens_than_beams_still_leave_every_beam_its_candidates():
    stop = frozenset(range(10, VOCAB))
    bench = Bench(num_blocks=64, stop_ids=stop)
    request = add_beam(bench, max_tokens=6, params={"min_tokens": 3}, width=3)
    bench.run()
    check(bench, request, 3, 6, stop=stop, min_tokens=3)


CONFIGS = list(itertools.product([1, 2], ["recompute", "swap"], ["none", "radix"], [5, 7, 9, 16]))


@pytest.mark.parametrize(("plans", "preemption", "prefix", "num_blocks"), CONFIGS)
def test_beams_that_lose_their_blocks_come_to_the_same_outputs(plans, preemption, prefix, num_blocks):
    bench = Bench(
        plans=plans, preemption=preemption, prefix=prefix, num_blocks=num_blocks, block_size=4, host_blocks=12
    )
    requests = [add_beam(bench, [*PROMPT, salt], 8, width=3) for salt in range(2)]
    plain = bench.add([3, 1, 4], 10)
    bench.run(3000)
    for request in requests:
        check(bench, request, 3, 8)
    assert bench.output(plain) == bench.truth(plain)
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_beams_over_a_sliding_window(plans):
    groups = (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 6))
    bench = Bench(plans=plans, groups=groups, num_blocks=20)
    request = add_beam(bench, max_tokens=14, width=3)
    bench.run()
    check(bench, request, 3, 14)
    bench.clean()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("plans", [1, 2])
def test_a_beam_search_may_be_aborted_at_any_step(plans, preemption):
    for step in itertools.count():
        bench = Bench(plans=plans, preemption=preemption, num_blocks=9, host_blocks=6)
        gone, stays = add_beam(bench, width=3), add_beam(bench, [4, 4, 8], 7, width=2)
        over = False
        for _ in range(step):
            over = not bench.engine.busy
            if not over:
                bench.step()
        bench.engine.abort(gone.id)
        bench.run(2000)
        check(bench, stays, 2, 7)
        bench.clean()
        if over:
            break
    assert step > 6


def test_random_beam_searches_beside_plain_requests():
    rng = random.Random(11)
    for _ in range(60):
        stop = frozenset(rng.sample(range(VOCAB), rng.choice([0, 2, 12])))
        bench = Bench(
            plans=rng.choice([1, 2]),
            preemption=rng.choice(["recompute", "swap"]),
            prefix=rng.choice(["none", "radix"]),
            block_size=rng.choice([1, 2, 4]),
            num_blocks=rng.choice([30, 45, 80]),
            host_blocks=rng.choice([0, 5, 40]),
            stop_ids=stop,
        )
        asked = []
        for _ in range(rng.randint(1, 4)):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
            count, width = rng.randint(1, 8), rng.randint(1, 4)
            asked.append((add_beam(bench, prompt, count, width=width), width, count))
        plain = [bench.add([1, 2, rng.randrange(VOCAB)], 6, params={"ignore_eos": True}) for _ in range(3)]
        bench.run(4000)
        for request, width, count in asked:
            check(bench, request, width, count, stop=stop)
        for request in plain:
            assert bench.output(request) == bench.truth(request)
        bench.clean()


def test_a_width_out_of_bounds_is_refused_before_anything_runs():
    bench = Bench()
    with pytest.raises(ConfigError, match=r"width must be .*from 1 to 64"):
        add_beam(bench, width=0)
    assert not bench.engine.busy
