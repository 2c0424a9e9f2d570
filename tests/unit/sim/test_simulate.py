"""The simulator: the production engine in virtual time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_bench import SHARING, profile, rows, simulate, traffic

from millstream.core import registry
from millstream.core.errors import BadRequest
from millstream.core.registry import Choice
from millstream.core.request import Slo
from millstream.core.shape import StepShape
from millstream.sched.scheduler import Scheduler
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Failure
from millstream.sim.traces import Row

SWAP = EngineSetting(preemption="swap", host_blocks=200)


def test_one_request_takes_what_the_formula_says() -> None:
    result = simulate(traffic([Row(0.0, 100, 3)]))
    cost = profile().step_cost()
    prefill = cost.seconds(StepShape(1, 100, 100 * 101 // 2, 0, 0, 0, 1))
    decodes = [cost.seconds(StepShape(0, 0, 0, 1, keys, 0, 1)) for keys in (101, 102)]
    (one,) = result.served
    assert one.times_s == pytest.approx([prefill, prefill + decodes[0], prefill + sum(decodes)])
    assert (one.finish, result.steps, one.preemptions) == ("stop", 3, 0)
    assert result.busy_s[0] == pytest.approx(prefill + sum(decodes))


@pytest.mark.parametrize("policies", [("fcfs",), ("vtc",), ("shortest-remaining",), ("priority", "fcfs")])
@pytest.mark.parametrize("setting", [EngineSetting(), SWAP])
def test_everybody_gets_all_tokens_in_order(policies, setting) -> None:
    setting = EngineSetting(
        policies=tuple(map(Choice, policies)), preemption=setting.preemption, host_blocks=setting.host_blocks
    )
    found = traffic(rows(), tenant="a")
    result = simulate(found, setting=setting, oracle=True, profiles=[profile(blocks=60)])
    assert len(result.served) == len(found)
    for one in result.served:
        assert len(one.times_s) == one.call.num_output and one.times_s == sorted(one.times_s)
        assert one.times_s[0] > one.arrival_s == one.call.at_s and one.finish == "stop" and not one.error
    engine = result.replicas[0].engine
    assert not engine.busy and engine.scheduler.ledger.free() == engine.scheduler.ledger.total()
    engine.scheduler.ledger.check()
    if policies == ("fcfs",):
        assert sum(one.preemptions for one in result.served) > 0, "the cache is so small that some give way"


def test_a_run_is_a_function_of_its_inputs() -> None:
    found = traffic(rows(), burstiness=1.0, rate=15.0)
    noisy = EngineSetting(noise=0.2)
    prints = [simulate(found, setting=noisy, seed=seed, replicas=2).fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


def test_shared_prefixes_are_those_of_the_radix_tree() -> None:
    blocks = [Row(i * 10.0, 1200, 2, (7, 8, 100 + i)) for i in range(3)]
    result = simulate(traffic(blocks), profiles=[profile(blocks=1000)])
    cached = [one.cached for one in result.served]
    assert cached[0] == 0 and all(1000 <= one <= 1024 for one in cached[1:])
    apart = simulate(traffic([Row(i * 10.0, 1200, 2) for i in range(3)]), profiles=[profile(blocks=1000)])
    assert [one.cached for one in apart.served] == [0, 0, 0]
    assert result.duration_s < apart.duration_s


def test_a_session_waits_for_its_answers_and_thinks() -> None:
    session = [Row(0.0, 100 * turn, 5, (), "", "s", think) for turn, think in ((1, 0.0), (2, 2.0), (3, 1.0))]
    result = simulate(traffic(session))
    first, second, third = result.served
    assert second.arrival_s == pytest.approx(first.ended_s + 2.0)
    assert third.arrival_s == pytest.approx(second.ended_s + 1.0)
    assert first.cached == 0 < second.cached < third.cached, "each begins as the one before did"


def test_work_is_spread_and_a_lost_replica_costs_time_and_no_tokens() -> None:
    found = traffic(rows(80))
    both = simulate(found, replicas=2, router=registry.make("router", "round-robin"))
    assert {one.replica for one in both.served} == {0, 1}
    assert both.duration_s < simulate(found).duration_s
    lost = simulate(found, replicas=2, router=registry.make("router", "least-work"), failures=[Failure(0, 1.0, 2.0)])
    assert any(one.retries for one in lost.served)
    assert all(len(one.times_s) == one.call.num_output for one in lost.served)
    alone = simulate(found, failures=[Failure(0, 1.0, 2.0)])
    assert all(len(one.times_s) == one.call.num_output for one in alone.served)
    assert not any(1.0 < at < 3.0 for one in alone.served for at in one.times_s), "nobody computes while it is down"


def test_replicas_of_unlike_kinds_get_work_by_their_speed() -> None:
    slow = profile(step_tokens=64, state={**profile().state, "coefficients": {**profile().state["coefficients"]}})
    result = simulate(traffic(rows(200, 0.02)), profiles=[profile(), slow])
    counts = [sum(one.replica == place for one in result.served) for place in (0, 1)]
    assert counts[0] > counts[1] > 0


def test_deadlines_end_requests() -> None:
    result = simulate(traffic(rows(100, 0.001)), slo=Slo(deadline_s=1.0))
    late = [one for one in result.served if one.finish == "timeout"]
    assert late and all(one.ended_s - one.arrival_s == pytest.approx(1.0, abs=0.2) for one in late)


def test_true_lengths_are_for_the_oracle_alone() -> None:
    found = traffic(rows(10))
    exact = (Choice("seats"), Choice("contiguous", {"reserve": "oracle"}))
    setting = EngineSetting(meters=exact, prefix=Choice("none"))
    blind = simulate(found, setting=setting)
    assert all("no oracle" in one.error for one in blind.served)
    told = simulate(found, setting=setting, oracle=True)
    assert all(not one.error and len(one.times_s) == one.call.num_output for one in told.served)


def test_what_no_replica_can_take_is_told_and_harms_nobody() -> None:
    found = traffic([Row(0.0, 100, 3), Row(0.1, 1000, 3), Row(0.2, 100, 3)])
    result = simulate(found, profiles=[profile(blocks=20)])
    assert [bool(one.error) for one in result.served] == [False, True, False]
    with pytest.raises(BadRequest, match="replicas"):
        simulate(found, profiles=[], replicas=0)
    with pytest.raises(BadRequest, match="failure"):
        simulate(found, failures=[Failure(3, 0.0, 1.0)])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from(["recompute", "swap"]),
)
def test_any_traffic_is_served_whole(plan, replicas, plans, preemption) -> None:
    setting = EngineSetting(plans=plans, preemption=preemption, host_blocks=50)
    found = traffic(sorted((Row(*one) for one in plan), key=lambda row: row.at_s))
    result = simulate(found, setting=setting, profiles=[profile(blocks=40)] * replicas)
    assert all(len(one.times_s) == one.call.num_output for one in result.served)
    for replica in result.replicas:
        replica.engine.scheduler.ledger.check()
        assert replica.engine.scheduler.ledger.free() == replica.engine.scheduler.ledger.total()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 4), st.integers(1, 400), st.integers(1, 120), st.sampled_from(["", "s", "t"])),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from(registry.names("policy")),
    st.integers(1, 3),
    st.sampled_from([40, 60, 400]),
    st.sampled_from(["recompute", "swap"]),
    st.booleans(),
)
def test_leaps_change_nothing(plan, policy, replicas, blocks, preemption, fails) -> None:
    made = [
        Row(at, prompt, output, (), "ab"[i % 2], session, 0.1) for i, (at, prompt, output, session) in enumerate(plan)
    ]
    found = traffic(sorted(made, key=lambda row: row.at_s))
    setting = EngineSetting(policies=(Choice(policy), Choice("fcfs")), preemption=preemption, host_blocks=60)
    failures = [Failure(0, 1.0, 0.5)] if fails else []
    runs = [
        simulate(
            found,
            setting=setting,
            profiles=[profile(blocks=blocks)] * replicas,
            leaps=leaps,
            oracle=True,
            failures=failures,
        )
        for leaps in (False, True)
    ]
    slow, fast = runs
    assert fast.fingerprint == slow.fingerprint and fast.steps == slow.steps and fast.busy_s == slow.busy_s
    for one, other in zip(fast.replicas, slow.replicas, strict=True):
        one.engine.scheduler.ledger.check()
        assert one.engine.scheduler.ledger.stats() == other.engine.scheduler.ledger.stats()


def test_rows_behind_one_prefix_take_less_time_with_and_without_leaps() -> None:
    """Those that come after the first find its blocks, and what they decode costs less than if each had its own."""
    alone = {**SHARING, "coefficients": {**SHARING["coefficients"], "shared_keys": 1e-5}}

    def run(state: object, leaps: bool, shared: bool) -> object:
        made = [Row(0.5 * one, 1100 + one, 150, (1, 2, 3) if shared else ()) for one in range(3)]
        return simulate(traffic(made), profiles=[profile(cost="piecewise", state=state)], leaps=leaps)

    fast, slow = run(SHARING, True, True), run(SHARING, False, True)
    assert fast.fingerprint == slow.fingerprint and fast.steps == slow.steps
    assert sum(fast.busy_s) == pytest.approx(sum(slow.busy_s))
    # A tenth is paid for what the later two share, in most of their 300 steps: whenever an earlier one is still there.
    saved = sum(run(alone, True, True).busy_s) - sum(fast.busy_s)
    assert 150 < saved / (1088 * 9e-6) <= 300
    assert run(SHARING, True, False).fingerprint == run(alone, True, False).fingerprint


def test_there_are_leaps(monkeypatch) -> None:
    planned = []
    plan = Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda self, now: planned.append(now) or plan(self, now))
    result = simulate(traffic([Row(0.0, 50, 100), Row(0.0, 60, 100)]))
    assert len(planned) < 10 < result.steps


def test_it_starts_without_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit/sim')\n"
        "from sim_bench import rows, simulate, traffic\n"
        "assert simulate(traffic(rows(5))).steps\n"
        "from millstream.cli.main import main\n"
        "assert 'torch' not in sys.modules and 'millstream.runner.compose' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
