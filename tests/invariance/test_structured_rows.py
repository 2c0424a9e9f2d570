"""Rows that a grammar restricts, among rows that none does: each gets what it gets alone, as far as kernels promise."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import oracle
from millstream.core.plan import SampleAsk
from millstream.core.request import SamplingParams, Structured
from millstream.core.sequence import Finish
from millstream.decode.methods.autoregressive.device import Autoregressive
from support import Heard, token_text

pytest.importorskip("llguidance")

TEENS = Structured.regex("(1[0-9] ){6}")
ODD = Structured.regex("([0-9]*[13579] )+")
PAIR = Structured.choice(["5 60 7 ", "5 61 8 "])


def params(structured: Structured | None, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 9, "logprobs": 2, "structured": structured, **more})


def text(heard: Heard, index: int = 0) -> str:
    return b"".join(map(token_text, heard.tokens(index))).decode()


MIX = [
    params(TEENS),
    params(None),
    params(ODD, temperature=0.9, seed=3),
    params(PAIR, temperature=0.7, seed=4, n=2),
    params(None, temperature=0.9, seed=5),
    params(ODD, temperature=1.3, seed=6, top_p=0.8, repetition_penalty=1.3, logit_bias={11: 3.0}),
]


@pytest.mark.parametrize("plans", [1, 2])
def test_structured_and_free_rows_in_one_batch_equal_each_alone(subject, plans):
    bench = subject.bench(plans=plans, budget=24, blocks=1024 // subject.block_size)
    heard = [bench.add(subject.prompt(20 + n, n % 3), own) for n, own in enumerate(MIX)]
    bench.run()
    for one in heard:
        subject.like_alone(one)
    for one, pattern in ((heard[0], TEENS.text), (heard[2], ODD.text), (heard[5], ODD.text)):
        whole = re.fullmatch(pattern, text(one))
        assert whole or one.finish() is Finish.LENGTH
    assert {text(heard[3], index) for index in range(2)} <= {"5 60 7 ", "5 61 8 "}
    bench.close()


def test_a_structured_row_that_loses_its_place_goes_on_where_it_was(subject):
    bench = subject.bench(blocks=-(-90 // subject.block_size) + 1, prefix="none", budget=16)
    heard = [bench.add(subject.prompt(30, n), params(ODD, max_tokens=24, temperature=0.9, seed=n)) for n in range(3)]
    bench.run()
    assert bench.preemptions > 0
    for one in heard:
        subject.like_alone(one)
    bench.close()


def test_the_chosen_token_is_the_likeliest_of_those_allowed(subject):
    if subject.kernels.oracle_atol is None:
        pytest.skip("kernels that round activations are not held to the naive generator")
    heard = subject.alone(subject.prompt(12, 1), params(TEENS))
    ids, tokens = heard.request.prompt_ids, heard.tokens()
    rows = oracle.logprobs(subject.reference, [*ids, *tokens])
    for at, (token, told) in enumerate(zip(tokens, heard.logprobs(), strict=True)):
        row, before = rows[len(ids) + at - 1], b"".join(map(token_text, tokens[:at])).decode()
        fit = [other for other in range(11, 20) if re.fullmatch("(1[0-9] )*", before)] or [token]
        assert row[token] >= row[fit].max() - subject.kernels.near_tie
        # Logprobs are the model's own, as if there were no grammar.
        assert abs(told.chosen.logprob - float(row[token])) <= subject.kernels.oracle_atol


def test_where_bias_and_grammar_leave_nothing_the_row_ends_with_an_error(subject):
    bench = subject.bench()
    stuck = bench.add(subject.prompt(8, 1), params(PAIR, logit_bias={5: -100.0, 6: 1.0}))
    fine = bench.add(subject.prompt(8, 2), params(None))
    bench.run()
    assert stuck.finish() is Finish.ERROR and "banned" in (stuck.last().error or "")
    subject.like_alone(fine)
    bench.close()


@pytest.mark.parametrize("short", [False, True])
def test_the_mask_takes_out_what_it_does_not_name_and_all_beyond_its_end(short):
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    allowed = bytes([0b10, 0, 0b100]) + (b"" if short else bytes([0xFF, 0xFF]))
    free = SampleAsk(SamplingParams(temperature=0.0), 0, 0, 1, 1)
    asks = [free, dataclasses.replace(free, allowed=allowed)]
    tokens, _, faults = Autoregressive().settle(logits, asks, [(), ()])
    named = [1, 18, *([] if short else range(24, 40))]
    assert tokens == [int(before[0].argmax()), named[int(before[1][named].argmax())]] and faults == [None, None]
    assert torch.equal(logits[0], before[0]) and torch.isinf(logits[1]).sum() == 40 - len(named)
    assert [ask.may(18) for ask in asks] == [True, True] and [ask.may(2) for ask in asks] == [True, False]
    assert asks[1].may(39) is not short


def test_a_token_found_without_logits_is_the_one_that_they_give(subject):
    """Forced tokens, and likeliest ones that are allowed, are settled before any logits are kept."""
    asked = [TEENS, ODD, PAIR, Structured.regex("7{9}|123456789")]
    plain = [subject.alone(subject.prompt(9 + n, n), params(one, logprobs=None)) for n, one in enumerate(asked)]
    kept = [subject.alone(subject.prompt(9 + n, n), params(one, logprobs=0)) for n, one in enumerate(asked)]
    for one, other in zip(plain, kept, strict=True):
        assert one.tokens() == other.tokens() and one.finish() is other.finish()
    method, free = Autoregressive(), SampleAsk(SamplingParams(temperature=0.7), 0, 0, 1, 1)
    assert method.forced(dataclasses.replace(free, allowed=bytes([0, 0b100]))) == 10
    for ask in (
        free,
        dataclasses.replace(free, allowed=bytes([0b101])),
        dataclasses.replace(free, allowed=bytes(2)),
        dataclasses.replace(free, allowed=bytes([1]), top_logprobs=0),
        dataclasses.replace(free, allowed=bytes([1]), banned=(0,)),
        dataclasses.replace(free, allowed=bytes([1]), params=SamplingParams(logit_bias={0: -100.0})),
    ):
        assert method.forced(ask) is None
