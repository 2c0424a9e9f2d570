"""Bounds of requests: checked once, told by the name of the field."""

from __future__ import annotations

import math

import pytest

from millstream.core.errors import BadRequest, RequestFault
from millstream.core.request import Hints, Kind, Limits, Program, Request, SamplingParams, Tokens, Vectors

WRONG = {
    "n": [0, 129, 1.5, True, "2"],
    "max_tokens": [0, -1, 2.0, 2**31, True],
    "min_tokens": [-1, 1.0, 17],
    "temperature": [-0.1, 100.5, math.nan, math.inf, "hot", True],
    "top_p": [0, 0.0, 1.01, -1, math.nan],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.01, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1, None],
    "repetition_penalty": [0, -1, 101],
    "seed": [-1, 2**63, 1.0, "7"],
    "logprobs": [-1, 21, 1.0, True],
    "prompt_logprobs": [-1, 21],
    "stop": [[""], ["a"] * 17, ["x" * 1025], [3], 5],
    "stop_token_ids": [[-1], [1.5], 7, list(range(1025))],
    "logit_bias": [{-1: 0.0}, {1: 101.0}, {1: math.nan}, {"1": 1.0}, [1], dict.fromkeys(range(1025), 0.0)],
    "ignore_eos": [1, None],
    "skip_special_tokens": ["yes"],
    "include_stop_str_in_output": [0],
}


@pytest.mark.parametrize(("param", "got"), [(param, got) for param, values in WRONG.items() for got in values])
def test_a_value_out_of_bounds_is_a_bad_request_that_names_it(param, got):
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{param: got})
    assert caught.value.param == param and caught.value.allowed
    assert param in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0},
        {"top_p": 1, "top_k": -1, "min_p": 1},
        {"n": 128, "max_tokens": None, "min_tokens": 5},
        {"stop": "one string"},
        {"stop_token_ids": [1, 2], "logit_bias": {3: -100, 4: 100.0}, "seed": 2**63 - 1},
        {"logprobs": 0, "prompt_logprobs": 20},
    ],
)
def test_the_edges_of_the_bounds_are_inside(given):
    SamplingParams(**given)


def test_params_keep_their_own_copies():
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[5] = 1.0
    assert params.stop == ("a",) and params.logit_bias == {1: 2.0}
    assert SamplingParams(stop="word").stop == ("word",)


def test_greedy_and_history_are_told_by_the_values():
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert not SamplingParams().reads_history
    assert SamplingParams(repetition_penalty=1.1).reads_history
    assert SamplingParams(presence_penalty=-1).reads_history


LIMITS = Limits(vocab_size=100, max_context=32, kv_tokens=24)


def ask(prompt, **given):
    params = SamplingParams(**given.pop("params", {}))
    return Request(1, (Tokens(tuple(prompt)),), params, **given)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask([]), "prompt"),
        (ask([100]), "prompt"),
        (ask([-1]), "prompt"),
        (ask([True]), "prompt"),
        (ask(["1"]), "prompt"),
        (ask([1] * 32, params={"max_tokens": 1}), "prompt"),
        (ask([1] * 25, params={"max_tokens": 1}), "prompt"),
        (ask([1] * 20, params={"max_tokens": 13}), "max_tokens"),
        (ask([1], params={"logit_bias": {100: 1.0}}), "logit_bias"),
        (ask([1], params={"stop_token_ids": [100]}), "stop_token_ids"),
        (ask([1], adapter="mine"), "adapter"),
        (ask([1], kind=Kind.EMBED), "kind"),
        (Request(1, (Vectors(b"", "float32", (2, 4)),)), "prompt"),
    ],
)
def test_what_an_engine_can_never_take_is_refused_by_name(request_, param):
    with pytest.raises(BadRequest) as caught:
        request_.check(LIMITS)
    assert caught.value.param == param


def test_requests_at_the_limits_are_taken():
    ask([99] * 24, params={"max_tokens": 8}).check(LIMITS)
    ask([0] * 24, kind=Kind.SCORE).check(LIMITS)
    ask([0], params={"max_tokens": None}).check(LIMITS)
    ask([1], adapter="mine").check(Limits(100, 32, 24, adapters=frozenset({"mine"})))


def test_ids_that_are_known_to_be_in_bounds_are_looked_at_only_where_the_bound_is_lower():
    limits = Limits(100, 50, 1000)
    Request(1, (Tokens((1, 99), below=100),)).check(limits)
    assert Tokens((1,), below=100) == Tokens((1,))
    for tokens in (Tokens((1, 100), below=101), Tokens((1, 100))):
        with pytest.raises(BadRequest, match="token ids from 0 to 99"):
            Request(1, (Tokens((3,), below=100), tokens)).check(limits)


def test_a_prompt_of_several_stretches_counts_as_one():
    request = Request(1, (Tokens((1, 2)), Tokens((3,))))
    assert request.num_prompt == 3 and request.prompt_ids == [1, 2, 3]


def test_the_true_length_is_known_only_where_an_oracle_told_it():
    assert Hints(oracle=7).oracle_output_len == 7
    with pytest.raises(RequestFault, match="no oracle arm"):
        _ = Hints(expected_output_len=7).oracle_output_len


def test_a_bad_value_is_shown_shortened():
    assert len(str(BadRequest("stop", "x" * 10_000, "less"))) < 200


@pytest.mark.parametrize(
    ("param", "got"),
    [
        ("id", ""),
        ("id", "p" * 513),
        ("id", 3),
        ("call", -1),
        ("call", 1.0),
        ("call", 2**63),
        ("thread", True),
        ("stage", None),
        ("stage", "s" * 129),
        ("parents", 3),
        ("parents", (-1,)),
        ("parents", (0.5,)),
        ("parents", (7,)),
        ("parents", range(1025)),
        ("service_s", -1),
        ("service_s", math.nan),
        ("service_s", math.inf),
    ],
)
def test_a_place_in_a_program_is_checked_when_it_is_made(param, got):
    with pytest.raises(BadRequest) as caught:
        Program(**{"id": "p", "call": 7, param: got})
    assert caught.value.param == f"program.{param}"


def test_parents_are_numbers_none_or_not_known():
    assert Program("p", 7, parents=[0, 3]).parents == (0, 3)
    assert Program("p", parents=()).parents == () and Program("p").parents is None
    assert hash(Program("p", 7, parents=[0])) == hash(Program("p", 7, parents=(0,)))
