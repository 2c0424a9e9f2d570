"""Qwen2.5-Coder-1.5B answers as transformers does on the same weights."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import theirs
from real_engine import NEW_TOKENS, compare


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_greedy_answers_and_logprobs_equal_transformers_over_20_prompts():
    # The KV budget is stated: the weights of both models are in memory already.
    found = compare(theirs.QWEN25, 20, 1000, seed=1, cache={"bytes": "512MiB"})
    assert found.num_tokens == 20 * NEW_TOKENS
