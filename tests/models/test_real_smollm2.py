"""SmolLM2-135M answers as transformers does on the same weights."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import theirs
from real_engine import NEW_TOKENS, compare


def test_greedy_answers_and_logprobs_equal_transformers():
    assert compare(theirs.SMOLLM2, 8, 300, seed=1).num_tokens == 8 * NEW_TOKENS


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_greedy_answers_and_logprobs_equal_transformers_over_50_prompts():
    assert compare(theirs.SMOLLM2, 50, 2000, seed=2).num_tokens == 50 * NEW_TOKENS


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_torch_reference_gives_the_same_answers():
    reference = {"runner": {"ops": "ref", "attention": "torch-ref"}}
    assert compare(theirs.SMOLLM2, 12, 800, seed=3, **reference).num_tokens == 12 * NEW_TOKENS
