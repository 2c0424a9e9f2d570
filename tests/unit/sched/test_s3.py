"""Reservations by what is expected: packing, outgrowing, and that nothing is cut off."""

from __future__ import annotations

import pytest
from harness import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core import registry
from millstream.core.registry import Choice
from millstream.core.request import Hints


def engine(num_blocks=32, preemption="recompute", reserve="hint", policy="s3", block_size=4, host_blocks=32, **options):
    return Bench(
        policies=(Choice(policy, options),),
        meters=(Choice("splitfuse", {"budget": 512}), "seats", Choice("contiguous", {"reserve": reserve})),
        num_blocks=num_blocks,
        block_size=block_size,
        host_blocks=host_blocks,
        prefix="none",
        preemption=preemption,
    )


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_who_outgrows_its_reservation_gets_twice_as_much_and_its_whole_text(preemption):
    bench = engine(preemption=preemption)
    wrong = bench.add([1] * 5, 40, hints=Hints(expected_output_len=4))
    right = [bench.add([n] * 5, 10, hints=Hints(expected_output_len=10)) for n in range(2, 6)]
    bench.run()
    meter = bench.engine.scheduler.meters[-1]
    # 4, 8, 16, 32, 40: four times it asked for more.
    assert meter.outgrowths == 4 and bench.chunks[(wrong.id, 0)][-1].metrics.preemptions == 4
    for request in (wrong, *right):
        assert bench.output(request) == bench.truth(request)
    assert all(bench.chunks[(one.id, 0)][-1].metrics.preemptions == 0 for one in right)
    bench.clean()


def test_what_is_expected_lets_more_run_at_once_than_what_could_be():
    def together(reserve):
        bench = engine(reserve=reserve, num_blocks=32)
        for number in range(12):
            bench.add([number] * 4, 60, hints=Hints(expected_output_len=4))
        bench.step()
        running = bench.engine.scheduler.num_running
        bench.run()
        assert all(bench.output(one) == bench.truth(one) for one in bench.requests.values())
        return running

    assert together("hint") >= 5 * together("max") > 0


def test_without_a_hint_the_most_is_reserved():
    bench = engine(num_blocks=16)
    for number in range(3):
        bench.add([number] * 4, 28)
    bench.step()
    assert bench.engine.scheduler.num_running == 2
    bench.run()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=8))
def test_packing_needs_at_most_11_9_of_the_fewest_waves_and_one_more(sizes):
    """A wave is what the cache takes at once; every request stays for one step."""
    bench = engine(num_blocks=16, block_size=1, host_blocks=0)
    for size in sizes:
        bench.add([size] * size, 1, hints=Hints(expected_output_len=0), params={"ignore_eos": True})
    # The only token of an output needs no place in the cache.
    waves = bench.run()
    assert waves <= 11 / 9 * fewest([size for size in sizes], 16) + 1


def fewest(sizes, room):
    """Bins by brute force: each size goes into a bin that is open, or opens the next."""
    best = len(sizes)

    def place(left, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if not left:
            best = len(bins)
            return
        for number, used in enumerate(bins):
            if used + left[0] <= room:
                place(left[1:], [*bins[:number], used + left[0], *bins[number + 1 :]])
        place(left[1:], [*bins, left[0]])

    place(sorted(sizes, reverse=True), [])
    return best


def test_a_pace_bounds_how_many_run():
    bench = Bench(policies=(Choice("s3", {"token_s": 0.15}),), num_blocks=200)
    for number in range(20):
        bench.add([number], 30)
    for _ in range(12):
        bench.step()
    # A step of five decodes takes 0.15 s.
    assert bench.engine.scheduler.num_running <= 5
    bench.run()


def test_a_small_request_does_not_wait_for_ever_behind_larger_ones():
    bench = engine(num_blocks=8, patience_s=20.0)
    small = bench.add([1], 2, hints=Hints(expected_output_len=2))
    for number in range(60):
        bench.add([number % 50] * 20, 8, hints=Hints(expected_output_len=8))
        bench.step()
    bench.run()
    assert bench.chunks[(small.id, 0)][-1].metrics.ttft_s < 60


@pytest.mark.parametrize("bad", [{"patience_s": -1}, {"token_s": -0.1}])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(Exception, match=next(iter(bad))):
        registry.make("policy", Choice("s3", bad))
