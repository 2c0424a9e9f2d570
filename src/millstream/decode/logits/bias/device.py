"""logit_bias adds to the logits (-100 bans, as in OpenAI's API); banned tokens cannot be chosen at all."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from millstream.core.plan import SampleAsk

BANS = -100.0


class Bias:
    order = 100
    only_forbids = False

    def applies(self, ask: SampleAsk) -> bool:
        return bool(ask.banned or ask.params.logit_bias)

    def apply(self, logits: torch.Tensor, rows: Seq[int], asks: Seq[SampleAsk], histories: Seq[Seq[int]]) -> None:
        for row in rows:
            for token, bias in asks[row].params.logit_bias.items():
                logits[row, token] = -torch.inf if bias <= BANS else logits[row, token] + bias
            if asks[row].banned:
                logits[row, list(asks[row].banned)] = -torch.inf


PLUGIN = Bias
