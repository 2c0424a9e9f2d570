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
            records = token_logprobs(
                raw, [tokens[row] for row in asked], [asks[row].top_logprobs or 0 for row in asked]
            )
            for row, record in zip(asked, records, strict=True):
                logprobs[row] = record
        return tokens, logprobs, faults

    @staticmethod
    def _check_choice(logits: torch.Tensor, row: int, faults: list[str | None]) -> None:
        if faults[row] is None and not bool(torch.isfinite(logits[row]).any()):
            faults[row] = "every token is banned"
            logits[row] = 0.0


def token_logprobs(logprobs: torch.Tensor, tokens: Seq[int], tops: Seq[int]) -> list[TokenLogprobs]:
    """The records of choices from `logprobs` (R, V): of each row its token's own, and its `tops` likeliest.

    Rows that ask for equally many are taken together, and told what each is told alone.
    """
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])
    found: dict[int, TokenLogprobs] = {}
    for top in dict.fromkeys(tops):
        rows = [row for row, asked in enumerate(tops) if asked == top]
        part, mine = (logprobs, own) if len(rows) == len(tops) else (logprobs[rows], own[rows])
        values, ids = torch.topk(part, min(top, part.shape[1]))
        ranks = (values > mine).sum(-1) + 1
        # Whoever is likelier than one of the likeliest is one of these too; for others the whole row is counted.
        beyond = mine[:, 0] < values[:, -1] if top else torch.ones(len(rows), dtype=torch.bool)
        if bool(beyond.any()):
            ranks[beyond] = (part[beyond] > mine[beyond]).sum(-1) + 1
        told = zip(rows, mine[:, 0].tolist(), ranks.tolist(), values.tolist(), ids.tolist(), strict=True)
        for row, value, rank, best, best_ids in told:
            chosen = Logprob(tokens[row], value, rank)
            likeliest = (Logprob(i, v, nth) for nth, (i, v) in enumerate(zip(best_ids, best, strict=True), start=1))
            found[row] = TokenLogprobs(chosen, tuple(likeliest))
    return [found[row] for row in range(len(tops))]


def _draw(row: int, ask: SampleAsk) -> Draw:
    params = ask.params
    return Draw(row, params.temperature, params.top_k, params.top_p, params.min_p, ask.seed, ask.index, ask.position)


PLUGIN = Autoregressive
