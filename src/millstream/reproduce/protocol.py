"""What an experiment promises. One file a paper: `reproduce/fastgen.py` is the experiment `fastgen`.

    class FastGen(Experiment):
        name, paper, title = "fastgen", 19, "Dynamic SplitFuse against prefill-first and Orca"
        arms = (Arm("prefill-first", "..."), Arm("orca", "..."), Arm("splitfuse", "...", ("meter:splitfuse",)))
        metrics = (Metric("itl_p95_s", "s", "lower"), ...)
        claim = Claim("P95 token latency 3.7 times lower than vLLM", (Figure("P95 inter-token latency",
                      of=Of("prefill-first", "itl_p95_s"), over=Of("splitfuse", "itl_p95_s"), low=3.7),))
        required = (Required("P95 inter-token latency at least 2 times lower", of=Of("prefill-first", "itl_p95_s"),
                             over=Of("splitfuse", "itl_p95_s"), at_least=2.0),)

        def inputs(self, ctx): ...
        def open(self, ctx): ...
        def check(self, ctx): ...
        def measure(self, ctx, arm): ...

    PLUGIN = FastGen
    CARD = Card("fastgen", "...", paper=19)

The top level of an experiment's file imports neither torch nor an engine: its claim is read to write the docs.
Import those inside the methods.
"""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import ClassVar, Literal

from millstream.core import registry
from millstream.core.errors import ConfigError

Better = Literal["lower", "higher", ""]
How = Literal["medians", "paired", "every"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to do the same work. `uses` names the plug-ins it turns on, as "point:name"; their files are hashed."""

    name: str
    description: str
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A named number that `measure` returns: its unit ("s", "tokens/s", "bytes", "%", "" for a pure number)."""

    name: str
    unit: str
    better: Better = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Of:
    """A metric of an arm."""

    arm: str
    metric: str

    def __str__(self) -> str:
        return f"{self.metric} of {self.arm}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that the paper claims: `of` divided by `over` (or `of` alone) lies in low..high (None: just `low`)."""

    text: str
    of: Of
    over: Of | None
    low: float
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says, in words, and as figures where ours can stand beside them."""

    text: str
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, slots=True)
class Required:
    """A row that must hold: `of` (divided by `over` when given) is within at_least..at_most.

    `how` picks the number: "medians" is the ratio of the arms' medians over the repeats, "paired" the median of the
    ratios taken repeat by repeat, "every" asks that every single repeat holds.
    `out_of_reach` says why the row cannot hold here; when it does not, the verdict is 'partly', not 'failed'.
    `elsewhere` names what does measure the row; it is reported and does not hold back 'works'.
    A row without a bound, or whose metric an arm does not return, counts as not measured, which is not passing.
    """

    text: str
    of: Of
    over: Of | None = None
    at_least: float | None = None
    at_most: float | None = None
    how: How = "medians"
    out_of_reach: str = ""
    elsewhere: str = ""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One correctness check: what was compared, whether it held, and on how much."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of all correctness checks. No rows at all is not a pass: nothing was checked."""

    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)


@dataclass(slots=True)
class Context:
    """What the harness hands to an experiment.

    `data` is the folder of public data sets, None when there is none. `scratch` is an empty folder that is removed
    afterwards. `say` shows a line of progress; it is not recorded.
    """

    quick: bool
    seed: int
    data: Path | None
    scratch: Path
    say: Callable[[str], None]
    repeat: int = -1
    late_checks: list[CheckRow] = field(default_factory=list)

    def size(self, full: int, quick: int) -> int:
        """The size of the run being made."""
        return quick if self.quick else full

    def expect(self, name: str, passed: bool, detail: str = "") -> None:
        """A correctness check made while measuring (same tokens, nothing leaked). A failed one voids the record."""
        self.late_checks.append(CheckRow(name, bool(passed), detail))


class Experiment(ABC):
    """A paper's claim as a command: arms on the same weights and inputs, correctness first, then numbers.

    The harness calls `open`, `check`, then `measure` once for every arm and repeat in rotating order, then `close`
    whatever happened. `measure` does one whole run of one arm from the same start state and returns the same declared
    metrics each time; what it must not time (building an engine, reading data) belongs in `open`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[int | None] = None
    arms: ClassVar[tuple[Arm, ...]]
    metrics: ClassVar[tuple[Metric, ...]]
    claim: ClassVar[Claim]
    required: ClassVar[tuple[Required, ...]]
    repeats: ClassVar[int] = 5
    quick_repeats: ClassVar[int] = 3
    warmup: ClassVar[int] = 1
    """Runs of every arm before the first recorded repeat."""
    seconds: ClassVar[float] = 600.0
    """What a full run is meant to take, in seconds; `quick_seconds` likewise. Going over is a warning."""
    quick_seconds: ClassVar[float] = 60.0
    sources: ClassVar[tuple[str, ...]] = ()
    """What makes up the technique besides the plug-ins its arms use: modules ("millstream.sched.scheduler"), or one
    file of a package ("millstream.ops.cpu/paged_attention.cpp")."""

    def inputs(self, ctx: Context) -> Mapping[str, bytes | Path]:
        """The inputs by name, as bytes or as a file; the record holds their sha256. Called after `open`."""
        return {}

    def open(self, ctx: Context) -> None:
        """Load weights, read inputs, build engines. Raises the typed error of what is missing."""
        return

    @abstractmethod
    def check(self, ctx: Context) -> CheckResult:
        """Correctness before speed. An AssertionError counts as a failed row; other errors end the run."""

    @abstractmethod
    def measure(self, ctx: Context, arm: Arm) -> Mapping[str, float]:
        """One run of `arm`: metric name -> value. A metric that this arm does not have is left out."""

    def close(self) -> None:
        """Give everything back. Called once, also after an error."""
        return

    def files(self) -> tuple[Path, ...]:
        """The files whose content is the technique and the experiment: a change makes the record stale."""
        modules = [type(self).__module__, *self.sources]
        for use in sorted({use for arm in self.arms for use in arm.uses}):
            point, _, name = use.partition(":")
            modules.append(_plugin_module(point, name))
        return tuple(dict.fromkeys(path for module in modules for path in module_files(module)))


def _plugin_module(point: str, name: str) -> str:
    if point not in registry.POINTS:
        raise ConfigError(
            f"{point}:{name}: there is no extension point {point!r}; there are: {', '.join(registry.POINTS)}"
        )
    return f"{registry.POINTS[point]}.{name.replace('-', '_')}"


def module_files(module: str) -> tuple[Path, ...]:
    """The source files of a module; of a package all of them, C++ included, or the one named behind a slash.

    Imports the module's parents, not the module. Raises ConfigError when there is no such module or file.
    """
    module, _, wanted = module.partition("/")
    loaded = sys.modules.get(module)
    spec = getattr(loaded, "__spec__", None) or _spec(module)
    origin = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
    if origin is None:
        raise ConfigError(f"there is no module {module!r} to take the hash of")
    path = Path(origin)
    if wanted:
        if not (path.parent / wanted).is_file():
            raise ConfigError(f"there is no file {wanted!r} in {module!r} to take the hash of")
        return (path.parent / wanted,)
    if path.name != "__init__.py":
        return (path,)
    return tuple(sorted(found for found in path.parent.rglob("*") if found.suffix in SOURCE_SUFFIXES))


SOURCE_SUFFIXES = frozenset({".py", ".cpp", ".cc", ".c", ".h", ".hpp", ".cu", ".metal"})


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def audit(experiment: Experiment) -> None:
    """Checks what an experiment says of itself. Raises ConfigError naming the first thing that does not fit."""
    arms = [arm.name for arm in experiment.arms]
    metrics = [metric.name for metric in experiment.metrics]
    where = f"experiment {experiment.name!r}"
    if len(arms) < 2 or len(set(arms)) != len(arms):
        raise ConfigError(f"{where}: at least two arms with different names (baseline first), got {arms}")
    if not metrics or len(set(metrics)) != len(metrics):
        raise ConfigError(f"{where}: at least one metric, with different names, got {metrics}")
    if experiment.repeats < 5 or experiment.quick_repeats < 3 or experiment.warmup < 0:
        raise ConfigError(
            f"{where}: repeats {experiment.repeats} (at least 5), quick_repeats {experiment.quick_repeats} "
            f"(at least 3), warmup {experiment.warmup} (at least 0)"
        )
    if not experiment.required:
        raise ConfigError(f"{where}: no required row; without one nothing could fail")
    rows: Sequence[Figure | Required] = (*experiment.claim.figures, *experiment.required)
    for row in rows:
        for side in (row.of, row.over):
            if side is not None and (side.arm not in arms or side.metric not in metrics):
                raise ConfigError(
                    f"{where}: {row.text!r} speaks of {side}; arms: {', '.join(arms)}; metrics: {', '.join(metrics)}"
                )
    for need in experiment.required:
        if need.at_least is None and need.at_most is None and not (need.out_of_reach or need.elsewhere):
            raise ConfigError(f"{where}: {need.text!r} has no bound")
