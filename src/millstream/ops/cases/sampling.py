from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from millstream.ops.cases import Case, Table
from millstream.ops.ref.random import uniform
from millstream.ops.ref.sampling import Draw, sample_tokens


def exact(logits: torch.Tensor, draws: list[Draw]) -> tuple[torch.Tensor, ...]:
    """The rules one after the other, in plain numbers."""
    tokens = []
    for draw in draws:
        x = {token: value / draw.temperature for token, value in enumerate(logits[draw.row].tolist())}
        x = {token: value for token, value in x.items() if value > -math.inf}
        if 0 < draw.top_k < logits.shape[1] and len(x) > draw.top_k:
            least = sorted(x.values(), reverse=True)[draw.top_k - 1]
            x = {token: value for token, value in x.items() if value >= least}
        most = max(x.values())
        p = {token: math.exp(value - most) for token, value in x.items()}
        p = {token: value for token, value in p.items() if value >= draw.min_p}
        if draw.top_p < 1:
            wanted, reached, floor = draw.top_p * math.fsum(p.values()), 0.0, 0.0
            for floor in sorted(p.values(), reverse=True):
                reached += floor
                if reached >= wanted:
                    break
            p = {token: value for token, value in p.items() if value >= floor}
        keys = {}
        for token in p:
            u = uniform(draw.seed, draw.index, draw.position, token)
            keys[token] = x[token] - most - (math.log(-math.log(u)) if u > 0 else math.inf)
        tokens.append(max(keys, key=keys.__getitem__))
    return (torch.tensor(tokens),)


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return (torch.tensor(function(*args), dtype=torch.int64),)


def drawn(
    vocabulary: int, count: int, scale: float = 3.0, banned: int = 0, ties: bool = False, **cut: float
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """`count` draws over five rows; `banned` tokens of each row cannot be chosen; `ties` makes logits whole numbers."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        logits = torch.randn(5, vocabulary, generator=generator) * scale
        if ties:
            logits = logits.round()
        if banned:
            logits[:, torch.randperm(vocabulary, generator=generator)[:banned]] = -torch.inf
        given = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut}
        return logits, [Draw(i % 5, seed=41 * i, index=i % 3, position=100 + i, **given) for i in range(count)]

    return make


TABLES = (
    Table(
        sample_tokens,
        (
            Case("plain", drawn(1000, 40), 0.0),
            Case("one token of one", drawn(1, 3), 0.0),
            Case("fewer than a vector", drawn(5, 30, temperature=2.0), 0.0),
            Case("odd vocabulary", drawn(263, 40, temperature=1.3), 0.0),
            Case("flat", drawn(3000, 30, scale=0.01), 0.0),
            Case("hot", drawn(700, 40, temperature=50.0), 0.0),
            Case("cold", drawn(700, 40, temperature=0.01), 0.0),
            Case("top k", drawn(900, 40, top_k=7), 0.0),
            Case("top k of more than there are", drawn(9, 20, top_k=50), 0.0),
            Case("top k at a tie", drawn(300, 40, ties=True, top_k=5), 0.0),
            Case("top p", drawn(900, 40, top_p=0.7), 0.0),
            Case("top p, flat", drawn(2000, 20, scale=0.01, top_p=0.9), 0.0),
            Case("top p of next to nothing", drawn(300, 20, top_p=1e-6), 0.0),
            Case("min p", drawn(900, 40, min_p=0.1), 0.0),
            Case("all cuts", drawn(900, 40, top_k=50, top_p=0.8, min_p=0.02), 0.0),
            Case("banned tokens", drawn(60, 40, banned=55, top_k=10, top_p=0.9), 0.0),
            Case("smollm2's vocabulary", drawn(49152, 5, top_p=0.95), 0.0),
        ),
        exact,
        outcome,
    ),
)
