"""The naive generator: no cache, no batch, no pages. Each token costs a full forward pass over all before it.

It is what every clever way of computing the same tokens is held against. The model is the real one; attention is
written out in four lines, and the keys and values of a pass live no longer than the layer that made them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from millstream.models.blocks.attention import GroupStep, StepContext
from millstream.models.decoder import Decoder
from millstream.ops.layout import BatchLayout


class OneLayer:
    """Stands in for pages: holds what the layer wrote just now."""

    def write(self, layer, slots, k, v):
        self.k, self.v = k, v


class Plain:
    """Causal softmax attention over the keys and values of this pass."""

    in_program = False

    def run(self, q, pages, layer, state, scale, window=None, softcap=None):
        repeat = q.shape[1] // pages.k.shape[1]
        k, v = pages.k.repeat_interleave(repeat, 1), pages.v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at = torch.arange(q.shape[0])
        seen = at[None, :] <= at[:, None]
        if window is not None:
            seen &= at[None, :] > at[:, None] - window
        scores = scores.masked_fill(~seen, -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v)
        return out, scores.logsumexp(-1).T


@dataclass(frozen=True)
class Told:
    """`tokens` generated after the prompt, and of each the logprob and those of the whole vocabulary."""

    tokens: list[int]
    logprobs: list[float]
    rows: list[torch.Tensor]


def context(decoder: Decoder, num_tokens: int) -> StepContext:
    """A step of one row that starts at position 0."""
    length = torch.tensor([num_tokens], dtype=torch.int32)
    layout = BatchLayout(
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.arange(num_tokens),
        length,
        {},
        block_size=1,
        max_query=num_tokens,
        max_seq=num_tokens,
    )
    groups = {
        group.name: GroupStep(OneLayer(), Plain(), None, torch.arange(num_tokens)) for group in decoder.spec.groups
    }
    return StepContext(layout, groups)


@torch.inference_mode()
def logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """(len(tokens), vocabulary) float32."""
    return decoder.head(decoder.forward(torch.tensor(tokens), context(decoder, len(tokens))))


@torch.inference_mode()
def logprobs(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """(len(tokens), vocabulary) float32: row i is of the token after tokens[i]."""
    return logits(decoder, tokens).log_softmax(-1)


@torch.inference_mode()
def generate(decoder: Decoder, prompt: list[int], num_tokens: int, temperature: float = 0.0, seed: int = 0) -> Told:
    """`num_tokens` tokens after the prompt; greedy, or at a temperature with a generator of the given seed."""
    told, tokens = Told([], [], []), list(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        hidden = decoder.forward(torch.tensor(tokens), context(decoder, len(tokens)))
        row = decoder.head(hidden[-1:])[0].log_softmax(-1)
        if temperature == 0:
            token = int(row.argmax())
        else:
            token = int(torch.multinomial((row / temperature).softmax(-1), 1, generator=generator))
        told.tokens.append(token)
        told.logprobs.append(float(row[token]))
        told.rows.append(row)
        tokens.append(token)
    return told
