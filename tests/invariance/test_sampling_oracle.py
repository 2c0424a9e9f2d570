"""Sampling against its definition: a formula in plain numpy, and the frequencies of many draws.

The formula is written from what the parameters are said to mean, not from the code under test: rows of a few dozen
logits, in float64, one rule after the other.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core.plan import SampleAsk
from millstream.core.request import SamplingParams
from millstream.decode.methods.autoregressive.device import Autoregressive

VOCAB = 32
# Draws of a frequency test, and the chance that a right sampler fails one. Seeds are fixed: it passes always or never.
DRAWS = 4000
SIGNIFICANCE = 1e-4

LOGITS = np.random.default_rng(3).normal(0.0, 2.0, VOCAB).astype(np.float32)
HISTORY = (4, 9, 9, 30, 4, 4, 17, 9, 4)
NUM_PROMPT = 4


def formula(
    logits: np.ndarray,
    params: SamplingParams,
    history: tuple[int, ...] = (),
    num_prompt: int = 0,
    banned: tuple[int, ...] = (),
) -> np.ndarray:
    """The probability of each token. Ties at the edge of top_k and top_p all stay in."""
    x = logits.astype(np.float64).copy()
    # A bias is part of the logits that penalties then act on, as in other engines.
    for token, bias in params.logit_bias.items():
        x[token] = -math.inf if bias == -100 else x[token] + bias
    for token in set(history):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in history[num_prompt:]:
        x[token] -= params.frequency_penalty
    for token in set(history[num_prompt:]):
        x[token] -= params.presence_penalty
    x[list(banned)] = -math.inf
    if params.greedy:
        return (np.arange(len(x)) == int(np.argmax(x))).astype(float)
    x = x / params.temperature
    if params.top_k > 0:
        kth = sorted(x, reverse=True)[min(params.top_k, len(x)) - 1]
        x[x < kth] = -math.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    p /= p.sum()
    if params.top_p < 1:
        order = sorted(p, reverse=True)
        held, floor = 0.0, order[-1]
        for value in order:
            held += value
            if held >= params.top_p:
                floor = value
                break
        p[p < floor] = 0.0
    return p / p.sum()


def draw(logits: np.ndarray, params: SamplingParams, seeds, history=(), num_prompt=0, banned=()) -> list[int]:
    """One token for each seed, all in one batch."""
    asks = [
        SampleAsk(params, seed, 0, len(history), num_prompt, history if params.reads_history else (), banned)
        for seed in seeds
    ]
    rows = torch.tensor(logits).repeat(len(asks), 1)
    tokens, _, faults = Autoregressive().settle(rows, asks, [ask.history for ask in asks])
    assert faults == [None] * len(asks)
    return tokens


def chi_square_limit(degrees: int) -> float:
    """The value that a chi-square variable exceeds with a chance of SIGNIFICANCE (Wilson and Hilferty, 1931)."""
    z = 3.719  # the normal quantile of 1 - 1e-4
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def frequencies_agree(tokens: list[int], p: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0, "a token of no probability was drawn"
    # Rare ones are pooled: the test wants some five expected draws in each class.
    common = p * len(tokens) >= 5
    observed, expected = list(counts[common]), list(p[common] * len(tokens))
    if (rare := ~common & (p > 0)).any():
        observed.append(counts[rare].sum())
        expected.append(p[rare].sum() * len(tokens))
    if len(observed) == 1:
        return
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert statistic < chi_square_limit(len(observed) - 1), f"{statistic:.1f} over {len(observed)} classes"


PARAMS = {
    "temperature 1": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 500},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "top_k, top_p and min_p": {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 0.7},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.4},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below one": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {3: 4.0, 9: -3.0, 11: -100.0, 0: 1.5}},
    "all of it": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 2.0, 1: -100.0},
    },
}


@pytest.mark.parametrize("name", PARAMS)
def test_frequencies_follow_the_formula(name):
    params = SamplingParams(**PARAMS[name])
    tokens = draw(LOGITS, params, range(DRAWS), HISTORY, NUM_PROMPT)
    frequencies_agree(tokens, formula(LOGITS, params, HISTORY, NUM_PROMPT))


def test_the_frequency_test_sees_a_wrong_temperature():
    tokens = draw(LOGITS, SamplingParams(temperature=1.1), range(DRAWS))
    with pytest.raises(AssertionError):
        frequencies_agree(tokens, formula(LOGITS, SamplingParams(temperature=1.0)))


def test_positions_and_samples_are_as_independent_as_seeds():
    params = SamplingParams(temperature=1.0)
    p = formula(LOGITS, params)
    for vary in ("index", "position"):
        asks = [
            SampleAsk(params, 7, i if vary == "index" else 0, i if vary == "position" else 5, 0) for i in range(DRAWS)
        ]
        tokens, _, _ = Autoregressive().settle(torch.tensor(LOGITS).repeat(DRAWS, 1), asks, [()] * DRAWS)
        frequencies_agree(tokens, p)
        # One token says nothing of the next: pairs are as frequent as the product of the two says.
        big = np.argsort(-p)[:3]
        pairs = {(a, b): 0 for a in big for b in big}
        for a, b in itertools.pairwise(tokens):
            if (a, b) in pairs:
                pairs[(a, b)] += 1
        for (a, b), count in pairs.items():
            expected = p[a] * p[b] * (DRAWS - 1)
            assert abs(count - expected) < 5 * math.sqrt(expected), f"{vary}: {a} then {b}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.integers(-60, 60), min_size=2, max_size=40),
    temperature=st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 7, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    penalties=st.tuples(
        st.sampled_from([0.0, 1.0, -2.0]), st.sampled_from([0.0, 0.5]), st.sampled_from([1.0, 1.5, 0.2])
    ),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_the_token_wins_the_gumbel_race_of_the_formula(logits, temperature, top_k, top_p, min_p, penalties, seed, data):
    from millstream.ops.ref.random import uniform

    row = np.array(logits, np.float32) / 8
    history = tuple(data.draw(st.lists(st.integers(0, len(row) - 1), max_size=6)))
    num_prompt = data.draw(st.integers(0, len(history)))
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        repetition_penalty=penalties[2],
    )
    token = draw(row, params, [seed], history, num_prompt)[0]
    p = formula(row, params, history, num_prompt)
    if params.greedy:
        # Penalties in float32 may turn a tie of the formula either way.
        penalized = formula(
            row,
            SamplingParams(**{**_fields(params), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}),
            history,
            num_prompt,
        )
        assert penalized[token] >= penalized.max() * (1 - 1e-5)
        return
    numbers = np.array([uniform(seed, 0, len(history), token) for token in range(len(row))])

    def winners(p: np.ndarray) -> set[int]:
        """Whoever is within rounding of the largest of logprob and Gumbel noise."""
        with np.errstate(divide="ignore"):
            race = np.log(p) - np.log(-np.log(numbers))
        return {int(t) for t in np.flatnonzero(race >= race.max() - 1e-4)}

    allowed = winners(p)
    if token not in allowed:
        # A filter's edge may fall between two values that only rounding tells apart.
        edges = [
            formula(row, SamplingParams(**{**_fields(params), name: value}), history, num_prompt)
            for name, value in (
                ("top_p", min(1.0, top_p * (1 + 1e-5))),
                ("top_p", top_p * (1 - 1e-5)),
                ("min_p", min(1.0, min_p * (1 + 1e-5))),
                ("min_p", min_p * (1 - 1e-5)),
            )
        ]
        allowed = set().union(*(winners(q) for q in edges))
    assert token in allowed


def _fields(params: SamplingParams) -> dict:
    names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    return {name: getattr(params, name) for name in names}


def test_logprobs_and_ranks_are_those_of_the_model_whatever_the_sampling():
    row = np.round(LOGITS, 1)
    row[5] = row[6]  # a tie: both have the better rank
    params = SamplingParams(temperature=0.3, top_k=2, logit_bias={7: 50.0}, repetition_penalty=1.5)
    want = row.astype(np.float64) - math.log(np.exp(row.astype(np.float64)).sum())
    ask = SampleAsk(params, 1, 0, 9, 4, HISTORY, top_logprobs=5)
    (token,), (told,), faults = Autoregressive().settle(torch.tensor(row[None]), [ask], [HISTORY])
    assert faults == [None] and token == 7 and told is not None
    assert told.chosen.token == 7
    assert told.chosen.logprob == pytest.approx(want[7], abs=1e-5)
    assert told.chosen.rank == 1 + int((want > want[7] + 1e-7).sum())
    best = sorted(want, reverse=True)[:5]
    assert [entry.rank for entry in told.top] == [1, 2, 3, 4, 5]
    assert [entry.logprob for entry in told.top] == pytest.approx(best, abs=1e-5)
    assert all(want[entry.token] == pytest.approx(entry.logprob, abs=1e-5) for entry in told.top)


def test_rows_with_and_without_logprobs_share_a_batch():
    asks = [SampleAsk(SamplingParams(temperature=0.0), 0, 0, 0, 0, top_logprobs=top) for top in (None, 0, 3, 20)]
    tokens, told, _ = Autoregressive().settle(torch.tensor(LOGITS).repeat(4, 1), asks, [()] * 4)
    assert tokens == [int(LOGITS.argmax())] * 4
    assert told[0] is None and [len(entry.top) for entry in told[1:]] == [0, 3, 20]


def test_banned_tokens_are_never_drawn():
    best = tuple(int(token) for token in np.argsort(-LOGITS)[:3])
    for temperature in (0.0, 1.0, 50.0):
        params = SamplingParams(temperature=temperature)
        tokens = draw(LOGITS, params, range(500), banned=best)
        assert not set(tokens) & set(best)
        assert set(tokens) <= set(np.nonzero(formula(LOGITS, params, banned=best))[0])


def test_where_every_token_is_banned_only_that_row_fails():
    fine = SampleAsk(SamplingParams(temperature=0.0), 0, 0, 0, 0, top_logprobs=1)
    everything = SampleAsk(SamplingParams(temperature=1.0), 0, 0, 0, 0, banned=tuple(range(VOCAB)))
    by_bias = SampleAsk(SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -100.0)), 0, 0, 0, 0)
    asks = [fine, everything, fine, by_bias, fine]
    tokens, told, faults = Autoregressive().settle(torch.tensor(LOGITS).repeat(5, 1), asks, [()] * 5)
    assert faults == [None, "every token is banned", None, "every token is banned", None]
    assert {tokens[i] for i in (0, 2, 4)} == {int(LOGITS.argmax())}
    assert told[0] == told[2] == told[4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_own_row_only(value):
    rows = torch.tensor(LOGITS).repeat(3, 1)
    rows[1, 4] = value
    asks = [SampleAsk(SamplingParams(seed=1), 1, 0, place, 0, top_logprobs=2) for place in range(3)]
    tokens, told, faults = Autoregressive().settle(rows, asks, [()] * 3)
    assert faults[0] is None and faults[2] is None and "not finite" in str(faults[1])
    for place in (0, 2):
        alone, also, _ = Autoregressive().settle(torch.tensor(LOGITS)[None].clone(), [asks[place]], [()])
        assert tokens[place] == alone[0] and told[place] == also[0]


def test_min_tokens_bans_what_would_end_the_output_and_no_longer():
    from support import Bench, prompt, tiny_decoder

    decoder = tiny_decoder("tiny-llama", "ref")
    ids = prompt(6, 1)
    bench = Bench(decoder)
    free = bench.add(ids, SamplingParams(temperature=0.0, max_tokens=12))
    bench.run()
    stop = free.tokens()[2]
    assert stop not in free.tokens()[:2]
    for min_tokens in (0, 1, 2, 3, 6):
        heard = bench.add(
            ids, SamplingParams(temperature=0.0, max_tokens=12, min_tokens=min_tokens, stop_token_ids=[stop])
        )
        bench.run()
        tokens = heard.tokens()
        # The stop token itself comes after min_tokens others, at the earliest.
        assert len(tokens) > min_tokens and stop not in tokens[:min_tokens]
        if min_tokens <= 2:
            assert tokens == free.tokens()[:3]
