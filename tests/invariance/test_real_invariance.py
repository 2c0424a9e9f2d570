"""The same properties on SmolLM2-135M, with fewer cases: real weights have logits that random ones have not."""

from __future__ import annotations

import pytest

from millstream.core.request import SamplingParams

TEXT = (
    "The mill stood at the bend of the stream, and its wheel turned day and night. Flour went down the river on flat "
    "boats, and grain came up. In the year of the great frost the wheel stood still for the first time, and people "
    "came out of their houses to hear the silence. "
)


@pytest.fixture(scope="module")
def ids(real_subject):
    from millstream.models.opened import open_model
    from real import model_path

    return open_model(str(model_path("smollm2-135m"))).tokenizer().encode(TEXT)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=3)


def sampled(seed: int, max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, max_tokens=max_tokens, n=n, logprobs=3)


def test_batch_chunks_and_prefix_of_a_real_model_equal_alone(real_subject, ids):
    bench = real_subject.bench(budget=19)
    heard = [
        bench.add(ids[:1], greedy(6)),
        bench.add(ids[:30], greedy(6)),
        bench.add(ids[:33], sampled(4, 6, n=2)),
        bench.add([*ids[:21], *ids[40:50]], greedy(6)),
    ]
    bench.run()
    heard.append(bench.add([*ids[:37], *ids[5:9]], greedy(4)))
    bench.run()
    assert heard[-1].last().usage.cached_tokens > 0
    for one in heard:
        real_subject.judge(one)
    bench.close()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_and_aborted_neighbours_of_a_real_model_equal_alone(real_subject, ids, preemption):
    size = real_subject.block_size
    bench = real_subject.bench(blocks=5, host_blocks=8, preemption=preemption, budget=3 * size, plans=2)
    heard = [bench.add(ids[i : i + size - 2], greedy(size + 5)) for i in range(3)]
    gone = bench.add(ids[10 : 10 + size], sampled(1, size))
    bench.run(between=lambda step: bench.engine.abort(gone.request.id) if step == 7 else None)
    assert bench.preemptions > 0
    for one in heard:
        real_subject.judge(one, size + 5)
    bench.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_prompt_at_every_chunk_size_and_every_prefix_equals_alone(real_subject, ids):
    size = real_subject.block_size
    whole = ids[: 2 * size + 3]
    for budget in range(1, len(whole) + 1):
        bench = real_subject.bench(budget=budget, prefix="none")
        heard = bench.add(whole, greedy(2))
        bench.run()
        real_subject.judge(heard, 2)
        bench.close()
    bench = real_subject.bench()
    bench.add(whole, greedy(1))
    bench.run()
    for shared in range(1, len(whole)):
        heard = bench.add([*whole[:shared], *ids[50:53]], greedy(2))
        bench.run()
        real_subject.judge(heard, 2)
    bench.close()
