"""Device half of plain decoding: logits to tokens.

Shapes: R rows that sample in this step, V vocabulary.

A token is drawn by the Gumbel-max trick: to each logprob is added noise that is a function of (seed, index, position,
token) alone, and the largest wins. So a seed gives the same text whoever shares the batch, in float arithmetic too:
walking the cumulative distribution would let a rounding error of 1e-6 pick a neighbour whenever the tail is hit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

import torch

from millstream.core import registry
from millstream.core.plan import Logprob, SampleAsk, TokenLogprobs
from millstream.decode.protocol import NOT_FINITE
from millstream.ops.ref.random import uniform_draws

# Enough candidates for nearly every top-p set; rows that need more sort the whole vocabulary.
_TOP_P_CANDIDATES = 256


class Autoregressive:
    def __init__(self) -> None:
        rules = [registry.get_device("logits", name)() for name in registry.names("logits")]
        self._rules = sorted(rules, key=lambda rule: rule.order)

    def only_best(self, ask: SampleAsk) -> bool:
        """Whether the row's likeliest token is all that matters, so that no logits need be kept."""
        plain = ask.params.greedy and ask.top_logprobs is None and not ask.banned
        return plain and not any(rule.applies(ask) for rule in self._rules)

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
                faults[row] = NOT_FINITE
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
    scaled = logits.double() / params.temperature
    ids = _all_ids(scaled.shape[0])
    if 0 < params.top_k < scaled.shape[0]:
        # Ties with the last of them stay: which of equals is cut must not depend on a sort.
        kept = scaled >= torch.topk(scaled, params.top_k).values[-1]
        scaled, ids = scaled[kept], ids[kept]
    logprobs = torch.log_softmax(scaled, dim=-1)
    if params.min_p > 0 or params.top_p < 1:
        probs = logprobs.exp()
        kept = probs >= params.min_p * probs.max()
        if params.top_p < 1:
            probs = torch.where(kept, probs, 0.0)
            kept &= probs >= _top_p_floor(probs, params.top_p)
        logprobs, ids = logprobs[kept], ids[kept]
    # Each token draws its own number, so the race is decided by a margin: a rounding error in a logit changes the
    # winner only where two are that close, however flat the distribution is.
    race = logprobs - torch.log(-torch.log(uniform_draws(ask.seed, ask.index, ask.position, ids)))
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


PLUGIN = Autoregressive
