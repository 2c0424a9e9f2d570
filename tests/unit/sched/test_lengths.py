"""Predictors of output lengths: asked once, in a batch, before anybody is ranked; and nobody suffers from a bad one."""

from __future__ import annotations

import logging

import pytest
from harness import Bench

from millstream.core import registry
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish, SeqView
from millstream.sched.protocol import LengthPredictor

ONE_PLACE = (Choice("splitfuse", {"budget": 8}), Choice("seats", {"max_rows": 1}), "kv-blocks")


class Says(LengthPredictor):
    """Scores by the first token of the prompt; keeps what it was asked."""

    def __init__(self, answer=None):
        self.asked = []
        self.answer = answer or (lambda requests: [Hints(score=float(one.prompt_ids[0])) for one in requests])

    def guess(self, requests):
        self.asked.append([one.id for one in requests])
        return self.answer(requests)


def test_what_came_since_the_last_step_is_guessed_at_once_and_only_once():
    lengths = Says()
    bench = Bench(lengths=lengths)
    for n in range(3):
        bench.add([n, 1], 4)
    bench.step()
    bench.add([9, 1], 4)
    bench.run()
    assert lengths.asked == [[0, 1, 2], [3]]
    load = bench.engine.load()
    assert load.counters["guessed_requests"] == 4 and "guess_s" in load.counters


def test_policies_rank_by_what_was_guessed():
    bench = Bench(lengths=Says(), policies=("ltr",), meters=ONE_PLACE)
    requests = [bench.add([n, 1], 4) for n in (3, 30, 12)]
    bench.run()
    ends = [bench.chunks[(request.id, 0)][-1].metrics.total_s for request in requests]
    assert sorted(range(3), key=ends.__getitem__) == [1, 2, 0]


def test_every_output_of_a_request_has_its_hints_and_snapshots_keep_them():
    bench = Bench(lengths=Says())
    bench.add([7, 1, 2], 4, params={"n": 2, "temperature": 1.0, "seed": 1})
    bench.step()
    views = [seq.view for seq in bench.engine.scheduler.live.values()]
    assert [view.hints.score for view in views] == [7.0, 7.0]
    kept = SeqView(views[0].snapshot())
    assert kept.hints.score == 7.0


def test_what_a_request_says_itself_comes_first_and_of_an_oracle_nobody_else_speaks():
    bench = Bench(lengths=Says(lambda requests: [Hints(5, 0.5, 1.5, oracle=99)] * len(requests)))
    bench.add([1], 4, hints=Hints(expected_output_len=40))
    bench.step()
    (seq,) = bench.engine.scheduler.live.values()
    assert seq.view.hints == Hints(40, 0.5, 1.5, None)


@pytest.mark.parametrize(
    "answer",
    [
        lambda requests: 1 / 0,
        lambda requests: [],
        lambda requests: ["long"] * len(requests),
    ],
)
def test_a_predictor_that_fails_hurts_nobody_and_is_told_of_once(answer, caplog):
    bench = Bench(lengths=Says(answer), policies=("ltr",))
    with caplog.at_level(logging.ERROR):
        requests = [bench.add([1, 2], 4), bench.add([3, 4], 4)]
        bench.step()
        requests.append(bench.add([5, 6], 4))
        bench.run()
    for request in requests:
        assert bench.finish(request) is Finish.LENGTH and bench.output(request) == bench.truth(request)
    assert len([one for one in caplog.records if "length predictor" in one.message]) == 1
    assert bench.engine.load().counters["guess_failures"] == 2


def test_one_that_fails_to_learn_hurts_nobody_either(caplog):
    class Deaf(Says):
        def observe(self, event):
            raise ValueError("no")

    bench = Bench(lengths=Deaf())
    request = bench.add([1, 2], 4)
    with caplog.at_level(logging.ERROR):
        bench.run()
    assert bench.output(request) == bench.truth(request)
    assert len([one for one in caplog.records if "observe" in one.message]) == 1


def test_a_request_that_ended_before_it_was_guessed_is_passed_over():
    lengths = Says()
    bench = Bench(lengths=lengths)
    first, second = bench.add([1], 4), bench.add([2], 4)
    bench.engine.abort(first.id)
    bench.run()
    assert lengths.asked == [[second.id]]


# -- history


def request(num_prompt, tenant="a"):
    return Request(0, (Tokens(tuple(range(num_prompt))),), SamplingParams(), tenant=tenant)


def expected(history, *given):
    return history.guess([request(*given)])[0].expected_output_len


def test_history_tells_means_by_tenant_and_prompt_length_and_falls_back():
    history = registry.make("length", Choice("history", {"least": 2}), text=None)
    bench = Bench(lengths=history, context=200, num_blocks=100)
    assert expected(history, 4) is None
    for _ in range(3):
        bench.add(range(4), 6, tenant="a")
        bench.add(range(20), 12, tenant="a")
        bench.add(range(4), 30, tenant="b")
    bench.run()
    assert expected(history, 5) == 6 and expected(history, 20) == 12
    assert expected(history, 5, "b") == 30
    assert expected(history, 100) == 9, "nothing of that length: all of the tenant"
    assert expected(history, 5, "new") == 16, "nothing of that tenant: everybody"


def test_history_forgets_and_does_not_learn_from_what_was_broken_off():
    history = registry.make("length", Choice("history", {"least": 1, "memory": 2}), text=None)
    bench = Bench(lengths=history)
    for length in (40, *[4] * 9):
        bench.add([1, 2], length)
        bench.run()
    gone = bench.add([1, 2], 40)
    bench.step()
    bench.engine.abort(gone.id)
    bench.run()
    assert expected(history, 2) == 4


def test_history_keeps_a_bounded_number_of_means():
    history = registry.make("length", Choice("history", {"most_means": 10}), text=None)
    bench = Bench(lengths=history)
    for n in range(12):
        bench.add([1, 2], 2, tenant=f"tenant-{n}")
    bench.run()
    assert len(history._means) == 10
