"""A made-up experiment whose numbers a test chooses, so that the framework is tested without an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from millstream.reproduce.protocol import (
    Arm,
    CheckResult,
    CheckRow,
    Claim,
    Context,
    Experiment,
    Figure,
    Metric,
    Of,
    Required,
)

TIME = Required("twice as fast", of=Of("slow", "time_s"), over=Of("fast", "time_s"), at_least=2.0)
FORWARDS = Required("one forward a step", of=Of("fast", "forwards"), at_least=1.0, at_most=1.0, how="every")
COPIES = Required(
    "copies no bytes", of=Of("fast", "copied_bytes"), at_most=0.0, out_of_reach="the native op is not here yet"
)
REPLICAS = Required("linear in replicas", of=Of("fast", "replicas"), at_least=0.95, elsewhere="measured by `cluster`")


class Synthetic(Experiment):
    name = "pagedattention"
    paper = 11
    title = "Fast against slow"
    arms = (
        Arm("slow", "the baseline"),
        Arm("fast", "the technique"),
        Arm("odd", "another baseline"),
    )
    metrics = (
        Metric("time_s", "s", "lower"),
        Metric("forwards", "", "lower"),
        Metric("copied_bytes", "bytes", "lower"),
        Metric("replicas", ""),
    )
    claim = Claim("Two to four times faster", (Figure("speed", Of("slow", "time_s"), Of("fast", "time_s"), 2.0, 4.0),))
    required = (TIME, FORWARDS)
    warmup = 1

    def __init__(
        self,
        folder: Path,
        times: Callable[[str, int], float] = lambda arm, repeat: {"slow": 3.0, "fast": 1.0, "odd": 2.0}[arm],
        check: Callable[[Context], CheckResult] = lambda ctx: CheckResult((CheckRow("same tokens", True, "40 of 40"),)),
    ) -> None:
        self.times, self.checked = times, check
        self.source = folder / "technique.py"
        if not self.source.exists():
            self.source.write_text("SPEED = 2\n")
        self.calls: list[str] = []
        self.measured: list[tuple[int, str]] = []

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        return {"prompts": b"abc", "source": self.source}

    def open(self, ctx: Context) -> None:
        self.calls.append("open")

    def check(self, ctx: Context) -> CheckResult:
        self.calls.append("check")
        return self.checked(ctx)

    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        self.calls.append(arm.name)
        self.measured.append((ctx.repeat, arm.name))
        taken = {"time_s": self.times(arm.name, ctx.repeat), "forwards": 1.0}
        if arm.name == "fast":
            taken["copied_bytes"] = 64.0
        return taken

    def close(self) -> None:
        self.calls.append("close")

    def files(self) -> tuple[Path, ...]:
        return (self.source,)
