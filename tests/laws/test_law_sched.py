"""What every policy and every meter keeps to, alone and through a whole run of the engine."""

from __future__ import annotations

import copy

import pytest
from harness import Bench, Paced

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.errors import RequestFault
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish, Sequence, Stamps, State
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import Budget, LoadView, Verdict
from millstream.sched.stack import PolicyStack

POLICIES = registry.names("policy")
# They read true lengths, so they run only where these are told.
ORACLES = ("srpt",)
METERS = registry.names("meter")
BLOCKS = "kv-blocks"


def sequence(seq_id, num_prompt=6, made=0, arrival=0.0, hint=None, state=State.WAITING, oracle=None):
    prompt = [(seq_id * 7 + i) % 50 for i in range(num_prompt)]
    request = Request(
        seq_id,
        (Tokens(tuple(prompt)),),
        SamplingParams(max_tokens=10),
        hints=Hints(expected_output_len=hint, oracle=oracle),
        priority=seq_id % 3,
        tenant="ab"[seq_id % 2],
    )
    seq = Sequence(
        id=seq_id,
        request=request,
        index=0,
        tokens=[*prompt, *range(made)],
        num_prompt=num_prompt,
        max_len=num_prompt + 10,
        seed=0,
        stop_ids=frozenset(),
        decode=Choice("autoregressive"),
        method=registry.make("decode", "autoregressive"),
        stamps=Stamps(arrival, first_token=1.0 if made else None),
    )
    seq.state = state
    return seq


def crowd(oracle=None):
    running = [sequence(i, made=i + 1, arrival=float(i), state=State.RUNNING, oracle=oracle) for i in range(3)]
    for seq in running:
        seq.computed = len(seq.tokens) - 1
    waiting = [
        sequence(i, 3 + i, arrival=2.0 if i < 6 else 5.0, hint=None if i % 2 else i, oracle=oracle) for i in range(3, 9)
    ]
    return running, waiting


def view_of(running, waiting, now=10.0):
    return LoadView(now, 20, 32, [seq.view for seq in waiting], [seq.view for seq in running], cost=Paced())


# -- policies


@pytest.mark.parametrize("name", POLICIES)
def test_a_rank_is_a_tuple_of_numbers_that_is_stable_and_pure(name):
    policy = registry.make("policy", name)
    running, waiting = crowd(oracle=7 if name in ORACLES else None)
    view = view_of(running, waiting)
    seqs = [*running, *waiting]
    first = [policy.rank(seq.view, view) for seq in seqs]
    assert all(isinstance(rank, tuple) and all(isinstance(part, int | float) for part in rank) for rank in first)
    assert all(part == part for rank in first for part in rank), "NaN has no order"
    assert [policy.rank(seq.view, view) for seq in reversed(seqs)] == first[::-1]
    again = registry.make("policy", name)
    assert [again.rank(seq.view, view) for seq in seqs] == first


@pytest.mark.parametrize("name", [name for name in POLICIES if registry.get("policy", name).constant_rank])
def test_a_rank_that_is_said_to_be_constant_is(name):
    policy = registry.make("policy", name)
    running, waiting = crowd(oracle=7 if name in ORACLES else None)
    seqs = [*running, *waiting]
    view = view_of(running, waiting)
    first = [policy.rank(seq.view, view) for seq in seqs]
    for seq in seqs:
        seq.tokens += [1, 2, 3]
        seq.computed = len(seq.tokens) - 1
        seq.preemptions += 1
        seq.state = State.WAITING if seq.state is State.RUNNING else State.RUNNING
        seq.stamps.admitted = seq.stamps.first_token = 3.0
    later = view_of(waiting, running, now=1e6)
    assert [policy.rank(seq.view, later) for seq in seqs] == first


@pytest.mark.parametrize("name", POLICIES)
def test_a_stack_over_a_policy_orders_everybody(name):
    stack = PolicyStack([registry.make("policy", name)])
    running, waiting = crowd(oracle=7 if name in ORACLES else None)
    view = view_of(running, waiting)
    ranks = [stack.rank(seq.view, view) for seq in (*running, *waiting)]
    assert len(set(ranks)) == len(ranks) and sorted(ranks) == sorted(ranks[::-1])


@pytest.mark.parametrize("name", POLICIES)
def test_verdicts_budgets_and_victims_are_what_the_protocol_says(name):
    policy = registry.make("policy", name)
    running, waiting = crowd(oracle=7 if name in ORACLES else None)
    view = view_of(running, waiting)
    budget = policy.budget(view)
    assert isinstance(budget, Budget)
    assert all(part is None or part >= 1 for part in (budget.tokens, budget.rows))
    assert all(isinstance(policy.admit(seq.view, view), Verdict) for seq in waiting)
    views = [seq.view for seq in running]
    victim = policy.victim(views, view)
    assert victim is None or victim in views
    empty = view_of([], waiting)
    assert any(policy.admit(seq.view, empty) is Verdict.ADMIT for seq in waiting), "an idle engine admits somebody"


def workload(bench, oracle=False):
    for n in range(9):
        hints = Hints(expected_output_len=[None, 2, 40][n % 3], oracle=4 + n % 4 if oracle else None)
        bench.add([n, *range(n)], 4 + n % 4, priority=n % 2, tenant="ab"[n % 2], hints=hints)
    hints = Hints(oracle=3 if oracle else None)
    bench.add([1, 2, 3], 3, params={"n": 3, "temperature": 1.0, "seed": 4}, hints=hints)


def run_and_check(bench, limit=3000):
    """To the end; the tokens are the oracle's, and no step was made in which nothing was computed or moved."""
    launched = []
    launch = bench.runner.launch
    bench.runner.launch = lambda plan: (launched.append(plan), launch(plan))[1]
    steps = bench.run(limit)
    assert all(plan.extends or plan.moves for plan in launched)
    for request in bench.requests.values():
        for index in range(request.params.n):
            assert bench.finish(request, index) is Finish.LENGTH
            assert bench.output(request, index) == bench.truth(request, index)
    bench.clean()
    return steps


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_under_a_policy_gives_everybody_their_own_tokens(name, stacked, plans):
    for num_blocks, preemption in ((60, "recompute"), (8, "recompute"), (8, "swap")):
        bench = Bench(
            policies=(name, "fcfs") if stacked else (name,),
            plans=plans,
            num_blocks=num_blocks,
            host_blocks=8,
            preemption=preemption,
        )
        workload(bench, name in ORACLES)
        run_and_check(bench)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves_beside_a_stream_of_newcomers(name):
    bench = Bench(policies=(name, "fcfs"), num_blocks=24)
    told = name in ORACLES
    patient = bench.add(range(12), 12, hints=Hints(expected_output_len=1000, oracle=12 if told else None))
    for n in range(150):
        if n < 120:
            bench.add([n % 50], 2, hints=Hints(expected_output_len=1, oracle=2 if told else None))
        bench.step()
        if bench.chunks.get((patient.id, 0)) and bench.finish(patient) is not None:
            break
    bench.run()
    assert bench.output(patient) == bench.truth(patient)
    assert bench.chunks[(patient.id, 0)][-1].metrics.ttft_s < 130


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_reads_no_true_length_that_nobody_gave(name):
    policy = registry.make("policy", name)
    running, waiting = crowd()
    view = view_of(running, waiting)
    with pytest.raises(RequestFault, match="oracle"):
        _ = waiting[0].view.hints.oracle_output_len
    try:
        plain = [policy.rank(seq.view, view) for seq in (*running, *waiting)]
    except RequestFault:
        return  # it says what it needs: an oracle arm
    told, told_waiting = crowd(oracle=3)
    view = view_of(told, told_waiting)
    assert [policy.rank(seq.view, view) for seq in (*told, *told_waiting)] == plain


# -- meters


def meter_setup(name, num_blocks=12):
    groups = (CacheGroup("full"),)
    ledger = Ledger(groups, 4, {"full": num_blocks}, registry.make("prefix", "none"))
    running, waiting = crowd(oracle=5)
    for seq in running:
        ledger.grow(seq, 0, 0.0)
    meter = registry.make("meter", name, ledger=ledger)
    return meter, ledger, running, waiting


@pytest.mark.parametrize("name", METERS)
def test_fit_cuts_and_never_gives_and_changes_nothing(name):
    meter, ledger, running, waiting = meter_setup(name)
    meter.begin(view_of(running, waiting))
    for seq in (*waiting, *running):
        for n in (0, 1, 2, seq.left):
            before = copy.deepcopy((ledger.stats(), ledger.free()))
            got = meter.fit(seq, n)
            assert isinstance(got, int) and 0 <= got <= n
            assert meter.fit(seq, n) == got
            assert (ledger.stats(), ledger.free()) == before
    assert isinstance(meter.relieved_by_preemption, bool)


@pytest.mark.parametrize("name", METERS)
def test_what_was_taken_only_leaves_less(name):
    meter, ledger, _, waiting = meter_setup(name, 40)
    meter.begin(view_of([], waiting))
    first, second = waiting[-1], waiting[-2]
    before = meter.fit(second, second.left)
    n = meter.fit(first, first.left)
    if n:
        meter.take(first, n)
        ledger.grow(first, n, 0.0)
        first.in_flight += n
    assert meter.fit(second, second.left) <= before
    ledger.release(first, 0.0, remember=False)
    ledger.check()


def composition(name):
    """Meters that make a whole engine out of one: what it needs, and an account of the blocks."""
    own = registry.get("meter", name)
    keeps_blocks = own.relieved_by_preemption
    return (name,) if keeps_blocks else (name, BLOCKS)


@pytest.mark.parametrize("name", METERS)
def test_who_is_closed_gives_newcomers_nothing(name):
    meter, ledger, _, waiting = meter_setup(name, 400)
    meter.begin(view_of([], waiting))
    was = False
    for seq in waiting:
        closed = meter.closed()
        assert closed >= was, "it has opened again"
        was, n = closed, meter.fit(seq, seq.left)
        assert not (closed and n), "it is closed, and gives something"
        if n:
            meter.take(seq, n)
            ledger.grow(seq, n, 0.0)
            seq.in_flight += n


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("name", METERS)
def test_a_run_under_a_meter_gives_everybody_their_own_tokens(name, plans):
    needs = [need.partition(":")[2] for need in registry.card("meter", name).needs if need.startswith("policy:")]
    prefixes = [need.partition(":")[2] for need in registry.card("meter", name).needs if need.startswith("prefix:")]
    for num_blocks in (60, 9):
        bench = Bench(
            meters=composition(name),
            policies=(*needs, "fcfs"),
            prefix=(prefixes or ["radix"])[0],
            plans=plans,
            num_blocks=num_blocks,
        )
        for n in range(9):
            bench.add([n, *range(n)], 4 + n % 4)
        run_and_check(bench)
