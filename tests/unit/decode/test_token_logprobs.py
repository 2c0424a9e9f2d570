"""Records of chosen tokens: their rank and the likeliest of a row, the same alone and among others."""

from __future__ import annotations

import random

import torch

from millstream.decode.methods.autoregressive.device import token_logprobs

VOCAB = 40


def test_ranks_and_likeliest_are_those_of_each_row_sorted_alone():
    rng = random.Random(3)
    for seed in range(30):
        rows = rng.randint(1, 7)
        logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
        if seed % 3 == 0:
            logits = logits.round()  # ties
        logprobs = logits.log_softmax(-1)
        tokens = [rng.randrange(VOCAB) for _ in range(rows)]
        tops = [rng.choice([0, 1, 5, VOCAB, VOCAB + 3]) for _ in range(rows)]
        found = token_logprobs(logprobs, tokens, tops)
        for row, (token, top, record) in enumerate(zip(tokens, tops, found, strict=True)):
            values = logprobs[row].tolist()
            assert (record.chosen.token, record.chosen.logprob) == (token, values[token])
            assert record.chosen.rank == sum(value > values[token] for value in values) + 1
            assert [one.logprob for one in record.top] == sorted(values, reverse=True)[:top]
            assert [one.rank for one in record.top] == list(range(1, min(top, VOCAB) + 1))
            assert all(values[one.token] == one.logprob for one in record.top)
            assert record == token_logprobs(logprobs[row : row + 1], [token], [top])[0]
