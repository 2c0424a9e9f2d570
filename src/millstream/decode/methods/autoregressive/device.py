"""Device half of plain decoding: logits to tokens. How a token is drawn is said in `ops/ref/sampling.py`.

Shapes: R rows that sample in this step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from millstream.core import registry
from millstream.core.plan import Logprob, SampleAsk, TokenLogprobs
from millstream.decode.protocol import NOT_FINITE
from millstream.ops.cpu import sampling as _native  # noqa: F401 - registers the native implementation
from millstream.ops.ref.sampling import Draw, sample_tokens


class Autoregressive:
    def __init__(self) -> None:
        rules = [registry.get_device("logits", name)() for name in registry.names("logits")]
        self._rules = sorted(rules, key=lambda rule: rule.order)

    def only_best(self, ask: SampleAsk) -> bool:
        """Whether the row's likeliest token is all that matters, so that no logits need be kept.

        That token is the choice if `ask.may` it be; else there is a choice among those that may.
        """
        if not ask.params.greedy or ask.top_logprobs is not None:
            return False
        return not any(rule.applies(ask) for rule in self._rules if not getattr(rule, "only_forbids", False))

    def forced(self, ask: SampleAsk) -> int | None:
        """The token of a row that has no choice, whatever its logits; None for one that has, or has more to tell."""
        if ask.allowed is None or ask.top_logprobs is not None or ask.banned or ask.params.logit_bias:
            return None
        bits = int.from_bytes(ask.allowed, "little")
        return bits.bit_length() - 1 if bits and not bits & (bits - 1) else None

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
            if ask.banned or ask.params.logit_bias or ask.allowed is not None:
                self._check_choice(logits, row, faults)
        tokens = torch.argmax(logits, dim=-1).tolist()
        draws = [_draw(row, ask) for row, ask in enumerate(asks) if not ask.params.greedy and faults[row] is None]
        if draws:
            for draw, token in zip(draws, sample_tokens(logits, draws), strict=True):
                tokens[draw.row] = token
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


def _draw(row: int, ask: SampleAsk) -> Draw:
    params = ask.params
    return Draw(row, params.temperature, params.top_k, params.top_p, params.min_p, ask.seed, ask.index, ask.position)


PLUGIN = Autoregressive
