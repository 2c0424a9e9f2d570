"""Presence and frequency penalties count the output only; the repetition penalty counts prompt and output."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from millstream.core.plan import SampleAsk


class Penalties:
    order = 200
    only_forbids = False

    def applies(self, ask: SampleAsk) -> bool:
        return ask.params.reads_history

    def apply(self, logits: torch.Tensor, rows: Seq[int], asks: Seq[SampleAsk], histories: Seq[Seq[int]]) -> None:
        for row in rows:
            params, history = asks[row].params, torch.tensor(histories[row], dtype=torch.int64)
            if params.repetition_penalty != 1:
                seen = torch.unique(history)
                values = logits[row, seen]
                factor = params.repetition_penalty
                logits[row, seen] = torch.where(values > 0, values / factor, values * factor)
            ids, counts = torch.unique(history[asks[row].num_prompt :], return_counts=True)
            logits[row, ids] -= params.frequency_penalty * counts + params.presence_penalty


PLUGIN = Penalties
