"""What is known of one kind of engine: how long its steps take, and how much it holds. Kept as a JSON file.

`millstream calibrate` writes profiles of this machine; those of GPUs are made from published measurements.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from millstream.config.load import home
from millstream.core import registry
from millstream.core.errors import BadFile, UnknownName
from millstream.sched.protocol import StepCost

VERSION = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """`cost` names a model of step times and `state` is what it has learned.

    `source` says where the times come from, `note` what of it is derived and not measured. `blocks` of `block_size`
    tokens are what the KV cache holds. `swap_bytes_per_s` is how fast KV moves to the host, `token_bytes` what the KV
    of a token takes. `error` is the mean error on steps that the model was not fitted to, `noise` the one between
    repeats, as shares. `price` is what an hour costs, in whatever currency.
    """

    name: str
    model: str
    hardware: str
    source: str
    cost: str
    state: Mapping[str, Any]
    blocks: int
    block_size: int = 64
    step_tokens: int = 512
    max_rows: int = 256
    max_context: int = 8192
    token_bytes: int = 0
    swap_bytes_per_s: float = 10e9
    error: float | None = None
    noise: float | None = None
    price: float = 1.0
    date: str = ""
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def step_cost(self) -> StepCost:
        """A model of step times of its own. Raises ValueError for a state that it never gave, and UnknownName."""
        made: StepCost = registry.make("step-cost", self.cost)
        made.restore(self.state)
        return made

    def sized(self, blocks: int | None = None, step_tokens: int | None = None, max_rows: int | None = None) -> Profile:
        """The same with other sizes, where they are given."""
        return replace(
            self,
            blocks=blocks or self.blocks,
            step_tokens=step_tokens or self.step_tokens,
            max_rows=max_rows or self.max_rows,
        )


def folder() -> Path:
    return home() / "profiles" / "steps"


def save(profile: Profile, path: Path | None = None) -> Path:
    """Writes a profile, whole or not at all, to `path` or to the cache folder. Gives the path. Raises OSError."""
    path = path or folder() / f"{profile.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"version": VERSION, **asdict(profile)}, indent=1))
    part.replace(path)
    return path


def read(path: Path) -> Profile:
    """Raises BadFile."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or tree.pop("version", None) != VERSION:
            raise ValueError(f"not a profile of version {VERSION}")
        profile = Profile(**tree)
        for name in ("blocks", "block_size", "step_tokens", "max_rows", "max_context"):
            value = getattr(profile, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, allowed are integers from 1")
        profile.step_cost()
    except (OSError, UnicodeDecodeError, TypeError, ValueError, KeyError, UnknownName) as error:
        raise BadFile(path, f"is no profile: {error}") from error
    return profile


def kept() -> list[str]:
    """The names of the profiles in the cache folder."""
    return sorted(path.stem for path in folder().glob("*.json"))


def load(name: str, published: Mapping[str, Any] | None = None) -> Profile:
    """A profile by its name or its path; `published` makes those that come with the data sets.

    Raises UnknownName, BadFile, and what a published one raises where its data is not to be had.
    """
    if name.endswith(".json") or os.sep in name:
        return read(Path(name))
    path = folder() / f"{name}.json"
    if path.is_file():
        return read(path)
    if published is not None and name in published:
        made: Profile = published[name]()
        return made
    raise UnknownName("profile", name, [*kept(), *(published or ())])
