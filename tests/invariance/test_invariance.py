"""What a request gets does not depend on its neighbours, on how its prompt was cut, on what the cache held, or on what
was taken from it on the way. Each property is held to the cold generator that computes one request alone."""

from __future__ import annotations

import pytest
import torch

from millstream.core.cache import ALL_LEVELS, EVERY_LEVEL
from millstream.core.events import Stepped
from millstream.core.registry import Choice
from millstream.core.request import Kind, SamplingParams
from millstream.core.sequence import Finish
from support import Heard


def greedy(max_tokens: int = 8, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 2, **more})


def sampled(seed: int, max_tokens: int = 8, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.9, "seed": seed, "max_tokens": max_tokens, "logprobs": 2, **more})


LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 90)


def stores(pages) -> list[torch.Tensor]:
    """The memory of a group's pages, (layers, blocks, ...) each."""
    return [pages.data] if hasattr(pages, "data") else [pages.k, pages.v]


def held_to_the_oracle(subject) -> None:
    if subject.kernels.oracle_atol is None:
        pytest.skip("kernels that round activations are not held to the naive generator")


def test_a_batch_of_one_equals_the_oracle(subject):
    held_to_the_oracle(subject)
    for length in LENGTHS:
        subject.judge(subject.alone(subject.prompt(length, length), greedy()), 8, alone=False)


def test_a_batch_of_many_lengths_equals_each_alone(subject):
    bench = subject.bench()
    heard = [bench.add(subject.prompt(length, length), greedy(4 + length % 5)) for length in LENGTHS]
    bench.run()
    assert bench.engine.max_running == len(LENGTHS)
    for one, length in zip(heard, LENGTHS, strict=True):
        subject.judge(one, 4 + length % 5)
    bench.close()


def test_requests_that_come_while_others_run_equal_each_alone(subject):
    bench = subject.bench(budget=11, max_rows=4)
    heard: list[Heard] = []

    def arrive(step: int) -> None:
        if step % 2 == 0 and len(heard) < len(LENGTHS):
            length = LENGTHS[(5 * len(heard)) % len(LENGTHS)]
            heard.append(bench.add(subject.prompt(length, length), greedy()))

    arrive(0)
    bench.run(between=arrive)
    assert len(heard) == len(LENGTHS)
    for one in heard:
        subject.judge(one, 8)
    bench.close()


def test_a_prompt_in_chunks_of_every_size_equals_the_whole(subject):
    # More than two blocks, so that chunks end inside blocks, at their edges and behind them.
    length = 2 * subject.block_size + 3
    ids = subject.prompt(length, 5)
    for budget in range(1, length + 1):
        bench = subject.bench(budget=budget, prefix="none")
        heard = bench.add(ids, greedy(3))
        assert bench.run() == -(-length // budget) + 2
        subject.judge(heard, 3)
        bench.close()


def test_a_chunked_prompt_beside_others_that_decode_equals_the_whole(subject):
    for budget in (3, 8, 13):
        bench = subject.bench(budget=budget)
        first = [bench.add(subject.prompt(4, seed), greedy(20)) for seed in (1, 2)]
        bench.step()
        late = bench.add(subject.prompt(70, 3), greedy(4))
        bench.run()
        for heard, count in zip([*first, late], (20, 20, 4), strict=True):
            subject.judge(heard, count)
        bench.close()


def test_a_warm_prefix_of_every_remainder_of_the_block_size_equals_cold(subject):
    size = subject.block_size
    bench = subject.bench()
    first = subject.prompt(4 * size, 1)
    bench.add(first, greedy(1))
    bench.run()
    for shared in range(1, 3 * size + 1):
        # Its own tail begins with a token that nobody else has at that place.
        tail = [token for token in subject.prompt(8, 100 + shared) if token != first[shared]][:5]
        heard = bench.add([*first[:shared], *tail], greedy(2))
        bench.run()
        cached = heard.last().usage.cached_tokens
        # A window's keys are held only near the end of what was computed, so a hit in the middle may not be one.
        windows = any(group.window for group in subject.decoder.spec.groups)
        assert cached <= shared and (windows or cached >= shared // size * size)
        subject.judge(heard, 2)
    bench.close()


def test_the_same_prompt_again_is_computed_from_its_last_token_only(subject):
    bench = subject.bench()
    ids = subject.prompt(3 * subject.block_size, 9)
    for turn in range(3):
        heard = bench.add(ids, greedy(6))
        bench.run()
        subject.judge(heard, 6)
        cached = heard.last().usage.cached_tokens
        assert cached == 0 if turn == 0 else 0 < cached < len(ids)
    bench.close()


def test_a_second_turn_over_its_own_answer_equals_cold(subject):
    bench = subject.bench()
    ids = subject.prompt(2 * subject.block_size - 3, 3)
    for turn in range(4):
        heard = bench.add(ids, greedy(5))
        bench.run()
        subject.judge(heard, 5)
        ids = [*ids, *heard.tokens(), *subject.prompt(3, 50 + turn)]
    bench.close()


@pytest.mark.parametrize("prefix", ["none", "radix"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_preempted_request_equals_one_that_never_was(subject, preemption, prefix):
    size = subject.block_size
    # Each fits alone; together they need three times what there is.
    bench = subject.bench(
        blocks=9, host_blocks=32 if preemption == "swap" else 0, preemption=preemption, prefix=prefix, budget=3 * size
    )
    swapped = False
    heard = [bench.add(subject.prompt(2 * size - 2 + i, i), greedy(3 * size)) for i in range(5)]
    sampling = bench.add(subject.prompt(size, 77), sampled(3, 2 * size))

    def watch(step: int) -> None:
        nonlocal swapped
        swapped = swapped or bench.swapped

    bench.run(between=watch)
    assert bench.preemptions > 0
    assert swapped == (preemption == "swap")
    for one in heard:
        subject.judge(one, 3 * size)
    subject.judge(sampling, 2 * size)
    bench.close()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_fewest_blocks_that_hold_one_request_serve_many(subject, preemption):
    size = subject.block_size
    bench = subject.bench(blocks=4, host_blocks=4, preemption=preemption, budget=size + 3)
    heard = [bench.add(subject.prompt(size + i, i), greedy(2 * size - 4)) for i in range(4)]
    bench.run()
    for one in heard:
        subject.judge(one, 2 * size - 4)
    bench.close()


def test_aborted_neighbours_leave_no_trace(subject):
    for step_of_abort in range(12):
        bench = subject.bench(budget=17)
        stay = [bench.add(subject.prompt(length, length), greedy(6)) for length in (20, 3)]
        # One neighbour shares half of a survivor's prompt, one has sequences of its own, one waits.
        go = [
            bench.add([*subject.prompt(20, 20)[:13], *subject.prompt(9, 1)], greedy(30)),
            bench.add(subject.prompt(25, 2), sampled(1, 30, n=3)),
        ]
        last = bench.add(subject.prompt(11, 5), greedy(6))

        def between(step: int, bench=bench, go=go, at=step_of_abort) -> None:
            if step == at:
                for one in go:
                    bench.engine.abort(one.request.id)

        bench.run(between=between)
        for one in [*stay, last]:
            subject.judge(one, 6)
        assert go[0].finish() is Finish.ABORT and {go[1].finish(i) for i in range(3)} == {Finish.ABORT}
        # What an aborted one computed may be found by a later one.
        after = bench.add([*go[0].request.prompt_ids, 7], greedy(4))
        bench.run()
        subject.judge(after, 4)
        bench.close()


def test_each_of_n_samples_equals_its_own_generation(subject):
    for length in (1, subject.block_size - 1, subject.block_size, 2 * subject.block_size + 1):
        bench = subject.bench(budget=10)
        ids = subject.prompt(length, length)
        heard = bench.add(ids, sampled(21, 12, n=4))
        other = bench.add(subject.prompt(9, 1), greedy(12))
        bench.run()
        assert sorted(heard.chunks) == [0, 1, 2, 3]
        assert len({tuple(heard.tokens(i)) for i in range(4)}) > 1
        subject.judge(heard, 12)
        subject.judge(other, 12)
        # The first of n is the sample that n = 1 gives.
        subject.same(heard, subject.alone(ids, sampled(21, 12)))
        bench.close()


def test_prompts_that_come_together_compute_a_long_prefix_once(subject):
    if any(group.window for group in subject.decoder.spec.groups):
        pytest.skip("a window's keys are held only near the end of what was computed")
    size, budget, own = subject.block_size, 40, 5
    shared = subject.prompt(5 * budget, 1)
    bench = subject.bench(budget=budget)
    heard = [bench.add([*shared, *subject.prompt(own, 10 + i)], greedy(3)) for i in range(6)]
    bench.run()
    computed = sum(event.tokens for event in bench.events if isinstance(event, Stepped))
    # The first fills the steps until its prompt is done; each of the others computes what its last block lacks.
    assert computed <= len(shared) + len(heard) * (size + own + 2)
    for one in heard:
        subject.judge(one, 3)
    bench.close()


@pytest.mark.parametrize("levels", [0, 1, ALL_LEVELS, EVERY_LEVEL])
def test_prefixes_read_once_for_all_rows_equal_each_alone(subject, levels):
    first, second = subject.prompt(150, 1), subject.prompt(80, 2)
    bench = subject.bench(budget=40)
    bench.runner.prefix_levels = levels
    bench.add([*first, *second], greedy(1))
    bench.run()
    # Two levels, suffixes of all lengths, siblings that fork, and a stranger; they come and go step by step.
    heard: list[Heard] = [bench.add(subject.prompt(90, 3), greedy(6))]

    def arrive(step: int) -> None:
        if step % 2 == 0 and len(heard) < 8:
            own = subject.prompt(1 + 7 * len(heard), 20 + len(heard))
            shared = [*first, *second] if len(heard) % 2 else first
            params = sampled(4, 9, n=3) if len(heard) == 5 else greedy(4 + len(heard))
            heard.append(bench.add([*shared, *own], params))

    bench.run(between=arrive)
    assert len(heard) == 8 and all(one.last().usage.cached_tokens > 0 for one in heard[1:])
    for one in heard:
        subject.judge(one)
    bench.close()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_n_samples_under_a_tiny_cache_equal_those_under_a_large_one(subject, preemption):
    size = subject.block_size
    bench = subject.bench(blocks=6, host_blocks=12, preemption=preemption, budget=size)
    heard = bench.add(subject.prompt(size + 5, 4), sampled(8, 2 * size, n=3))
    bench.run()
    assert bench.preemptions > 0
    subject.judge(heard, 2 * size)
    bench.close()


@pytest.mark.parametrize("blocks", [64, 8])
def test_two_plans_in_flight_equal_one(subject, blocks):
    runs = []
    for plans in (1, 2):
        bench = subject.bench(plans=plans, blocks=blocks, budget=20)
        heard = [bench.add(subject.prompt(length, length), greedy(14)) for length in (5, 30, 17)]
        heard.append(bench.add(subject.prompt(12, 3), sampled(5, 14, n=2)))
        # Penalties read the token that the plan before has just sampled.
        heard.append(bench.add(subject.prompt(6, 8), greedy(14, repetition_penalty=1.3, frequency_penalty=0.5)))
        bench.run()
        for one in heard[:-1]:
            subject.judge(one, 14)
        subject.like_alone(heard[-1])
        assert heard[-1].finish() is Finish.LENGTH
        runs.append([[one.tokens(i) for i in one.chunks] for one in heard])
        bench.close()
    assert runs[0] == runs[1]


def test_two_plans_in_flight_end_at_stop_tokens_and_aborts_like_one(subject):
    ids = subject.prompt(10, 2)
    whole = subject.alone(ids, greedy(12)).tokens()
    stop = whole[5]
    first = whole.index(stop)
    for plans in (1, 2):
        bench = subject.bench(plans=plans, budget=16)
        stopped = bench.add(ids, greedy(12, stop_token_ids=[stop]))
        gone = bench.add(subject.prompt(14, 4), greedy(30))
        stay = bench.add(subject.prompt(22, 6), greedy(12))
        bench.run(
            between=lambda step, bench=bench, gone=gone: bench.engine.abort(gone.request.id) if step == 4 else None
        )
        assert stopped.tokens() == whole[: first + 1] and stopped.finish() is Finish.STOP
        assert gone.finish() is Finish.ABORT
        subject.judge(stay, 12)
        bench.close()


@pytest.mark.parametrize("options", [{}, {"budget": 9, "max_rows": 3}, {"blocks": 9, "plans": 2}])
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(subject, options):
    bench = subject.bench(**options)
    heard = []
    for i, length in enumerate((3, 20, 41, 8)):
        bench.add(subject.prompt(5 + i, i), greedy(10))
        heard.append(bench.add(subject.prompt(length, i), sampled(1000 + i, 10)))
        bench.add(subject.prompt(length, i), sampled(2000 + i, 10))
    bench.run()
    for one in bench.heard:
        subject.judge(one, 10)
    assert heard[0].tokens() != bench.heard[2].tokens()
    bench.close()


def test_prompt_logprobs_do_not_depend_on_chunks_neighbours_or_preemption(subject):
    import oracle
    from support import close

    kernels = subject.kernels
    ids = subject.prompt(3 * subject.block_size + 2, 31)
    rows = oracle.logprobs(subject.reference, ids)
    first: list[float] | None = None
    for options in ({}, {"budget": 7}, {"budget": 9, "blocks": 7}, {"budget": 5, "plans": 2}):
        bench = subject.bench(**options)
        warm = bench.add(ids, greedy(1))
        bench.add(subject.prompt(2 * subject.block_size, 3), greedy(2 * subject.block_size))
        scored = bench.add(ids, SamplingParams(max_tokens=1, prompt_logprobs=2), kind=Kind.SCORE)
        both = bench.add(ids, greedy(3, prompt_logprobs=2))
        bench.run()
        subject.judge(warm, 1)
        subject.judge(both, 3, alone=False)
        for heard in (scored, both):
            told = heard.prompt_logprobs()
            assert told[0] is None and len(told) == len(ids)
            values = [entry.chosen.logprob for entry in told[1:]]
            first = values if first is None else first
            assert values == pytest.approx(first, rel=0, abs=2 * kernels.alone_atol)
            for at in range(1, len(ids)) if kernels.oracle_atol is not None else ():
                close(told[at], rows[at - 1], ids[at], kernels.oracle_atol, kernels.near_tie, f"prompt token {at}")
        bench.close()


def beams(subject, ids: list[int], width: int, max_tokens: int, **options) -> list[tuple[list[int], float]]:
    bench = subject.bench(**options)
    heard = bench.add(
        ids, SamplingParams(temperature=0.0, max_tokens=max_tokens), decode=Choice("beam", {"width": width})
    )
    bench.add(subject.prompt(20, 99), greedy(10))
    bench.run()
    subject.judge(bench.heard[1], 10)
    found = [(heard.tokens(i), heard.last(i).cumulative_logprob) for i in range(width)]
    bench.close()
    return found


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_beam_search_under_a_small_cache_equals_that_under_a_large_one(subject, preemption):
    size = subject.block_size
    ids = subject.prompt(size + 3, 12)
    large = beams(subject, ids, 3, size + 4)
    assert [sum(1 for _ in tokens) for tokens, _ in large] == [size + 4] * 3
    assert len({tuple(tokens) for tokens, _ in large}) == 3
    for options in (
        {"blocks": 12},
        {"blocks": 5, "budget": 9, "host_blocks": 16},
        {"blocks": 12, "plans": 2},
    ):
        small = beams(subject, ids, 3, size + 4, preemption=preemption, **options)
        for (tokens, score), (wanted, told) in zip(small, large, strict=True):
            assert tokens == wanted and abs(score - told) <= subject.kernels.alone_atol * len(tokens) + 1e-9


def test_beam_search_finds_what_a_naive_one_finds(subject):
    import oracle

    held_to_the_oracle(subject)
    width, steps = 3, 6
    ids = subject.prompt(9, 40)
    live = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, tokens in live:
            row = oracle.logprobs(subject.reference, [*ids, *tokens])[-1]
            best = row.topk(2 * width)
            grown += [
                (score + float(value), [*tokens, int(token)])
                for value, token in zip(best.values, best.indices, strict=True)
            ]
        live = sorted(grown, key=lambda entry: -entry[0])[:width]
    found = beams(subject, ids, width, steps)
    assert [tokens for tokens, _ in found] == [tokens for _, tokens in live]
    for (_, score), (want, _) in zip(found, live, strict=True):
        assert abs(score - want) <= subject.kernels.oracle_atol * steps


def test_what_lies_in_blocks_beyond_a_sequence_is_never_looked_at(subject):
    # Not even multiplied by zero: a broken request may have left anything there.
    for options in ({}, {"budget": 5}, {"blocks": 9}):
        bench = subject.bench(**options)
        for pages in bench.runner.pages.values():
            for memory in stores(pages):
                # Read as a float, bytes of ones are not a number.
                memory.view(torch.uint8).fill_(255)
        heard = [bench.add(subject.prompt(length, length), greedy(9)) for length in (1, 6, 19, 34)]
        bench.run()
        for one in heard:
            subject.judge(one, 9)
        bench.close()


def test_the_bench_would_notice_a_cache_that_lies(subject):
    # The suite's own alarm: another block's bytes in the place of a shared prefix must not pass.
    bench = subject.bench()
    ids = subject.prompt(3 * subject.block_size, 2)
    bench.add(ids, greedy(1))
    bench.run()
    for pages in bench.runner.pages.values():
        memory = stores(pages)[0]
        memory.copy_(memory.roll(1, dims=1))
    heard = bench.add([*ids, 5, 6], greedy(4))
    bench.run()
    assert heard.last().usage.cached_tokens > 0
    with pytest.raises(AssertionError):
        subject.judge(heard, 4)
    bench.close()
