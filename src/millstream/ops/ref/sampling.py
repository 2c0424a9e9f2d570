"""Tokens drawn from logits.

A token is drawn by the Gumbel-max trick: to each logprob is added noise that is a function of (seed, index, position,
token) alone, and the largest wins. So a seed gives the same text whoever shares the batch, in float arithmetic too:
walking the cumulative distribution would let a rounding error of 1e-6 pick a neighbour whenever the tail is hit.

Shapes: R rows, V vocabulary, N draws.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from millstream.ops.ref.random import uniform_draws
from millstream.ops.table import op

# Enough candidates for nearly every top-p set; rows that need more sort the whole vocabulary.
_TOP_P_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Draw:
    """One token of row `row`: how the distribution is cut, and what its noise depends on."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    index: int
    position: int


@op
def sample_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """logits (R, V) float32, not all of a drawn row -inf -> a token for each of the N draws.

    In this order: logits over temperature; the `top_k` largest (0: all; ties with the last stay); probabilities of at
    least `min_p` times the largest; the smallest set of the likeliest that has `top_p` of what is left (ties stay).
    """
    return [_sample(logits[draw.row], draw) for draw in draws]


def _sample(logits: torch.Tensor, draw: Draw) -> int:
    scaled = logits.double() / draw.temperature
    ids = _all_ids(scaled.shape[0])
    if 0 < draw.top_k < scaled.shape[0]:
        # Ties with the last of them stay: which of equals is cut must not depend on a sort.
        kept = scaled >= torch.topk(scaled, draw.top_k).values[-1]
        scaled, ids = scaled[kept], ids[kept]
    logprobs = torch.log_softmax(scaled, dim=-1)
    if draw.min_p > 0 or draw.top_p < 1:
        probs = logprobs.exp()
        kept = probs >= draw.min_p * probs.max()
        if draw.top_p < 1:
            probs = torch.where(kept, probs, 0.0)
            kept &= probs >= _top_p_floor(probs, draw.top_p)
        logprobs, ids = logprobs[kept], ids[kept]
    # Each token draws its own number, so the race is decided by a margin: a rounding error in a logit changes the
    # winner only where two are that close, however flat the distribution is.
    race = logprobs - torch.log(-torch.log(uniform_draws(draw.seed, draw.index, draw.position, ids)))
    return int(ids[torch.argmax(race)])


@functools.cache
def _all_ids(vocab_size: int) -> torch.Tensor:
    return torch.arange(vocab_size)


def _top_p_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability within the smallest set of tokens that has `top_p` of the whole sum."""
    target = top_p * probs.sum()
    for count in (_TOP_P_CANDIDATES, probs.shape[0]):
        best = torch.topk(probs, min(count, probs.shape[0])).values
        reached = torch.cumsum(best, dim=-1) >= target
        if bool(reached.any()):
            return best[int(torch.argmax(reached.int()))]
    return best[-1]
