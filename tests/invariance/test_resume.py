"""An answer that another engine takes up, from its tokens alone, is the one that a single engine would have given; and
so is one that had to be computed anew because keys and values in memory had gone bad."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from millstream.core.plan import Tier
from millstream.core.request import Prior, SamplingParams
from millstream.core.sequence import Finish
from support import Heard

ASKED = {
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "two sampled": {"temperature": 0.9, "seed": 11, "n": 2, "presence_penalty": 0.5, "top_p": 0.9},
}


@pytest.mark.parametrize("case", ASKED)
def test_an_answer_goes_on_in_another_engine(subject, case):
    params = SamplingParams(max_tokens=10, logprobs=2, **ASKED[case])
    ids = subject.prompt(37, 3)
    whole = subject.bench()
    truth = whole.add(ids, params)
    whole.add(subject.prompt(9, 4), params)
    steps = whole.run()
    whole.close()
    for step in range(2, steps, 3):
        first = subject.bench()
        heard = first.add(ids, params)
        for _ in range(step):
            first.step()
        prior = tuple(
            Prior(index, tuple(heard.tokens(index)), chunks[-1].cumulative_logprob, chunks[-1].finish is not None)
            for index, chunks in heard.chunks.items()
        )
        if prior and all(one.ended for one in prior):
            continue
        second = subject.bench(budget=13)
        second.add(subject.prompt(50, 5), SamplingParams(max_tokens=4, temperature=0.0))
        request = replace(heard.request, id=1, prior=prior)
        rest = Heard(request)
        second.engine.submit(request, rest.take)
        second.run()
        second.close()
        joined = Heard(heard.request)
        for index in range(params.n):
            joined.chunks[index] = [*heard.chunks.get(index, []), *rest.chunks.get(index, [])]
            subject.same(joined, truth, index)
            total = truth.last(index).cumulative_logprob
            if joined.tokens(index) == truth.tokens(index):
                assert joined.last(index).cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_bad_keys_and_values_in_the_cache_change_no_text(subject):
    if subject.kernels.kv != "plain":
        pytest.skip("codes hold no number that is not finite")
    ids, params = subject.prompt(40, 6), SamplingParams(max_tokens=6, temperature=0.0, logprobs=1)
    bench = subject.bench()
    first = bench.add(ids, params)
    bench.run()
    for pages in bench.runner.pages.values():
        for store in pages._pools[Tier.DEVICE]:
            store.fill_(torch.nan)
    again = bench.add(ids, params)
    other = bench.add(subject.prompt(21, 7), params)
    bench.run()
    subject.same(again, first)
    subject.judge(other)
    assert again.finish() is Finish.LENGTH and other.finish() is Finish.LENGTH
    assert bench.engine.counters["cold_retries"] == 1 and bench.engine.counters["corrupted_requests"] == 0
    cold = bench.add(ids, params)
    bench.run()
    assert cold.last().usage.cached_tokens == 0, "what was computed anew is not remembered, what was bad neither"
    bench.close()
