"""Gemma 3 270M answers as transformers does on the same weights: sliding windows, QK norms, 262,144 tokens."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import theirs
from real_engine import NEW_TOKENS, compare

# Longer than the window of 512: keys must have been dropped, and the right ones.
BEYOND_WINDOW = 560


def test_greedy_answers_and_logprobs_equal_transformers():
    assert compare(theirs.GEMMA3, 2, 60, seed=1, more=(BEYOND_WINDOW,)).num_tokens == 3 * NEW_TOKENS


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_greedy_answers_and_logprobs_equal_transformers_over_20_prompts():
    assert compare(theirs.GEMMA3, 20, 2000, seed=2).num_tokens == 20 * NEW_TOKENS
