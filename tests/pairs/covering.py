"""A small table of cases in which every two values of different axes meet at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Case = dict[str, str]


def pairs_of(case: Mapping[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(sorted(case.items()), 2))


def cover(
    axes: Mapping[str, Sequence[str]], allowed: Callable[[Case], bool], seed: int = 0, tries: int = 40
) -> list[Case]:
    """Greedy: each new case is the best of `tries` that were grown around a pair not met yet. `allowed` also judges
    cases that lack some axes; a pair that no whole allowed case holds is left out."""
    rng = random.Random(seed)
    names = sorted(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in axes[a]
        for y in axes[b]
        if allowed({a: x, b: y})
    }
    cases: list[Case] = []
    while missing:
        wanted = min(missing)
        best: Case | None = None
        for _ in range(tries):
            grown = _grow(dict(wanted), axes, allowed, missing, rng)
            if grown is not None and (best is None or _worth(grown, missing) > _worth(best, missing)):
                best = grown
        if best is None:
            missing.discard(wanted)
            continue
        cases.append(best)
        missing -= pairs_of(best)
    return cases


def _worth(case: Case, missing: set[tuple[tuple[str, str], tuple[str, str]]]) -> int:
    return len(pairs_of(case) & missing)


def _grow(
    case: Case,
    axes: Mapping[str, Sequence[str]],
    allowed: Callable[[Case], bool],
    missing: set[tuple[tuple[str, str], tuple[str, str]]],
    rng: random.Random,
) -> Case | None:
    rest = [name for name in axes if name not in case]
    rng.shuffle(rest)
    for name in rest:
        options = [{**case, name: value} for value in axes[name] if allowed({**case, name: value})]
        if not options:
            return None
        rng.shuffle(options)
        case = max(options, key=lambda option: _worth(option, missing))
    return case
