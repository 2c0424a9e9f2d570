"""Learns how long answers will be: an order by ListMLE and buckets by classification, on vectors of prompts.

Efficient LLM Scheduling by Learning to Rank (Fu et al., NeurIPS 2024, section 4): a batch is one list, and the loss is
what a sampling without replacement by the scores thinks of the true order. Lengths fall into steps of 10 tokens, so
that chance among equals is no lesson; equals are ordered by chance. S3 (Jin et al., NeurIPS 2023): ten buckets of equal
width up to the longest answer.

Shapes: N prompts, V numbers of a vector, B buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from millstream.models.encoder import build_encoder
from millstream.models.encoder_spec import EncoderSpec
from millstream.models.lengths import Heads, Trunk, read
from millstream.ops import table

STEP = 10
BUCKETS = 10
# Of the heads, on vectors of length sqrt(V).
HEADS_RATE, HEADS_DECAY = 3e-3, 1.0


def listmle(scores: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Minus the mean log-likelihood of the order of `labels`, the largest first, under `scores`; both are (N,)."""
    shuffled = torch.randperm(len(scores), generator=draw)
    scores, labels = scores[shuffled], labels[shuffled]
    ordered = scores[torch.argsort(labels, descending=True, stable=True)]
    tails = torch.logcumsumexp(ordered.flip(0), 0).flip(0)
    return (tails - ordered).mean()


def squares(scores: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Regression of the labels, for comparison."""
    return torch.nn.functional.mse_loss(scores, labels.float() / STEP)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def fit(
    vectors: torch.Tensor,
    lengths: torch.Tensor,
    cap: int,
    *,
    epochs: int = 8,
    rate: float = HEADS_RATE,
    decay: float = HEADS_DECAY,
    batch: int = 32,
    seed: int = 0,
    loss: Loss = listmle,
    start: Heads | None = None,
) -> Heads:
    """Heads for answers of at most `cap` tokens; `vectors` are (N, V), `lengths` (N,). Adam, batches of one list each.

    `start` are heads to go on from. Raises ValueError for fewer than two prompts.
    """
    if len(vectors) < 2 or len(vectors) != len(lengths):
        raise ValueError(f"at least two prompts with a length each, got {len(vectors)} and {len(lengths)}")
    draw = torch.Generator().manual_seed(seed)
    width = vectors.shape[1]
    # Numbers of a vector of length 1 are small: on this scale one rate suits any width.
    scale = width**0.5
    inputs = vectors * scale
    labels, places = _labels(lengths, cap)
    if start is None:
        score, bias = torch.zeros(width), torch.zeros(())
        buckets, buckets_bias = torch.zeros(BUCKETS, width), torch.zeros(BUCKETS)
    else:
        score, bias = start.score / scale, start.score_bias.clone()
        buckets, buckets_bias = start.buckets / scale, start.buckets_bias.clone()
    weights = [one.clone().requires_grad_() for one in (score, bias, buckets, buckets_bias)]
    adam = torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
    score, bias, buckets, buckets_bias = weights
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=draw).split(batch):
            if len(rows) < 2:
                continue
            x = inputs[rows]
            ranked = loss(x @ score + bias, labels[rows], draw)
            classed = torch.nn.functional.cross_entropy(x @ buckets.T + buckets_bias, places[rows])
            adam.zero_grad()
            (ranked + classed).backward()  # type: ignore[no-untyped-call]
            adam.step()
    score, bias, buckets, buckets_bias = (one.detach() for one in weights)
    found = Heads(score * scale, bias, buckets * scale, buckets_bias, cap)
    # Scores of mean 0 and deviation 1: margins between scores then mean the same under every model.
    scores = found.scores(vectors)
    spread = scores.std().clamp(min=1e-6)
    found.score, found.score_bias = found.score / spread, (found.score_bias - scores.mean()) / spread
    return found


def _labels(lengths: torch.Tensor, cap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of lengths (N,) the labels of the order, larger is shorter, and the buckets; both (N,) int64."""
    places = ((lengths - 1).clamp(min=0) // -(-cap // BUCKETS)).clamp(max=BUCKETS - 1)
    return cap // STEP - lengths.clamp(max=cap) // STEP, places


@dataclass(frozen=True, slots=True)
class Tuned:
    """After an epoch: the weights that changed, in float32 by the names of `EncoderSpec.tensors()`, and the loss of a
    batch, mean over the epoch."""

    changed: dict[str, torch.Tensor]
    loss: float


def trained(spec: EncoderSpec, layers: int) -> list[str]:
    """The tensors that `tune` changes: those of the last `layers` layers.

    Never the tables of tokens and positions, which are half of all weights: a word that no prompt to learn from has
    would stay where it was, while those around it move.
    """
    first = max(0, spec.num_layers - layers)
    own = tuple(f"layers.{index}." for index in range(first, spec.num_layers))
    return [tensor.name for tensor in spec.tensors() if tensor.name.startswith(own)]


def tune(
    trunk: Trunk,
    texts: Sequence[Sequence[int]],
    lengths: torch.Tensor,
    cap: int,
    start: Heads,
    *,
    epochs: int,
    layers: int = 6,
    rate: float = 2e-5,
    decay: float = 0.01,
    batch: int = 32,
    seed: int = 0,
    loss: Loss = listmle,
    progress: Callable[[], None] | None = None,
) -> Iterator[Tuned]:
    """Trains the last `layers` layers of the trunk together with heads that begin as `start`; yields after each epoch.

    Learning to Rank trains its predictor whole: Adam at 2e-5, weight decay 0.01, a batch of 32 prompts as one list, 5
    epochs. Heads that fit the trunk as it is come first, so that what they lack at the beginning does not pull at
    weights that are good already (Fine-Tuning can Distort Pretrained Features, Kumar et al., ICLR 2022).

    `texts` are the tokens (`Trunk.ids`) of N prompts, `lengths` (N,) the tokens of their answers, of at most `cap`.
    `trunk` and `start` stay as they are. `progress` hears of each prompt. The same seed gives the same weights on the
    same machine. While an epoch runs, the whole process computes with reference ops. Raises ValueError for fewer than
    two prompts.
    """
    if len(texts) < 2 or len(texts) != len(lengths):
        raise ValueError(f"at least two prompts with a length each, got {len(texts)} and {len(lengths)}")
    draw = torch.Generator().manual_seed(seed)
    held, spec = trunk.weights(), trunk.encoder.spec
    leaves = {name: held[name].clone().requires_grad_() for name in trained(spec, layers)}
    labels, places = _labels(lengths, cap)
    scale = len(start.score) ** 0.5
    heads = [
        one.clone().requires_grad_()
        for one in (start.score / scale, start.score_bias, start.buckets / scale, start.buckets_bias)
    ]
    score, bias, buckets, buckets_bias = heads
    adam = torch.optim.AdamW(
        [{"params": list(leaves.values())}, {"params": heads, "lr": HEADS_RATE, "weight_decay": HEADS_DECAY}],
        lr=rate,
        weight_decay=decay,
    )
    for _ in range(epochs):
        losses = []
        # Not around the loop: whoever takes what is yielded goes on with the ops that it had.
        with table.use("ref"), torch.enable_grad():
            encoder = build_encoder(spec, {**held, **leaves})
            for rows in torch.randperm(len(texts), generator=draw).split(batch):
                if len(rows) < 2:
                    continue
                x = scale * read(encoder, [texts[row] for row in rows.tolist()])
                ranked = loss(x @ score + bias, labels[rows], draw)
                classed = torch.nn.functional.cross_entropy(x @ buckets.T + buckets_bias, places[rows])
                adam.zero_grad()
                (ranked + classed).backward()  # type: ignore[no-untyped-call]
                adam.step()
                losses.append(float((ranked + classed).detach()))
                if progress is not None:
                    for _ in rows:
                        progress()
        yield Tuned({name: leaf.detach().clone() for name, leaf in leaves.items()}, sum(losses) / len(losses))


def kendall(one: torch.Tensor, other: torch.Tensor) -> float:
    """Kendall's tau-b of two orders (N,): 1 the same, 0 nothing in common, -1 reversed; 0 where one says nothing."""
    a, b = one.double(), other.double()
    agree = ties_a = ties_b = 0.0
    for rows in torch.arange(len(a)).split(512):
        x, y = (a[rows, None] - a[None]).sign(), (b[rows, None] - b[None]).sign()
        agree += float((x * y).sum())
        ties_a += float((x != 0).sum())
        ties_b += float((y != 0).sum())
    return agree / (ties_a * ties_b) ** 0.5 if ties_a and ties_b else 0.0
