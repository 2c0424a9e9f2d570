"""Deficits and prefixes: who goes first, what is charged, and what an idle tenant may not save up."""

from __future__ import annotations

import random

import pytest
from harness import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core import registry
from millstream.core.registry import Choice


def engine(quantum, *, seats=2, num_blocks=100, budget=64, prefix="radix"):
    bench = Bench(
        policies=(Choice("dlpm", {"quantum": quantum}),),
        meters=(Choice("splitfuse", {"budget": budget}), Choice("seats", {"max_rows": seats}), "kv-blocks"),
        num_blocks=num_blocks,
        prefix=prefix,
    )
    return bench, bench.engine.scheduler.policy.policies[0]


def test_of_one_tenants_requests_the_one_whose_prompt_is_held_goes_first():
    bench, _ = engine(1000.0, seats=1)
    shared = [7] * 16
    bench.add(shared, 2, tenant="a")
    bench.run()
    cold = bench.add([9] * 16, 2, tenant="a")
    warm = bench.add([*shared, 3], 2, tenant="a")
    bench.run()
    assert bench.first_token_at(warm) < bench.first_token_at(cold)


def test_what_is_held_is_free_and_what_is_not_is_charged_with_every_token_of_the_output():
    bench, policy = engine(1000.0)
    bench.add([7] * 16, 3, tenant="a")
    bench.run()
    first = 1000.0 - policy._idle["a"].deficit
    assert first == 16 + 2 * 3
    bench.add([*[7] * 16, 1, 2], 3, tenant="a")
    bench.run()
    assert 1000.0 - policy._idle["a"].deficit - first == 2 + 2 * 3


def test_a_tenant_with_a_warm_prefix_does_not_keep_another_out_for_longer_than_its_deficit():
    bench, policy = engine(40.0, seats=1)
    bench.add([7] * 16, 1, tenant="warm")
    bench.run()
    for number in range(40):
        bench.add([*[7] * 16, number], 4, tenant="warm")
    other = bench.add([9] * 16, 4, tenant="cold")
    bench.run()
    ends = [bench.chunks[(n, 0)][-1].metrics.ttft_s for n in bench.requests if n and n != other.id]
    assert sum(end < bench.chunks[(other.id, 0)][-1].metrics.ttft_s for end in ends) <= 10
    assert policy.refills > 0


def test_by_the_longest_prefix_alone_it_would():
    bench = Bench(policies=("longest-prefix",), meters=(Choice("seats", {"max_rows": 1}), "kv-blocks"), num_blocks=100)
    bench.add([7] * 16, 1, tenant="warm")
    bench.run()
    for number in range(12):
        bench.add([*[7] * 16, number], 4, tenant="warm")
    other = bench.add([9] * 16, 4, tenant="cold")
    bench.run()
    assert bench.first_token_at(other) == max(bench.first_token_at(one) for one in bench.requests.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([8.0, 40.0, 200.0]), st.integers(1, 4))
def test_no_deficit_is_ever_above_the_quantum_or_below_what_one_may_be_charged(seed, quantum, seats):
    draw = random.Random(seed)
    bench, policy = engine(quantum, seats=seats, num_blocks=16, budget=16)
    lowest = 20 + 2 * 16 * 4
    for _ in range(120):
        # A flooder sends a hundred times what the others do, who come and go.
        tenant = "flood" if draw.random() < 0.97 else draw.choice("abc")
        if len(bench.engine._groups) < 40:
            bench.add([draw.randrange(4)] * draw.randint(1, 20), draw.randint(1, 8), tenant=tenant)
        bench.step()
        for one in (*policy._tenants.values(), *policy._idle.values()):
            assert -lowest <= one.deficit <= quantum
    bench.run()
    bench.clean()
    assert not policy._waiting and not policy._able and not policy._again


def test_an_idle_tenant_that_owed_gets_what_was_handed_out_meanwhile_and_no_more():
    bench, policy = engine(10.0, seats=1)
    bench.add([1] * 20, 10, tenant="debtor")
    bench.run()
    assert policy._idle["debtor"].deficit == 10 - 20 - 20
    for number in range(30):
        bench.add([number] * 10, 5, tenant="busy")
    bench.run()
    assert policy.refills >= 30
    bench.add([2], 1, tenant="debtor")
    assert 0 < policy._tenants["debtor"].deficit <= 10
    bench.run()


@pytest.mark.parametrize("bad", [{"quantum": 0}, {"quantum": -1.0}, {"input_weight": 0}, {"remember": 0}])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(Exception, match=next(iter(bad))):
        registry.make("policy", Choice("dlpm", bad))
