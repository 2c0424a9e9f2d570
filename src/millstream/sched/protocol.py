"""What the scheduling room promises.

The loop (`scheduler.py`) keeps everything safe: no block is handed out twice, nothing that waits at a gate is launched,
a victim is only taken for somebody who ranks before it. Policies only prefer; meters only cut.

Policies and meters derive from their protocol, whose methods have no opinion: a plug-in says what it has one on.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from millstream.core.events import Event
from millstream.core.request import Hints, Request
from millstream.core.sequence import Sequence, SeqView
from millstream.core.shape import StepShape


class Verdict(enum.Enum):
    """ADMIT it now; SKIP it for this step; HOLD it and everybody who ranks after it, so that none overtakes."""

    ADMIT = "admit"
    SKIP = "skip"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a step may take; None: no opinion. Of several policies' budgets the smallest wins."""

    tokens: int | None = None
    rows: int | None = None


class LoadView:
    """How the engine stands when a step is planned: built once a step, read-only for policies.

    `hit` tells how many tokens of a sequence that waits are held by the prefix cache now, at most some steps ago.
    `cost` tells how long steps take, where that is known of this engine. `full`: as many run as may (a meter says so),
    so that nobody gets in unless it takes the place of somebody else.
    """

    __slots__ = (
        *("block_size", "budget", "cost", "free_blocks", "full", "hit"),
        *("now", "running", "total_blocks", "waiting"),
    )

    def __init__(
        self,
        now: float,
        free_blocks: int,
        total_blocks: int,
        waiting: Seq[SeqView],
        running: Seq[SeqView],
        hit: Callable[[SeqView], int] = lambda seq: 0,
        cost: StepCost | None = None,
        block_size: int = 1,
    ) -> None:
        self.now = now
        self.free_blocks = free_blocks
        self.total_blocks = total_blocks
        self.waiting = waiting
        self.running = running
        self.hit, self.cost, self.block_size = hit, cost, block_size
        self.budget = Budget()
        self.full = False


class Ranking(Protocol):
    """An order: what a policy that shares out among groups asks about the order inside of one."""

    constant_rank: bool

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        """As `Policy.rank`; no two sequences have the same."""
        ...


class Policy(Protocol):
    """Who goes first. Every method must be a pure function of what it was shown, and cheap: it runs every step."""

    preemptive: bool = False
    """Whether `displaces` is ever true; where no policy of an engine is, nobody is asked."""
    needs_cost: bool = False
    """Whether it cannot do without `LoadView.cost`."""
    constant_rank: bool = False
    """Whether a sequence has one rank from its first to its last step here, so that it is asked for once."""

    @abstractmethod
    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        """Smaller goes first. Must not change while nothing happens to the sequence, else work is thrown away."""
        ...

    def atop(self, below: Ranking) -> None:
        """Told once, before anything else, where others are stacked after it: how they rank.

        Ranks concatenate, so that those of a policy which give each sequence a place of its own leave nothing to
        decide; such a policy asks `below` who of a group goes first.
        """
        return

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        """Asked for sequences that hold no place yet."""
        return Verdict.ADMIT

    def budget(self, view: LoadView) -> Budget:
        return Budget()

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        """Who gives up its blocks when they run out; `running` is in rank order. None: no opinion (the last one)."""
        return None

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        """Whether `seq`, for which there is no place, may take that of `other`, which runs and ranks after it.

        What `other` has computed is put off or thrown away: say yes only for a difference that is worth it.
        """
        return False

    def observe(self, event: Event) -> None:
        return


class Meter(Protocol):
    """Cuts how many tokens a sequence gets in this step. Meters are asked in order, each sees the last one's answer.

    Meters are part of the mechanism, so they see the Sequence itself; a meter is made with the ledger.
    """

    relieved_by_preemption: bool
    """Whether an answer of 0 may change when another sequence gives up its blocks."""
    needs_cost: bool = False
    """Whether it cannot do without `LoadView.cost`."""
    counts_places: bool = False
    """Whether an answer of 0 to one that does not run may change when one that runs gives up its place."""

    def begin(self, view: LoadView) -> None:
        """A step is being planned. A meter that is closed from the start, all its places taken, sets `view.full`."""
        return

    @abstractmethod
    def fit(self, seq: Sequence, n: int) -> int:
        """At most how many of `n` tokens it may get, 0 for none. Changes nothing: it may be asked again."""
        ...

    def closed(self) -> bool:
        """Whether nobody that does not run yet can get a token any more in this step, so that none is asked about.

        Once true it stays so until the next `begin`, unless somebody gives up its place.
        """
        return False

    def take(self, seq: Sequence, n: int) -> None:
        """It gets `n` tokens in this step. Called before slots are allocated, so that blocks can be claimed ahead."""
        return

    def outgrown(self, seq: Sequence) -> bool:
        """Whether it has come to the end of what this meter claimed for it, and gives up its place to ask for more."""
        return False

    def gave_up(self, seq: Sequence) -> None:
        """It lost its place in the step that is being planned."""
        return


class LengthPredictor(Protocol):
    """Guesses how long outputs will be, so that policies can order by it.

    Plug-ins are made with `text`: how a prompt reads (ids -> text), None where prompts are no texts (a simulation).
    """

    @abstractmethod
    def guess(self, requests: Seq[Request]) -> list[Hints]:
        """Hints for each, in order. Asked once a request, before it is first ranked, for all that came since the last
        step at once; the time it takes is added to that step.

        What a request says itself comes before a guess, whatever this returns. Must not read `hints.oracle`.
        """
        ...

    def observe(self, event: Event) -> None:
        """What happened since; an output that ended (Finished) tells how long it was."""
        return


class StepCost(Protocol):
    """How long a step takes, told by its shape: one model for schedulers, planners, routers and the simulator."""

    def fit(self, samples: Seq[tuple[StepShape, float]]) -> None:
        """Learns from measured steps: shapes and seconds. Raises BadRequest where they do not determine it."""
        ...

    def seconds(self, shape: StepShape) -> float:
        """Never negative, and cheap: some microseconds. Raises MillstreamError before it was fitted."""
        ...

    def residual(self) -> float:
        """Mean absolute error over the samples that it was fitted to, as a share of what was measured."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What it has learned, as JSON can hold it; `restore` takes it back."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises BadFile's cause, ValueError, for what `state` never gave."""
        ...
