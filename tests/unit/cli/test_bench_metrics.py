"""The arithmetic of the metrics, on stamps written by hand."""

from __future__ import annotations

import math

import pytest

from millstream.bench.load import poisson_arrivals, random_prompts, text_prompts
from millstream.core.errors import BadRequest
from millstream.engine.knee import SHARE, Point, find_knee
from millstream.sim.metrics import Distribution, RequestTiming, StepTiming, percentile, step_seconds, summarize


def timing(arrival: float, *times: float, prompt: int = 10, **more: object) -> RequestTiming:
    return RequestTiming(arrival, times, prompt, len(times), **more)  # type: ignore[arg-type]


def step(now: float, forward: float, tokens: int, prompt: int, running: int = 1) -> StepTiming:
    return StepTiming(now, forward, 1, tokens, prompt, running, 0)


def test_one_request_by_hand():
    one = timing(1.0, 1.5, 1.6, 1.9)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.gaps_s == pytest.approx([0.1, 0.3])
    assert one.tpot_s == pytest.approx(0.2)
    assert one.e2el_s == pytest.approx(0.9)


def test_tokens_that_come_together_have_no_gap_but_count_for_tpot():
    one = RequestTiming(0.0, (1.0, 1.4), 10, 5)
    assert one.gaps_s == pytest.approx([0.4])
    assert one.tpot_s == pytest.approx(0.1)


def test_a_request_of_one_token_has_no_tpot():
    assert timing(0.0, 1.0).tpot_s is None


def test_the_report_pools_gaps_and_counts_failures_apart():
    report = summarize(
        [timing(0.0, 1.0, 1.1, 1.2), timing(0.5, 2.0, 2.5), timing(0.0, error="it broke")],
    )
    assert (report.requests, report.failed) == (3, 1)
    assert report.duration_s == pytest.approx(2.5)
    assert report.output_tokens == 5 and report.prompt_tokens == 20
    assert report.output_tokens_per_s == pytest.approx(2.0)
    assert report.total_tokens_per_s == pytest.approx(10.0)
    assert report.itl_s.count == 3 and report.itl_s.max == pytest.approx(0.5)
    assert report.ttft_s.p50 == pytest.approx(1.25)


def test_a_mixed_step_is_shared_out_by_tokens():
    # 0.4 s for 30 prompt and 10 other tokens; then 0.1 s for 10 other tokens.
    report = summarize([timing(0.0, 1.0, 1.1)], [step(1.0, 0.4, 40, 30), step(1.1, 0.08, 10, 0, running=0)])
    assert report.prefill_tokens_per_s == pytest.approx(30 / 0.3)
    assert report.decode_tokens_per_s == pytest.approx(20 / 0.2)
    assert report.steps == 2


def test_after_a_pause_a_step_lasts_as_long_as_its_forward_pass():
    steps = [step(1.0, 0.1, 1, 0), step(1.3, 0.2, 1, 0, running=0), step(9.0, 0.25, 1, 0)]
    assert step_seconds(steps) == pytest.approx([0.1, 0.3, 0.25])


def test_nothing_measured_is_not_a_number_rather_than_zero():
    assert math.isnan(Distribution.of([]).p99)
    assert math.isnan(summarize([timing(0.0, error="x")]).output_tokens_per_s)


@pytest.mark.parametrize("q, value", [(0, 1.0), (50, 2.5), (90, 3.7), (100, 4.0)])
def test_percentiles_lie_between_neighbours(q, value):
    assert percentile([1.0, 2.0, 3.0, 4.0], q) == pytest.approx(value)


def test_the_knee_is_the_smallest_step_near_the_best():
    curve = [Point(8, 0.08, 0, 0), Point(64, 0.1, 0, 0), Point(256, 0.28, 0, 0), Point(512, 0.52, 0, 0)]
    assert [round(point.tokens_per_s) for point in curve] == [100, 640, 914, 985]
    assert find_knee(curve, share=0.9) == 256
    assert find_knee(curve, share=0.95) == 512
    assert find_knee(curve) == find_knee(curve, share=SHARE)


def test_random_prompts_depend_on_the_seed_and_avoid_what_is_banned():
    first = random_prompts(50, [5, 7], 1, frozenset(range(40)))
    assert [len(ids) for ids in first] == [5, 7]
    assert first == random_prompts(50, [5, 7], 1, frozenset(range(40)))
    assert first != random_prompts(50, [5, 7], 2, frozenset(range(40)))
    assert all(40 <= token < 50 for ids in first for token in ids)
    with pytest.raises(BadRequest, match="banned"):
        random_prompts(3, [1], 0, frozenset(range(3)))


def test_text_prompts_are_pieces_of_the_text():
    text = list(range(100))
    for ids in text_prompts(text, [10, 100], 3):
        assert list(ids) == list(range(ids[0], ids[0] + len(ids)))
    with pytest.raises(BadRequest, match="at least 101"):
        text_prompts(text, [101], 0)


def test_poisson_arrivals_keep_their_rate():
    times = poisson_arrivals(4000, 20.0, seed=5)
    assert times[0] == 0.0 and times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(20.0, rel=0.1)
    with pytest.raises(BadRequest, match="request_rate"):
        poisson_arrivals(3, 0.0, 1)
