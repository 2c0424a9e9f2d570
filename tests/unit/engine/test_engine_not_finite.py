"""A row that is not finite: nobody else's, computed anew once past every cache, and never remembered for others."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from harness import Bench

from millstream.core.errors import EngineClosed
from millstream.core.events import Preempted
from millstream.core.plan import StepPlan, StepResult
from millstream.core.registry import Choice
from millstream.core.request import SamplingParams
from millstream.core.sequence import Finish
from millstream.decode.protocol import NOT_FINITE

PROMPT = list(range(20))


class Damaged:
    """Gives rows that are not finite: those of the steps `at`, all from step `dead` on (of sequence `only`), and those
    that read a block of `blocks`, each damaged until it is written anew."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.at: set[int] = set()
        self.blocks: set[int] = set()
        self.dead: int | None = None
        self.only: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def collect(self, ticket: StepPlan) -> StepResult:
        step = self._runner.steps
        result = self._runner.collect(ticket)
        settled = []
        for extend, row in zip(ticket.extends, result.settled, strict=True):
            reads = {block for holding in extend.holdings for block in holding.blocks}
            size = self._runner.block_size
            self.blocks -= {
                extend.holdings[0].blocks[at // size] for at in range(extend.start, extend.stop) if at % size == 0
            }
            bad = step in self.at or bool(reads & self.blocks) or (self.dead is not None and step >= self.dead)
            # What is not finite shows only where something is sampled.
            bad = bad and extend.sample is not None and self.only in (None, extend.seq)
            settled.append(replace(row, kept=0, tokens=(), logprobs=(), fault=NOT_FINITE) if bad else row)
        return StepResult(result.plan, result.seconds, tuple(settled))


def damaged(**given: Any) -> tuple[Bench, Damaged]:
    bench = Bench(**given)
    runner = bench.engine.runner = Damaged(bench.engine.runner)
    return bench, runner


@pytest.mark.parametrize("plans", [1, 2])
def test_one_bad_step_changes_no_text_whenever_it_comes(plans):
    params = {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 1}
    whole = Bench(plans=plans)
    whole.add(PROMPT, 6, params=params)
    whole.add([5, 5], 12)
    steps = whole.run()
    for step in range(steps):
        bench, runner = damaged(plans=plans)
        runner.at = {step}
        told = []
        bench.engine.listeners.append(lambda e, into=told: into.append(e) if isinstance(e, Preempted) else None)
        asked, other = bench.add(PROMPT, 6, params=params), bench.add([5, 5], 12)
        bench.run()
        assert [bench.output(asked, i) for i in range(2)] == [bench.truth(asked, i) for i in range(2)]
        assert bench.output(other) == bench.truth(other)
        assert bench.engine.counters["corrupted_requests"] == 0
        assert bench.engine.counters["cold_retries"] == len(told)
        for index in range(2):
            chunks = bench.chunks[(asked.id, index)]
            logprobs = [entry.chosen.token for chunk in chunks for entry in chunk.logprobs]
            assert logprobs == bench.output(asked, index)
            assert sum(chunk.finish is not None for chunk in chunks) == 1
        bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_a_damaged_prefix_is_given_to_nobody_again(plans):
    bench, runner = damaged(plans=plans)
    first = bench.add(PROMPT, 4)
    bench.run()
    seen = []
    launch = bench.runner.launch
    bench.runner.launch = lambda plan: (seen.append(plan), launch(plan))[1]
    warm = bench.add(PROMPT, 4)
    bench.run()
    assert bench.chunks[(warm.id, 0)][-1].usage.cached_tokens >= 16
    # A block of the prefix goes bad in memory.
    runner.blocks = {seen[0].extends[0].holdings[0].blocks[1]}
    hit = bench.add(PROMPT, 4)
    bench.run()
    assert bench.output(hit) == bench.output(first), "computed anew, from its first token"
    assert bench.ledger.stats()["distrusted_blocks"] > 0
    assert bench.engine.counters == {"cold_retries": 1, "corrupted_requests": 0, "self_tests": 0, "timeouts": 0}
    runner.blocks = set()
    after = bench.add(PROMPT, 4)
    bench.run()
    # The one that was computed anew left nothing behind, and the damaged blocks are not found.
    assert bench.chunks[(after.id, 0)][-1].usage.cached_tokens == 0
    assert bench.output(after) == bench.output(first)
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_a_request_that_stays_bad_ends_with_an_error_and_the_engine_goes_on(plans, caplog):
    caplog.set_level(logging.ERROR, "millstream.engine.engine")
    bench, runner = damaged(plans=plans)
    good = bench.add([5, 5], 12)
    bad = bench.add(PROMPT, 4)
    runner.dead, runner.only = 0, 1
    bench.run()
    chunk = bench.chunks[(bad.id, 0)][-1]
    assert chunk.finish is Finish.ERROR and "not finite" in chunk.error and "computed again" in chunk.error
    assert bench.output(good) == bench.truth(good)
    assert bench.engine.counters["corrupted_requests"] == 1 and bench.engine.counters["cold_retries"] == 1
    # Its neighbour came out well meanwhile, or else a test of its own did.
    assert bench.engine.counters["self_tests"] <= 1
    again = bench.add(PROMPT, 4)
    runner.dead = None
    bench.run()
    assert bench.output(again) == bench.truth(again) and bench.chunks[(again.id, 0)][-1].usage.cached_tokens == 0
    bench.clean()


def test_a_request_alone_that_stays_bad_does_not_end_the_engine(caplog):
    caplog.set_level(logging.ERROR, "millstream.engine.engine")
    bench, runner = damaged()
    runner.dead, runner.only = 0, 0
    bad = bench.add(PROMPT, 4)
    bench.run()
    assert bench.finish(bad) is Finish.ERROR and bench.engine.counters["self_tests"] == 1
    good = bench.add(PROMPT, 4)
    bench.run()
    assert bench.output(good) == bench.truth(good)
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_an_engine_that_computes_nothing_any_more_says_so(plans, caplog):
    caplog.set_level(logging.ERROR, "millstream.engine.engine")
    bench, runner = damaged(plans=plans)
    asked = [bench.add([n, *PROMPT], 30) for n in range(3)]
    for _ in range(12):
        bench.step()
    runner.dead = 0
    with pytest.raises(EngineClosed, match="self-test fails"):
        bench.run(200)
    assert all(bench.finish(request) is Finish.ERROR for request in asked)
    assert bench.engine.counters["self_tests"] == 1


def test_beams_go_on_after_a_bad_step():
    whole = Bench()
    truth = whole.add([3, 1, 4], 5, decode=Choice("beam", {"width": 3}))
    steps = whole.run()
    want = [whole.output(truth, index) for index in range(3)]
    for step in range(steps):
        bench, runner = damaged()
        runner.at = {step}
        asked = bench.add([3, 1, 4], 5, decode=Choice("beam", {"width": 3}))
        bench.run(500)
        assert [bench.output(asked, index) for index in range(3)] == want, f"after step {step}"
        bench.clean()


def test_an_abort_or_a_deadline_ends_one_that_is_computed_anew():
    for end in range(1, 9):
        bench, runner = damaged(plans=2)
        runner.at = {2, 3}
        asked = bench.add(PROMPT, 6)
        for _ in range(end):
            bench.step()
        bench.engine.abort(asked.id)
        other = bench.add(PROMPT, 3)
        bench.run()
        assert bench.output(other) == bench.truth(other)
        bench.clean()


def test_prompt_logprobs_are_whole_when_a_row_is_computed_anew():
    params = {"prompt_logprobs": 0, "n": 2, "temperature": 1.0, "seed": 3}
    whole = Bench()
    truth = whole.add(PROMPT, 2, params=params)
    steps = whole.run()
    want = whole.chunks[(truth.id, 0)][0].prompt_logprobs
    assert None not in want[1:]
    for step in range(steps):
        bench, runner = damaged()
        runner.at = {step}
        asked = bench.add(PROMPT, 2, params=params)
        bench.run()
        for index in range(2):
            got = [c.prompt_logprobs for c in bench.chunks[(asked.id, index)] if c.prompt_logprobs is not None]
            assert got == [want]
    assert SamplingParams(prompt_logprobs=0).prompt_logprobs == 0
