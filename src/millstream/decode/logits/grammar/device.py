"""What is not allowed cannot be chosen. Shapes: R rows that sample, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from millstream.core.plan import SampleAsk


class Grammar:
    order = 300
    only_forbids = True

    def applies(self, ask: SampleAsk) -> bool:
        return ask.allowed is not None

    def apply(self, logits: torch.Tensor, rows: Seq[int], asks: Seq[SampleAsk], histories: Seq[Seq[int]]) -> None:
        size = logits.shape[1]
        for row in rows:
            mask = np.frombuffer(asks[row].allowed or b"", np.uint8)
            bits = np.unpackbits(mask, count=size, bitorder="little")
            logits[row].masked_fill_(torch.from_numpy(bits) == 0, -torch.inf)


PLUGIN = Grammar
