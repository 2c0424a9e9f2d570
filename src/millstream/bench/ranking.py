"""Trains a model of lengths on labels and says how well it orders prompts of families that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millstream.bench import prompts
from millstream.bench.labels import Label, Serving, collect, missing
from millstream.config.load import home

# Families that are learned from and how many prompts of each, and those that are only tested on.
TRAIN: Mapping[str, int] = {
    "sharegpt": 300,
    "arena-hard": 200,
    "gsm8k": 200,
    "gsm8k-number": 120,
    "mbpp": 150,
    "mbpp-docs": 100,
    "truthfulqa": 200,
    "truthfulqa-brief": 120,
    "strategyqa": 200,
    "strategyqa-steps": 100,
    "aqua": 150,
    "banking77": 200,
    "wikitext-title": 100,
    "wikitext-summary": 100,
}
TEST: Mapping[str, int] = {
    "oasst": 60,
    "ifeval": 140,
    "mt-bench": 48,
    "vicuna-bench": 60,
    "humaneval": 60,
    "ag-news": 80,
    "lambada": 60,
}
MOST_CHARS = 2000
BATCH = 16


def collected(
    made: Any, serving: Serving, counts: Mapping[str, int], share: float = 1.0, say: Callable[[str], None] | None = None
) -> list[Label]:
    """Labels of `share` of so many prompts of each family, by the engine `made`; kept in the home folder."""
    kept = home() / "labels" / f"{serving.model}.jsonl"
    asked = prompts.draw({name: max(4, round(share * count)) for name, count in counts.items()}, most_chars=MOST_CHARS)
    if say is not None and (left := len(missing(serving, asked, kept))):
        say(f"generating {left} answers, which are kept in {kept}")
    return collect(made.engine, made.tokenizer, serving, asked, kept)


def frame(texts: Sequence[str]) -> tuple[str, str]:
    """What all of the texts begin and end with."""
    before = _common(texts)
    return before, _common([text[len(before) :][::-1] for text in texts])[::-1]


def _common(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share lies at the beginning of all between them
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]


def vectors(model: Any, trunk: Any, tokenizer: Any, labels: Sequence[Label], progress: Any = None) -> Any:
    """(N, V) of prompts as a LengthModel reads them, a few at a time."""
    import torch

    texts, found = [model.bare(tokenizer.decode(label.ids)) for label in labels], []
    for start in range(0, len(texts), BATCH):
        found.append(trunk.vectors(texts[start : start + BATCH]))
        if progress is not None:
            for _ in texts[start : start + BATCH]:
                progress()
    return torch.cat(found).clone()


def train(
    labels: Sequence[Label],
    held_out: Sequence[Label],
    tokenizer: Any,
    cap: int,
    *,
    served: str = "",
    trunk: Any = None,
    shuffled: bool = False,
    seed: int = 0,
    progress: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """A LengthModel of `labels`, and the orders (N,) into which it and others to compare it with put `held_out`.

    Kendall's tau of each is in `told` of the model. `cap` is the most tokens that an answer had. `shuffled` trains on
    lengths of other prompts, from which nothing is to be learned. Raises ValueError for fewer than two labels.
    """
    import torch

    from millstream.models.lengths import LengthModel, Seen, Trunk
    from millstream.train.lengths import fit, kendall, squares

    trunk = trunk or Trunk()
    framed = frame([tokenizer.decode(label.ids) for label in labels])
    model = LengthModel(None, None, trunk.name, served, framed)  # type: ignore[arg-type]
    rows = vectors(model, trunk, tokenizer, labels, progress)
    lengths = torch.tensor([label.tokens for label in labels])
    mixed = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))]
    model.seen = Seen(rows, mixed if shuffled else lengths)
    model.heads = fit(rows, model.seen.lengths, cap, seed=seed)
    if len(held_out) < 2:
        return model, {}
    others = vectors(model, trunk, tokenizer, held_out, progress)
    truth = -torch.tensor([label.tokens for label in held_out])
    draw = torch.Generator().manual_seed(seed)
    found = {
        "ranker": model.heads.scores(others),
        "buckets": -torch.tensor(model.heads.lengths(others)),
        "regression": fit(rows, lengths, cap, seed=seed, loss=squares).scores(others),
        "prompt length": -torch.tensor([len(label.ids) for label in held_out]),
        "shuffled labels": fit(rows, mixed, cap, seed=seed).scores(others),
        "random": torch.rand(len(held_out), generator=draw),
    }
    model.told = {"tau": {name: kendall(order, truth) for name, order in found.items()}, "labels": len(labels)}
    return model, found
