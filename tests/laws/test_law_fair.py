"""What policies that share a machine out among tenants keep to, through whole runs of the engine.

Service is counted here from the engine's own events, with the weights of the paper: one a prompt token that was
computed for the first time, two a token of an output.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from harness import Bench

from millstream.core.events import Admitted, Emitted, Prefilled, Stepped
from millstream.core.registry import Choice
from millstream.core.sequence import Finish

QUANTUM = 16.0
FAIR = ["vtc", Choice("dlpm", {"quantum": QUANTUM})]
INPUT, OUTPUT = 1.0, 2.0


class Shared:
    """An engine under a policy, and what each tenant has got of it."""

    def __init__(self, policy, budget=8, num_blocks=64, seats=256, below="fcfs", **given):
        self.policy = policy
        policies = (policy, below) if policy != "fcfs" else ("fcfs",)
        self.bench = Bench(
            policies=policies,
            meters=(Choice("splitfuse", {"budget": budget}), Choice("seats", {"max_rows": seats}), "kv-blocks"),
            num_blocks=num_blocks,
            prefix="none",
            **given,
        )
        self.service: Counter[str] = Counter()
        self.steps: list[Stepped] = []
        self.admitted: dict[int, float] = {}
        self._reached: dict[int, int] = {}
        self.bench.engine.listeners.append(self._hear)

    def _hear(self, event):
        if isinstance(event, Prefilled):
            seq = event.seq
            reached = min(event.start + event.tokens, seq.num_prompt)
            new = reached - self._reached.get(seq.id, 0)
            if new > 0:
                self._reached[seq.id] = reached
                self.service[seq.tenant] += INPUT * new
        elif isinstance(event, Emitted):
            self.service[event.seq.tenant] += OUTPUT * event.tokens
        elif isinstance(event, Admitted):
            self.admitted[event.seq.request_id] = event.now
        elif isinstance(event, Stepped):
            self.steps.append(event)

    def waiting(self, tenant):
        return sum(
            1
            for seq in self.bench.engine.scheduler.live.values()
            if seq.view.tenant == tenant and seq.stamps.admitted is None
        )

    def bound(self, longest):
        most = OUTPUT * self.bench.ledger.total() * 4
        if self.policy == "vtc":
            return 2 * max(INPUT * longest, most)
        # A prompt is charged when it begins, up to its whole length before it is computed; and the deficit itself.
        return 2 * (INPUT * longest + most + QUANTUM)


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("policy", "below"), [*((fair, "fcfs") for fair in FAIR), ("vtc", "shortest-remaining")])
def test_between_tenants_that_always_wait_service_differs_by_no_more_than_the_bound(policy, below, seed, plans):
    draw = random.Random(seed)
    tenants = ["a", "b", "c"]
    # Each sends its own kind of work: long prompts, long outputs, both of any length.
    shapes = {"a": (30, 3), "b": (3, 20), "c": (draw.randint(1, 30), draw.randint(1, 20))}
    shared = Shared(policy, num_blocks=draw.choice([14, 24]), seats=draw.choice([3, 256]), plans=plans, below=below)
    gaps: dict[tuple[str, str], list[float]] = {pair: [0.0] for pair in itertools.combinations(tenants, 2)}
    for _ in range(500):
        for tenant in tenants:
            while shared.waiting(tenant) < 2:
                most_prompt, most_output = shapes[tenant]
                prompt = [draw.randrange(50) for _ in range(draw.randint(1, most_prompt))]
                shared.bench.add(prompt, draw.randint(1, most_output), tenant=tenant)
        assert shared.bench.step()
        for (one, other), held in gaps.items():
            held.append(shared.service[one] - shared.service[other])
    bound = shared.bound(30)
    assert sum(shared.service.values()) > 3 * bound, "long enough for an unfair one to show"
    for held in gaps.values():
        # Over any interval: the service difference there is the difference of two points of this.
        assert max(held) - min(held) <= bound


def test_under_fcfs_it_differs_by_more():
    shared = Shared("fcfs", num_blocks=14)
    worst = 0.0
    for step in range(500):
        for tenant, least in (("a", 40), ("b", 2)):
            while shared.waiting(tenant) < least:
                shared.bench.add([step % 50] * 10, 5, tenant=tenant)
        shared.bench.step()
        worst = max(worst, abs(shared.service["a"] - shared.service["b"]))
    assert worst > 2 * shared.bound(10)


@pytest.mark.parametrize("policy", FAIR)
def test_a_step_is_never_left_short_while_somebody_waits(policy):
    draw = random.Random(3)
    shared = Shared(policy, budget=16, num_blocks=400)
    for n in range(60):
        shared.bench.add([n % 50] * draw.randint(1, 30), draw.randint(1, 9), tenant="ab"[n % 7 == 0])
    shared.bench.run()
    for step in shared.steps:
        assert step.tokens == 16 or step.waiting == 0


@pytest.mark.parametrize("policy", FAIR)
def test_one_tenant_alone_has_the_whole_machine_in_the_order_of_its_requests(policy):
    alone, plain = Shared(policy), Shared("fcfs")
    for n in range(30):
        for shared in (alone, plain):
            shared.bench.add([n % 50] * (1 + n % 9), 1 + n % 5, tenant="a")
    assert alone.bench.run() == plain.bench.run()
    assert alone.admitted == plain.admitted


@pytest.mark.parametrize("policy", FAIR)
@pytest.mark.parametrize("crowd", [10, 100, 1000])
def test_how_long_a_quiet_tenant_waits_does_not_depend_on_how_much_another_sends(policy, crowd):
    shared = Shared(policy, budget=16, num_blocks=200, seats=8)
    bench = shared.bench
    for n in range(crowd):
        bench.add([n % 50] * 12, 6, tenant="crowd")
    quiet = []
    for step in range(120):
        if step % 12 == 5:
            quiet.append(bench.add([step % 50] * 12, 2, tenant="quiet"))
        bench.step()
    waits = [shared.admitted[request.id] - request.arrival for request in quiet]
    assert len(waits) == 10 and max(waits) <= 4, waits


@pytest.mark.parametrize("policy", FAIR)
def test_who_comes_back_has_saved_nothing_up(policy):
    shared = Shared(policy, budget=16, num_blocks=40)
    for _ in range(300):
        while shared.waiting("busy") < 5:
            shared.bench.add([1] * 8, 4, tenant="busy")
        shared.bench.step()
    before = shared.service.copy()
    assert before["busy"] > 9 * shared.bound(8)
    for _ in range(200):
        for tenant in ("busy", "back"):
            while shared.waiting(tenant) < 5:
                shared.bench.add([1] * 8, 4, tenant=tenant)
        shared.bench.step()
        got = {tenant: shared.service[tenant] - before[tenant] for tenant in ("busy", "back")}
        assert abs(got["back"] - got["busy"]) <= shared.bound(8)
    assert got["busy"] > 0.4 * sum(got.values())


@pytest.mark.parametrize("policy", FAIR)
def test_who_stops_sending_leaves_its_share_to_the_others(policy):
    shared = Shared(policy, budget=16, num_blocks=200)
    for _ in range(10):
        shared.bench.add([1] * 8, 4, tenant="short")
    for _ in range(40):
        shared.bench.add([1] * 8, 4, tenant="long")
    shared.bench.run()
    assert all(step.tokens == 16 for step in shared.steps[:-12])


@pytest.mark.parametrize("policy", FAIR)
@pytest.mark.parametrize("seed", range(4))
def test_everybody_is_served_to_the_end_through_aborts_and_preemptions(policy, seed):
    draw = random.Random(seed)
    bench = Shared(policy, num_blocks=12, preemption=draw.choice(["recompute", "swap"]), host_blocks=6).bench
    aborted = set()
    for _ in range(80):
        params = {"n": draw.choice([1, 1, 1, 3]), "temperature": 1.0, "seed": 1}
        bench.add(
            [draw.randrange(50)] * draw.randint(1, 20), draw.randint(1, 12), tenant=draw.choice("abcd"), params=params
        )
        if draw.random() < 0.2:
            victim = draw.randrange(len(bench.requests))
            aborted.add(victim)
            bench.engine.abort(victim)
        bench.step()
    bench.run()
    for request in bench.requests.values():
        for index in range(request.params.n):
            if request.id not in aborted:
                assert bench.finish(request, index) is Finish.LENGTH
                assert bench.output(request, index) == bench.truth(request, index)
    bench.clean()
    held = bench.engine.scheduler.policy.policies[0]
    for name in ("_tenants", "_wanting", "_waiting", "_outputs", "_able", "_again"):
        assert not getattr(held, name, None), name
