"""The counters of vtc, by hand: what is charged, to whom, and where a tenant comes in."""

from __future__ import annotations

import gc

import pytest

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.events import Admitted, Computed, Emitted, Finished, Preempted, Prefilled, Submitted
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish, Sequence, Stamps, State
from millstream.sched.protocol import LoadView, Policy
from millstream.sched.stack import PolicyStack

VIEW = LoadView(0.0, 10, 10, [], [])


class Told:
    """A policy, and sequences that go through their lives step by step as the engine would tell them."""

    def __init__(self, below=("fcfs",), **options):
        self.policy = registry.make("policy", Choice("vtc", options))
        self.stack = PolicyStack([self.policy, *(registry.make("policy", one) for one in below)])
        self.seqs: list[Sequence] = []

    def submit(self, tenant, num_prompt=10, index=0, prior=0, score=None):
        seq = Sequence(
            id=len(self.seqs),
            request=Request(
                len(self.seqs),
                (Tokens(tuple(range(num_prompt))),),
                SamplingParams(),
                tenant=tenant,
                hints=Hints(score=score),
            ),
            index=index,
            tokens=[*range(num_prompt), *[0] * prior],
            num_prompt=num_prompt,
            max_len=num_prompt + 100,
            seed=0,
            stop_ids=frozenset(),
            decode=Choice("autoregressive"),
            method=registry.make("decode", "autoregressive"),
            stamps=Stamps(float(len(self.seqs))),
        )
        self.seqs.append(seq)
        self.policy.observe(Submitted(0.0, seq.view))
        return seq

    def enter(self, seq, cached=0):
        seq.state, seq.computed, seq.cached = State.RUNNING, cached, cached
        if seq.stamps.admitted is None:
            seq.stamps.admitted = 0.0
            self.policy.observe(Admitted(0.0, seq.view, cached))

    def compute(self, seq, n=None):
        n = seq.left if n is None else n
        start, seq.computed = seq.computed, seq.computed + n
        told = Prefilled if n > 1 or start < seq.num_prompt else Computed
        self.policy.observe(told(0.0, seq.view, start, n))

    def emit(self, seq, n=1):
        seq.tokens += [0] * n
        self.policy.observe(Emitted(0.0, seq.view, n))

    def preempt(self, seq):
        seq.state, seq.computed = State.WAITING, 0
        self.policy.observe(Preempted(0.0, seq.view, "recompute"))

    def finish(self, seq, reason=Finish.STOP):
        seq.state = State.FINISHED
        self.policy.observe(Finished(0.0, seq.view, reason))

    def serve(self, seq, outputs):
        """A whole life in an empty machine."""
        self.enter(seq)
        self.compute(seq)
        self.emit(seq)
        for _ in range(outputs - 1):
            self.compute(seq)
            self.emit(seq)
        self.finish(seq)

    def at(self, seq):
        """The counter by which it ranks now."""
        return self.policy.rank(seq.view, VIEW)[1]

    def order(self):
        waiting = [seq for seq in self.seqs if seq.state is State.WAITING]
        return [seq.id for seq in sorted(waiting, key=lambda seq: self.stack.rank(seq.view, VIEW))]


def test_a_prompt_costs_one_a_token_and_an_output_two_as_they_come():
    told = Told()
    first, second = told.submit("a", 10), told.submit("a", 10)
    told.enter(first)
    told.compute(first, 6)
    assert told.at(second) == 10.0  # 6 charged, 4 to come
    told.compute(first, 4)
    assert told.at(second) == 10.0
    told.emit(first)
    assert told.at(second) == 12.0
    told.compute(first)
    told.emit(first)
    assert told.at(second) == 14.0


def test_within_one_order_tenants_take_turns_by_what_their_prompts_will_cost():
    told = Told()
    for _ in range(4):
        told.submit("a", 10)
    for _ in range(3):
        told.submit("b", 25)
    # a at 0, 10, 20, 30; b at 0, 25, 50: ties by arrival.
    assert told.order() == [0, 4, 1, 2, 5, 3, 6]


def test_who_of_a_tenant_goes_first_is_left_to_the_policy_below():
    told = Told(below=("ltr",))
    for score in (1.0, 3.0, 2.0):
        told.submit("a", 10, score=score)
    for score in (0.0, 9.0):
        told.submit("b", 25, score=score)
    # a at 0, 10, 20 and b at 0, 25, whichever of theirs has which: the best score of both is b's.
    assert told.order() == [4, 1, 2, 0, 3]
    # What was begun stays at its place, and the others go on after it.
    told.enter(told.seqs[1])
    assert (told.at(told.seqs[2]), told.at(told.seqs[0])) == (10.0, 20.0)


def test_an_order_below_that_changes_is_heard_in_the_next_step():
    class Turning(Policy):
        def rank(self, seq, view):
            return (seq.arrival if view.now < 1.0 else -seq.arrival,)

    told = Told()
    told.stack = PolicyStack([told.policy, Turning()])
    first, second = told.submit("a", 10), told.submit("a", 5)
    assert (told.at(first), told.at(second)) == (0.0, 10.0)
    later = LoadView(1.0, 10, 10, [], [])
    assert [told.policy.rank(seq.view, later)[1] for seq in (first, second)] == [5.0, 0.0]


def test_a_tenant_that_has_gone_holds_no_view_and_no_sequence():
    told = Told(below=("ltr",))
    seq = told.submit("a", 10)
    assert told.order() == [0]
    told.serve(seq, 2)
    held = [told.policy._idle["a"]]
    for _ in range(3):
        held += gc.get_referents(*held)
    assert not any(isinstance(one, LoadView | Sequence) for one in held)
    assert not told.policy._views


def test_an_order_below_that_fails_for_one_of_a_tenant_fails_for_that_one():
    class Picky(Policy):
        def rank(self, seq, view):
            if seq.num_prompt == 7:
                raise ValueError("seven")
            return (seq.arrival,)

    told = Told()
    told.stack = PolicyStack([told.policy, Picky()])
    for length in (7, 10, 10):
        told.submit("a", length)
    assert [told.at(seq) for seq in told.seqs] == [20.0, 0.0, 10.0]
    assert told.stack.rank(told.seqs[1].view, VIEW)[1] == 0.0
    with pytest.raises(ValueError, match="seven"):
        told.stack.rank(told.seqs[0].view, VIEW)


def test_who_has_got_less_goes_first_whoever_came_first():
    told = Told()
    greedy = [told.submit("a", 10) for _ in range(5)]
    told.enter(greedy[0])
    told.compute(greedy[0])
    late = told.submit("b", 10)
    told.emit(greedy[0])
    assert told.order()[0] == late.id


def test_a_tenant_comes_in_at_the_least_counter_of_those_that_wait():
    told = Told()
    told.serve(told.submit("a", 50), 5)  # 60
    other = told.submit("b", 10)
    assert told.at(other) == 60.0, "nobody waits: where the last one left"
    a = told.submit("a", 10)
    told.enter(other)
    told.compute(other)
    third = told.submit("c", 10)
    assert (told.at(a), told.at(third)) == (60.0, 60.0)


def test_time_away_gives_no_credit_and_takes_none():
    told = Told()
    told.serve(told.submit("away", 10), 1)
    told.submit("busy", 10)
    for _ in range(20):
        following = told.submit("busy", 10)
        told.serve(told.seqs[-2], 5)
    back = told.submit("away", 10)
    assert told.at(back) == told.at(following)
    told.finish(back, Finish.ABORT)
    # One that has got more than those that wait keeps what it owes.
    told.serve(told.submit("away", 500), 1)
    assert told.at(told.submit("away", 1)) > told.at(following) + 400


def test_what_the_cache_held_is_free_and_the_queue_behind_moves_up():
    told = Told()
    first, second = told.submit("a", 100), told.submit("a", 10)
    assert told.at(second) == 100.0
    told.enter(first, cached=96)
    assert told.at(second) == 4.0
    told.compute(first, 4)
    assert told.at(second) == 4.0


def test_what_is_computed_again_is_not_charged_again():
    told = Told()
    first, second = told.submit("a", 10), told.submit("a", 1)
    told.enter(first)
    told.compute(first, 6)
    told.preempt(first)
    told.enter(first)
    told.compute(first, 6)
    assert told.at(second) == 10.0, "half a prompt"
    told.compute(first, 4)
    told.emit(first, 3)
    told.preempt(first)
    assert told.at(first) == 16.0
    told.enter(first)
    told.compute(first, 13)
    assert told.at(second) == 16.0, "a prompt and what was said"
    told.emit(first)
    assert told.at(second) == 18.0


def test_one_that_is_thrown_out_comes_back_in_at_the_least_counter_of_those_that_wait():
    told = Told()
    small = told.submit("small", 1)
    told.enter(small)
    told.compute(small)
    told.submit("big", 100)
    told.serve(told.seqs[-1], 50)
    waiting = told.submit("big", 10)
    told.preempt(small)
    assert told.at(small) == told.at(waiting) == 201.0


def test_outputs_that_share_a_prompt_pay_for_it_once_and_each_for_its_own_tokens():
    told = Told()
    leader, *others = [told.submit("a", 40, index) for index in range(3)]
    behind = told.submit("a", 1)
    told.enter(leader)
    told.compute(leader)
    for seq in others:
        told.enter(seq, cached=39)
        told.compute(seq, 1)
    for seq in (leader, *others):
        told.emit(seq, 2)
    assert told.at(behind) == 40 + 2 + 2 * 6


def test_tokens_that_come_without_an_event_of_their_own_are_charged_too():
    told = Told()
    beam, behind = told.submit("a", 4), told.submit("a", 1)
    told.enter(beam)
    told.compute(beam)
    for _ in range(3):
        beam.tokens.append(0)
        told.compute(beam)
    assert told.at(behind) == 4 + 2 * 3
    beam.tokens.append(0)
    told.finish(beam)
    assert told.at(behind) == 4 + 2 * 4


def test_what_another_engine_had_said_already_is_not_charged():
    told = Told()
    resumed, behind = told.submit("a", 4, prior=20), told.submit("a", 1)
    told.enter(resumed)
    told.compute(resumed)
    told.emit(resumed)
    assert told.at(behind) == 4 + 2


def test_one_that_leaves_the_queue_costs_nothing():
    told = Told()
    first, second, third = (told.submit("a", 10) for _ in range(3))
    told.finish(first, Finish.ABORT)
    assert (told.at(second), told.at(third)) == (0.0, 10.0)


def test_a_weight_is_a_share():
    told = Told(weights={"gold": 4.0})
    gold, behind, plain = told.submit("gold", 40), told.submit("gold", 1), told.submit("plain", 20)
    told.enter(gold)
    told.compute(gold)
    told.emit(gold, 10)
    told.enter(plain)
    told.compute(plain)
    assert told.at(behind) == (40 + 20) / 4


def test_a_long_prompt_gives_way_after_each_quantum():
    told = Told(quantum=16)
    long, late = told.submit("a", 100), None
    told.enter(long)
    told.compute(long, 8)
    late = told.submit("b", 100)
    assert told.at(long) < told.at(late), "it keeps its place"
    told.compute(long, 8)
    assert told.at(long) == 16.0 > told.at(late) == 8.0
    told.enter(late)
    told.compute(late, 10)
    assert told.at(late) == 8.0, "so does the other"


def test_who_has_got_most_gives_its_blocks_up():
    told = Told()
    small, big, last = told.submit("small", 10), told.submit("big", 50), told.submit("small", 10)
    for seq in (small, big, last):
        told.enter(seq)
        told.compute(seq)
        told.emit(seq)
    running = [small.view, big.view, last.view]
    assert told.policy.victim(running, VIEW) is running[1]
    assert told.policy.victim([small.view, last.view], VIEW).id == last.id
    assert told.policy.victim([], VIEW) is None


def test_only_so_many_idle_tenants_are_remembered():
    told = Told(remember=3)
    told.submit("stays", 10)
    for place in range(50):
        told.serve(told.submit(f"passer-{place}", 5), 1)
    held = told.policy
    assert len(held._idle) == 3 and len(held._tenants) == 1 and not held._outputs.keys() - {0}
    told.finish(told.seqs[0])
    assert len(held._idle) == 3 and not held._tenants and not held._outputs and not held._wanting


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"input_weight": 0}, "input_weight must be a number above 0, got 0"),
        ({"output_weight": float("inf")}, "output_weight"),
        ({"weights": {"a": -1.0}}, "the weight of 'a'"),
        ({"weights": [1]}, "weights must be a mapping"),
        ({"quantum": 0}, "quantum must be an integer from 1, got 0"),
        ({"remember": True}, "remember"),
        ({"output_wait": 1}, "the nearest is 'output_weight'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        registry.make("policy", Choice("vtc", options))
