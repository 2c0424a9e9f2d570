"""What quantizing does, in names and switches. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName
from millstream.core.registry import Choice


@dataclass(frozen=True, slots=True)
class Recipe:
    """QoQ (Lin et al., 2024, section 4.2) with each piece switchable.

    `format` packs the layers' matrices, `head` embedding and head; `group` is an option of formats that have groups.
    `smooth_attention` moves outliers of keys into queries, `smooth_outputs` those of what attention and MLP hand to
    their last matrix into it, `reorder` puts MLP inputs of one size into one group, `clip` and `gptq` choose ranges and
    roundings by the inputs seen. Calibration takes `samples` windows of `length` tokens; with none of the five it is
    not needed.
    """

    format: str = "w4a8"
    head: str = "block8"
    group: int | str = "auto"
    smooth_attention: bool = True
    smooth_outputs: bool = True
    reorder: bool = True
    clip: bool = True
    gptq: bool = True
    samples: int = 32
    length: int = 512

    def __post_init__(self) -> None:
        known = [name for name in registry.names("weights") if name != "dense"]
        if self.format not in known:
            raise UnknownName("format of packed weights", self.format, known)
        if self.head not in (*known, "dense"):
            raise UnknownName("format of embedding and head", self.head, (*known, "dense"))
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        self.choice()

    @staticmethod
    def plain(format: str, **options: Any) -> Recipe:
        """Round to nearest: nothing that needs calibration."""
        off = dict.fromkeys(("smooth_attention", "smooth_outputs", "reorder", "clip", "gptq"), False)
        return Recipe(format, **{**off, **options})

    @property
    def grouped(self) -> bool:
        return self.group != 0 and "group" in self._options()

    @property
    def needs_text(self) -> bool:
        chooses = bool({"clip", "gptq"} & self._options()) and (self.clip or self.gptq)
        return chooses or self.smooth_attention or self.smooth_outputs or (self.reorder and self.grouped)

    def choice(self) -> Choice:
        """The format with those of our settings that it has. Raises ConfigError."""
        known = self._options()
        if self.group != "auto" and "group" not in known:
            raise ConfigError(f"{self.format} has no groups, got group {self.group}")
        choice = Choice(self.format, {name: getattr(self, name) for name in ("group", "clip", "gptq") if name in known})
        registry.options("weights", choice)
        return choice

    def said(self) -> dict[str, Any]:
        """What a folder records of it."""
        return dataclasses.asdict(self)

    def _options(self) -> set[str]:
        config = getattr(registry.module("weights", self.format), "Config", None)
        return set() if config is None else {field.name for field in dataclasses.fields(config)}
