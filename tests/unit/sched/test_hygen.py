"""Online requests, offline work, and steps of a bounded time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from harness import Bench, Paced

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.events import Stepped
from millstream.core.registry import Choice
from millstream.core.shape import StepShape
from millstream.sched.protocol import Budget, LoadView
from millstream.sched.scheduler import Scheduler


def engine(step_s=0.3, *, num_blocks=64, seats=16, preemption="recompute", policy=(), **options):
    bench = Bench(
        policies=(Choice("hygen", options), *policy, "fcfs"),
        meters=(
            Choice("splitfuse", {"budget": 64}),
            Choice("latency-budget", {"step_s": step_s}),
            Choice("seats", {"max_rows": seats}),
            "kv-blocks",
        ),
        num_blocks=num_blocks,
        host_blocks=16,
        preemption=preemption,
        block_size=16,
    )
    bench.steps = []
    bench.engine.listeners.append(lambda event: bench.steps.append(event) if isinstance(event, Stepped) else None)
    return bench


def test_a_step_takes_no_longer_than_it_may_and_is_full_while_there_is_work():
    bench = engine(0.3)
    for number in range(12):
        bench.add([number] * 30, 6, priority=number % 2)
    bench.run()
    took = [Paced().seconds(StepShape(1, step.tokens)) for step in bench.steps]
    assert max(took) <= 0.3 + 1e-9
    full = [step.tokens for step in bench.steps if step.waiting > 4]
    assert full and min(full) >= 19
    for request in bench.requests.values():
        assert bench.output(request) == bench.truth(request)
    bench.clean()


def test_a_full_step_asks_nobody_else_for_how_long_it_would_take(monkeypatch):
    asked, seconds = [], Paced.seconds
    monkeypatch.setattr(Paced, "seconds", lambda cost, shape: asked.append(shape) or seconds(cost, shape))

    def predictions(waiting):
        bench = engine(0.3)
        for number in range(waiting):
            bench.add([number % 40] * 30, 6, priority=1)
        asked.clear()
        bench.step()
        return len(asked)

    assert 0 < predictions(100) == predictions(10)


def test_online_requests_come_first_and_offline_ones_fill_what_is_left():
    bench = engine(0.3)
    offline = [bench.add([number] * 30, 6, priority=1) for number in range(8)]
    for _ in range(3):
        bench.step()
    online = bench.add([40] * 15, 4)
    bench.step()
    # Its whole prompt is in the first step after it came, whatever offline work was under way.
    assert bench.steps[-1].prompt_tokens >= 15 and len(bench.chunks[(online.id, 0)]) == 1
    bench.run()
    assert bench.chunks[(online.id, 0)][-1].metrics.ttft_s <= 2
    assert all(bench.output(one) == bench.truth(one) for one in offline)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_online_request_takes_the_place_of_offline_work_whose_text_stays_the_same(preemption):
    bench = engine(1.0, num_blocks=8, seats=2, preemption=preemption)
    offline = [bench.add([number] * 20, 20, priority=1) for number in range(2)]
    for _ in range(4):
        bench.step()
    online = bench.add([40] * 40, 5)
    bench.run()
    assert bench.chunks[(online.id, 0)][-1].metrics.ttft_s <= 2
    assert sum(bench.chunks[(one.id, 0)][-1].metrics.preemptions for one in offline) >= 1
    assert all(bench.output(one) == bench.truth(one) for one in (*offline, online))
    bench.clean()


def prompts():
    """Two families whose members come in turn: 128 tokens that each shares, 16 of its own."""
    return [[family] * 128 + [number] * 16 for number in range(6) for family in (1, 2)]


def hits(order):
    bench = engine(10.0, num_blocks=12, seats=1, order=order)
    for prompt in prompts():
        bench.add(prompt, 2, priority=1)
    bench.run()
    return sum(chunks[-1].usage.cached_tokens for chunks in bench.chunks.values())


def test_those_that_share_a_prefix_follow_each_other_and_find_it():
    assert hits("prefix") > hits("fcfs")


def test_of_offline_work_the_oldest_gets_its_turn_whatever_the_others_share():
    bench = engine(10.0, num_blocks=64, seats=1, age_share=0.25)
    bench.add([1] * 128, 1, priority=1)
    bench.step()
    old = bench.add([9] * 128, 1, priority=1)
    for number in range(40):
        bench.add([1] * 128 + [number], 1, priority=1)
    bench.run()
    before = [n for n in bench.requests if bench.first_token_at(bench.requests[n]) < bench.first_token_at(old)]
    assert len(before) <= 6


def test_an_engine_that_knows_no_step_times_is_refused_with_what_to_do():
    bench = engine()
    with pytest.raises(ConfigError, match=r"LatencyBudget must know how long steps take.*calibrate"):
        Scheduler(bench.ledger, [registry.make("policy", "fcfs")], bench.engine.scheduler.meters)


@pytest.mark.parametrize(
    ("point", "name", "bad"),
    [
        ("policy", "hygen", {"age_share": 0}),
        ("policy", "hygen", {"order": "random"}),
        ("meter", "latency-budget", {"step_s": 0}),
        ("meter", "latency-budget", {"least": 0}),
        ("policy", "nexus", {"threshold": 0}),
        ("policy", "nexus", {"decode_slack": 1.0}),
        ("policy", "nexus", {"least": 100, "most": 50}),
    ],
)
def test_options_that_make_no_sense_are_refused(point, name, bad):
    given = {"ledger": None} if point == "meter" else {}
    with pytest.raises(Exception, match=next(iter(bad))):
        registry.make(point, Choice(name, bad), **given)


def split(used, times=1, **options):
    """What nexus gives prompts of a step beside 8 decodes, where a share of the blocks is in use."""
    policy = registry.make("policy", Choice("nexus", {"least": 4, "most": 256, **options}))
    running = [Sequence_(left=1, next_start=100) for _ in range(8)]
    for _ in range(times):
        view = LoadView(0.0, round(100 * (1 - used)), 100, [Sequence_()], running, cost=Paced())
        budget = policy.budget(view)
    return budget.tokens - 8, policy


@dataclass
class Sequence_:
    """As much of a sequence as is looked at."""

    left: int = 50
    next_start: int = 0
    gated: bool = False


def test_while_the_cache_has_room_prompts_get_what_slows_decodes_by_the_slack():
    # 8 decodes take 0.18 s; twice that leaves 18 tokens of prompts.
    tokens, _ = split(0.1, times=6, decode_slack=2.0)
    assert 9 <= tokens <= 18
    assert split(0.1, times=6, decode_slack=4.0)[0] > tokens


def test_above_the_threshold_prompts_get_as_little_as_keeps_their_rate():
    # 256 tokens take 2.66 s, 96 a second; a third of that rate needs 6 of them beside 8 decodes.
    tokens, _ = split(0.9, times=8, prompt_slack=3.0)
    assert 6 <= tokens <= 16
    assert split(0.1, times=8, decode_slack=9.0)[0] > 2 * tokens


def test_a_split_stays_while_a_better_one_is_not_much_better():
    _, policy = split(0.1, times=50, decode_slack=2.0)
    assert policy.switches <= 4
    assert split(0.1, times=50, decode_slack=2.0, buffer=1e9)[1].switches == 0


def test_a_step_of_one_kind_is_left_alone():
    policy = registry.make("policy", "nexus")
    assert policy.budget(LoadView(0.0, 9, 10, [], [Sequence_(left=1)], cost=Paced())) == Budget()
    assert policy.budget(LoadView(0.0, 9, 10, [Sequence_()], [], cost=Paced())) == Budget()


def test_a_prompt_is_shortest_first_unless_it_has_waited():
    bench = Bench(policies=(Choice("nexus", {"gamma": 3.0}),), meters=(Choice("seats", {"max_rows": 1}), "kv-blocks"))
    bench.add([1] * 4, 20)
    bench.step()
    long = bench.add([2] * 30, 2)
    short = bench.add([3] * 10, 2)
    for _ in range(11):
        bench.step()
    late = bench.add([4] * 5, 2)
    bench.run()
    assert bench.first_token_at(short) < bench.first_token_at(long) < bench.first_token_at(late)
