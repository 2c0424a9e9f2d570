"""Device half of plain decoding: logits to tokens.

Shapes: R rows that sample in this step, V vocabulary.

A token is the inverse of the cumulative distribution, in token-id order, at one uniform number that is a function of
(seed, index, position) alone. So a seed gives the same text whoever shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from millstream.core import registry
from millstream.core.plan import Logprob, SampleAsk, TokenLogprobs
from millstream.ops.ref.random import uniform

# Enough candidates for nearly every top-p set; rows that need more sort the whole vocabulary.
_TOP_P_CANDIDATES = 256


class Autoregressive:
    def __init__(self) -> None:
        self._rules = [registry.get_device("logits", name)() for name in registry.names("logits")]

    def settle(
        self, logits: torch.Tensor, asks: Seq[SampleAsk], histories: Seq[Seq[int]]
    ) -> tuple[list[int], list[TokenLogprobs | None], list[str | None]]:
        """Chooses one token a row from `logits` (R, V) float32, which it may overwrite.

        `histories[r]` are the tokens before row r where its ask wants them. Returns tokens, logprobs where asked, and
        why a row failed where it did (its logits are not finite, or nothing is left to choose from).
        """
        faults: list[str | None] = [None] * len(asks)
        # max() propagates NaN and +inf, and an all -inf row shows as -inf: one pass finds every bad row.
        top = logits.amax(dim=-1)
        if not bool(torch.isfinite(top).all()):
            for row in torch.nonzero(~torch.isfinite(top)).flatten().tolist():
                faults[row] = "the model gave logits that are not finite"
                logits[row] = 0.0
        asked = [row for row, ask in enumerate(asks) if ask.top_logprobs is not None]
        raw = torch.log_softmax(logits[asked], dim=-1) if asked else None
        for rule in self._rules:
            rows = [row for row, ask in enumerate(asks) if rule.applies(ask)]
            if rows:
                rule.apply(logits, rows, asks, histories)
        for row, ask in enumerate(asks):
            if ask.banned or ask.params.logit_bias:
                self._check_choice(logits, row, faults)
        tokens = torch.argmax(logits, dim=-1).tolist()
        for row, ask in enumerate(asks):
            if not ask.params.greedy and faults[row] is None:
                tokens[row] = _sample(logits[row], ask)
        logprobs: list[TokenLogprobs | None] = [None] * len(asks)
        if raw is not None:
            for place, row in enumerate(asked):
                logprobs[row] = token_logprobs(raw[place], tokens[row], asks[row].top_logprobs or 0)
        return tokens, logprobs, faults

    @staticmethod
    def _check_choice(logits: torch.Tensor, row: int, faults: list[str | None]) -> None:
        if faults[row] is None and not bool(torch.isfinite(logits[row]).any()):
            faults[row] = "every token is banned"
            logits[row] = 0.0


def token_logprobs(logprobs: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    """The record of one choice from `logprobs` (V,): the token's own, and the `top` likeliest."""
    own = logprobs[token]
    chosen = Logprob(token, float(own), int((logprobs > own).sum()) + 1)
    if top == 0:
        return TokenLogprobs(chosen)
    values, ids = torch.topk(logprobs, min(top, logprobs.shape[0]))
    best = tuple(
        Logprob(i, v, rank) for rank, (i, v) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1)
    )
    return TokenLogprobs(chosen, best)


def _sample(logits: torch.Tensor, ask: SampleAsk) -> int:
    params = ask.params
    # float64: the walk along 150,000 probabilities must not depend on how a sum was split.
    scaled = logits.double() / params.temperature
    if 0 < params.top_k < scaled.shape[0]:
        smallest = torch.topk(scaled, params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    if params.top_p < 1:
        probs = probs / probs.sum()
        probs = probs.masked_fill(probs < _top_p_floor(probs, params.top_p), 0.0)
    walk = torch.cumsum(probs, dim=-1)
    target = uniform(ask.seed, ask.index, ask.position) * walk[-1]
    # right=True: the first token whose cumulated probability exceeds the target, so none of probability 0.
    return min(int(torch.searchsorted(walk, target, right=True)), int(torch.nonzero(probs)[-1]))


def _top_p_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability within the smallest set of tokens whose sum reaches `top_p`."""
    for count in (_TOP_P_CANDIDATES, probs.shape[0]):
        best = torch.topk(probs, min(count, probs.shape[0])).values
        reached = torch.cumsum(best, dim=-1) >= top_p
        if bool(reached.any()):
            return best[int(torch.argmax(reached.int()))]
    return best[-1]


PLUGIN = Autoregressive
