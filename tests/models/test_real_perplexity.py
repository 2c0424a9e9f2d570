"""The perplexity of WikiText-2 through `LLM.score` is transformers'. Per token of SmolLM2's own tokenizer."""

from __future__ import annotations

import gzip
import math

import pytest

pytest.importorskip("transformers")

import torch
from real_engine import transformers_model

import real
from millstream.engine.llm import LLM

NAME = "smollm2-135m"
WINDOW = 1024
# Of the perplexity. The two sum the same numbers in another order.
RTOL = 1e-3


@torch.inference_mode()
def theirs(windows: list[list[int]]) -> tuple[float, int]:
    """The sum of logprobs and the number of tokens that have one: all but the first of each window."""
    model, total, count = transformers_model(NAME), 0.0, 0
    for window in windows:
        ids = torch.tensor(window)
        rows = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total += float(rows.gather(1, ids[1:, None]).double().sum())
        count += len(window) - 1
    return total, count


def compare(num_windows: int, skip: int) -> None:
    text = gzip.decompress(real.data_file("lm_perplexity", "wikitext2_test.txt.gz").read_bytes()).decode()
    path = real.model_path(NAME)
    with LLM(str(path), max_context=WINDOW) as llm:
        # A token is at most some 20 characters here, and mostly 3 to 4 of them.
        ids = llm.tokenizer.encode(text[: 8 * (skip + num_windows) * WINDOW])
        windows = [ids[(skip + i) * WINDOW : (skip + i + 1) * WINDOW] for i in range(num_windows)]
        assert all(len(window) == WINDOW for window in windows)
        scores = llm.score(windows)
    total, count = sum(score.logprob for score in scores), sum(score.num_scored for score in scores)
    want, counted = theirs(windows)
    assert count == counted == num_windows * (WINDOW - 1)
    ours, wanted = math.exp(-total / count), math.exp(-want / counted)
    print(f"WikiText-2 test, {count} tokens in windows of {WINDOW}: perplexity {ours:.5f}, transformers {wanted:.5f}")
    assert ours == pytest.approx(wanted, rel=RTOL)
    for score in scores:
        assert score.perplexity == pytest.approx(math.exp(-score.logprob / score.num_scored))


def test_perplexity_of_2046_tokens_equals_transformers():
    compare(2, skip=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_perplexity_of_32736_tokens_equals_transformers():
    compare(32, skip=0)
