"""Where the time goes between the start of the process and the first token."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millstream.cli.output import note
from millstream.config.load import home


class StartUp:
    """Phases in order, in seconds, on the perf_counter clock; `entered_s` is when our first module was run."""

    def __init__(self, entered_s: float) -> None:
        age_s = process_age_s()
        now = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.whole = age_s is not None
        self._start = entered_s if age_s is None else min(now - age_s, entered_s)
        self._last = self._start
        if self.whole:
            self.lap("start python", entered_s)
        self.lap("read the command line")
        self._before: frozenset[str] = frozenset()

    def look(self) -> None:
        """Notes what is cached, so that `state` can say what this start had to make."""
        self._before = _cached()

    def lap(self, phase: str, now: float | None = None) -> None:
        """Ends a phase, now or at a moment already noted."""
        now = time.perf_counter() if now is None else now
        self.phases[phase] = self.phases.get(phase, 0.0) + max(0.0, now - self._last)
        self._last = now

    def add(self, phases: Mapping[str, float]) -> None:
        """Phases that were timed elsewhere and ended now; what they leave of the time is "rest of loading"."""
        now = time.perf_counter()
        rest = now - self._last - sum(phases.values())
        self.phases.update(phases)
        self.phases["rest of loading"] = max(0.0, rest)
        self._last = now

    @property
    def total_s(self) -> float:
        return self._last - self._start

    @property
    def state(self) -> str:
        """Whether converted weights and compiled kernels were there ("warm") or made by this start ("cold")."""
        made = sorted({path.split("/")[0] for path in _cached() - self._before})
        return f"cold ({', '.join(made)} made by this start)" if made else "warm"

    def as_json(self) -> dict[str, Any]:
        return {
            "phases_s": self.phases,
            "total_s": self.total_s,
            "state": self.state,
            "from": "process start" if self.whole else "first import",
        }

    def print(self) -> None:
        """The table on stderr."""
        width = max(map(len, self.phases))
        note("")
        for phase, seconds in self.phases.items():
            bar = "#" * round(40 * seconds / self.total_s) if self.total_s else ""
            note(f"  {phase:<{width}}  {seconds * 1000:8.1f} ms  {bar}")
        start = "process start" if self.whole else "the first import (this system does not tell the process's start)"
        note(f"  {'first token':<{width}}  {self.total_s * 1000:8.1f} ms after {start}; {self.state}")


def process_age_s() -> float | None:
    """Seconds since this process was started, to the system's clock tick (10 ms); None where it does not tell."""
    if sys.platform != "linux":
        return None
    try:
        stat = Path("/proc/self/stat").read_text()
        # The command's name, in parentheses, may hold spaces; field 22 is the start, in ticks since boot.
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _cached() -> frozenset[str]:
    found = set()
    for folder in ("converted", "kernels", "tokenizers"):
        try:
            found |= {f"{folder}/{path.name}" for path in (home() / folder).iterdir() if not path.name.startswith(".")}
        except OSError:
            continue
    return frozenset(found)
