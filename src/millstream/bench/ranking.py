"""Trains a model of lengths on labels and says how well it orders prompts of families that it never saw."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millstream.bench import prompts
from millstream.bench.labels import Label, Serving, collect, missing
from millstream.config.load import home
from millstream.core.errors import ConfigError

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
# Measured (docs/lengths.md); and so many prompts at least to choose among them by, fewer say more of chance.
TRUNK_EPOCHS, LEAST_ASIDE = 3, 20
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


def aside(labels: Sequence[Label], seed: int = 0) -> list[int]:
    """Places of the labels by which the epochs of a trunk are chosen: of a quarter of the data sets, by chance, or a
    fifth of all where there are fewer than four. Two families of one data set stay together: they ask about the same.
    """
    sets = [
        prompts.FAMILIES[one.prompt.family][0] if one.prompt.family in prompts.FAMILIES else one.prompt.family
        for one in labels
    ]
    names = sorted(set(sets))
    draw = random.Random(f"aside {seed}")
    if len(names) >= 4:
        chosen = set(draw.sample(names, round(len(names) / 4)))
        return [place for place, name in enumerate(sets) if name in chosen]
    return sorted(draw.sample(range(len(labels)), len(labels) // 5))


def progressed(labels: Sequence[Label], held_out: Sequence[Label], trunk_epochs: int = TRUNK_EPOCHS) -> int:
    """How often `train` tells its progress, at most: for each prompt that is read or learned from."""
    learned = trunk_epochs * (2 * len(labels) - len(aside(labels)))
    return len(labels) + learned + len(held_out) * (2 if trunk_epochs else 1)


def train(
    labels: Sequence[Label],
    held_out: Sequence[Label],
    tokenizer: Any,
    cap: int,
    *,
    served: str = "",
    trunk: Any = None,
    trunk_epochs: int = TRUNK_EPOCHS,
    shuffled: bool = False,
    seed: int = 0,
    progress: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """A LengthModel of `labels`, and the orders (N,) into which it and others to compare it with put `held_out`.

    Kendall's tau of each is in `told` of the model. `cap` is the most tokens that an answer had. For `trunk_epochs` at
    most the trunk is trained too: of these epochs and of the trunk as it is that one is taken which orders best what
    was set `aside` of the labels; `held_out` has no say. "heads only" is then the order by the trunk as it is.
    `shuffled` trains on lengths of other prompts, from which nothing is to be learned. `progress` hears of a prompt
    `progressed` times. Raises ValueError for fewer than two labels, ConfigError for negative epochs.
    """
    import torch

    from millstream.models.lengths import LengthModel, Seen, Trunk
    from millstream.train.lengths import fit, kendall, squares

    if trunk_epochs < 0:
        raise ConfigError(f"epochs of the trunk are 0 or more, got {trunk_epochs}")
    trunk = trunk or Trunk()
    framed = frame([tokenizer.decode(label.ids) for label in labels])
    model = LengthModel(None, None, trunk.name, served, framed, changed=trunk.changed)  # type: ignore[arg-type]
    plain = vectors(model, trunk, tokenizer, labels, progress)
    lengths = torch.tensor([label.tokens for label in labels])
    mixed = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))]
    model.seen = Seen(plain, mixed if shuffled else lengths)
    model.heads = heads = fit(plain, model.seen.lengths, cap, seed=seed)
    reader = _tuned(model, trunk, tokenizer, labels, cap, trunk_epochs, seed, progress) if trunk_epochs else trunk
    if len(held_out) < 2:
        return model, {}
    others = plain_others = vectors(model, trunk, tokenizer, held_out, progress)
    if reader is not trunk:
        others = vectors(model, reader, tokenizer, held_out, progress)
    rows = model.seen.vectors
    truth = -torch.tensor([label.tokens for label in held_out])
    draw = torch.Generator().manual_seed(seed)
    found = {
        "ranker": model.heads.scores(others),
        **({"heads only": heads.scores(plain_others)} if trunk_epochs else {}),
        "buckets": -torch.tensor(model.heads.lengths(others)),
        "regression": fit(rows, lengths, cap, seed=seed, loss=squares).scores(others),
        "prompt length": -torch.tensor([len(label.ids) for label in held_out]),
        # By the trunk as it is: one that was trained knows of true lengths.
        "shuffled labels": fit(plain, mixed, cap, seed=seed).scores(plain_others),
        "random": torch.rand(len(held_out), generator=draw),
    }
    taus = {name: kendall(order, truth) for name, order in found.items()}
    model.told = {**model.told, "tau": taus, "labels": len(labels)}
    return model, found


def _tuned(
    model: Any,
    trunk: Any,
    tokenizer: Any,
    labels: Sequence[Label],
    cap: int,
    epochs: int,
    seed: int,
    progress: Any,
) -> Any:
    """Trains the trunk, and gives the model the best of what that made; returns the trunk to read with from now on.

    `told` of the model says by "trunk" which epoch that was (0: the trunk as it is), and the tau of each; of none where
    what is set aside is less than LEAST_ASIDE.
    """
    from millstream.models.lengths import Seen, Trunk
    from millstream.train.lengths import fit, kendall, tune

    lengths, apart = model.seen.lengths, aside(labels, seed)
    kept = sorted(set(range(len(labels))) - set(apart))
    families = sorted({labels[place].prompt.family for place in apart})
    if len(apart) < LEAST_ASIDE:
        model.told = {"trunk": {"epoch": 0, "tau": [], "aside": families}}
        return trunk
    ids = [trunk.ids(model.bare(tokenizer.decode(labels[place].ids))) for place in kept]

    def worth(rows: Any, heads: Any) -> float:
        return kendall(heads.scores(rows[apart]), -lengths[apart])

    start = fit(model.seen.vectors[kept], lengths[kept], cap, seed=seed)
    taus, best, found = [worth(model.seen.vectors, start)], 0, trunk
    for epoch, tuned in enumerate(
        tune(trunk, ids, lengths[kept], cap, start, epochs=epochs, seed=seed, progress=progress), start=1
    ):
        reader = Trunk(trunk.name, {**trunk.changed, **tuned.changed})
        rows = vectors(model, reader, tokenizer, labels, progress)
        taus.append(worth(rows, fit(rows[kept], lengths[kept], cap, seed=seed)))
        if taus[epoch] > taus[best]:
            best, found = epoch, reader
            model.seen, model.changed = Seen(rows, lengths), found.changed
    if best:
        # Now also on what was set aside.
        model.heads = fit(model.seen.vectors, lengths, cap, seed=seed)
    model.told = {"trunk": {"epoch": best, "tau": taus, "aside": families}}
    return found
