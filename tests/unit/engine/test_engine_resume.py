"""What an engine that is gone had answered is taken up by another: the whole is what one engine would have said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import VOCAB, Bench

from millstream.core import registry
from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import BadRequest
from millstream.core.registry import Choice
from millstream.core.request import Kind, Prior, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.text.vocabulary import Vocabulary

PROMPT = [7, 7, 3, 1, 9, 2, 8]
VOCABULARY = Vocabulary(VOCAB, lambda token: b"%d " % token)


def observers(request):
    kinds = [registry.get("observer", name) for name in registry.names("observer")]
    return [kind(request, VOCABULARY) for kind in kinds if kind.wanted(request)]


def told(bench, request):
    """By output: tokens, logprobs, how it ended, and the sums over the whole."""
    out = {}
    for index in range(request.params.n):
        chunks = bench.chunks.get((request.id, index), [])
        ended = chunks[-1] if chunks and chunks[-1].finish is not None else None
        out[index] = (
            [token for chunk in chunks for token in chunk.tokens],
            [entry for chunk in chunks for entry in chunk.logprobs],
            None if ended is None else (ended.finish, ended.stop_reason, ended.usage.output_tokens),
            chunks[-1].cumulative_logprob if chunks else 0.0,
        )
    return out


def prior_of(state):
    return tuple(
        Prior(index, tuple(tokens), total, end is not None)
        for index, (tokens, _, end, total) in state.items()
        if tokens or end is not None
    )


CASES = {
    "greedy": {"temperature": 0.0, "max_tokens": 9},
    "seeded": {"temperature": 1.0, "seed": 5, "max_tokens": 9},
    "three outputs": {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 7},
    "logprobs": {"temperature": 1.0, "seed": 6, "n": 2, "max_tokens": 6, "logprobs": 3},
    "min tokens": {"temperature": 0.0, "max_tokens": 12, "min_tokens": 5, "stop_token_ids": tuple(range(0, VOCAB, 4))},
    "stop token": {
        "temperature": 1.0,
        "seed": 7,
        "n": 2,
        "max_tokens": 12,
        "stop_token_ids": tuple(range(0, VOCAB, 6)),
    },
    # "3 1" spans two tokens, and may be cut between them.
    "stop strings": {"temperature": 1.0, "seed": 8, "n": 4, "max_tokens": 25, "stop": ("1 2", "3 4", "4 1", "2 3")},
}
CONFIGS = {
    "roomy": {"num_blocks": 64},
    "tight": {"num_blocks": 9},
    "window": {"num_blocks": 24, "groups": (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 5))},
}


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_a_request_goes_on_from_any_step_as_if_nothing_had_happened(case, config, plans):
    def build():
        return Bench(plans=plans, observers=observers, context=128, **CONFIGS[config])

    whole = build()
    asked = whole.add(PROMPT, params=CASES[case])
    steps = whole.run()
    truth = told(whole, asked)
    for step in range(1, steps):
        first = build()
        request = first.add(PROMPT, params=CASES[case])
        for _ in range(step):
            first.step()
        state = told(first, request)
        if all(end is not None for _, _, end, _ in state.values()):
            continue
        second = build()
        again = replace(request, id=1, prior=prior_of(state))
        chunks = {}
        second.engine.submit(again, lambda chunk, into=chunks: into.setdefault(chunk.index, []).append(chunk))
        bystander = second.add([4, 4], 5)
        second.run()
        second.clean()
        assert second.output(bystander) == second.truth(bystander)
        second.chunks = {(again.id, index): own for index, own in chunks.items()}
        rest = told(second, again)
        for index, (tokens, logprobs, end, total) in truth.items():
            before, now = state[index], rest[index]
            assert before[0] + now[0] == tokens, f"output {index} cut after step {step}"
            assert before[1] + now[1] == logprobs
            if before[2] is not None:
                assert index not in chunks, "an output that had ended is made again"
                assert before[2] == end
            else:
                assert now[2] == end
                assert now[3] == pytest.approx(total)


def test_a_method_that_needs_more_than_tokens_says_so():
    bench = Bench()
    request = Request(
        1, (Tokens((1, 2)),), SamplingParams(temperature=0.0), decode=Choice("beam"), prior=(Prior(0, (3,)),)
    )
    with pytest.raises(BadRequest, match="prior"):
        bench.engine.submit(request, lambda chunk: None)
    bench.clean()


@pytest.mark.parametrize(
    ("prior", "params", "param"),
    [
        ((Prior(0, (3,) * 16),), {}, "prior"),
        ((Prior(0, (VOCAB,)),), {}, "prior"),
        ((Prior(0, (-1,)),), {}, "prior"),
        ((Prior(0, (3,)), Prior(0, (3,))), {"n": 2}, "prior"),
        ((Prior(1, (3,)),), {}, "prior"),
        ((Prior(-1, (3,)),), {}, "prior"),
        ((Prior(0, (3,), 0.0, True),), {}, "prior"),
        ((Prior(0, (3,)),), {"temperature": 1.0}, "seed"),
        ((Prior(0, (3,)),), {"prompt_logprobs": 1}, "prompt_logprobs"),
        ((Prior(0, (1, 2)),), {"stop": ("1 2",)}, "prior"),
    ],
)
def test_a_prior_that_cannot_be_is_refused(prior, params, param):
    bench = Bench(observers=observers)
    request = Request(1, (Tokens((1, 2)),), SamplingParams(**{"temperature": 0.0, **params}), prior=prior)
    with pytest.raises(BadRequest, match=param):
        bench.engine.submit(request, lambda chunk: None)
    assert not bench.engine.busy
    bench.clean()


def test_nothing_is_taken_up_of_a_prompt_that_is_only_scored():
    request = Request(1, (Tokens((1, 2)),), SamplingParams(temperature=0.0), kind=Kind.SCORE, prior=(Prior(0, (3,)),))
    with pytest.raises(BadRequest, match="prior"):
        Bench().engine.submit(request, lambda chunk: None)


def test_cached_tokens_of_a_request_that_is_taken_up_are_those_of_its_prompt():
    bench = Bench()
    bench.add(PROMPT, 12)
    bench.run()
    output = bench.output(bench.requests[0])
    chunks = []
    again = Request(
        9,
        (Tokens(tuple(PROMPT)),),
        SamplingParams(max_tokens=12, temperature=0.0),
        prior=(Prior(0, tuple(output[:8])),),
    )
    bench.engine.submit(again, chunks.append)
    bench.run()
    assert [t for c in chunks for t in c.tokens] == output[8:] and chunks[-1].finish is Finish.LENGTH
    assert chunks[-1].usage.cached_tokens == len(PROMPT) and chunks[-1].usage.output_tokens == 12
