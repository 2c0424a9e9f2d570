"""Offline work in the time that online requests leave: online first, offline by shared prefixes, never ahead of it.

HyGen (Sun et al., 2025). Requests of a priority from `offline_from` on are offline: they have no wishes, and there are
many of them. In each step online requests go first and may take the places and blocks of offline ones; how much
offline work still fits into the step is cut by its predicted time (the meter latency-budget, which belongs to it).
Offline requests that wait are ordered as a walk through the tree of their prompts goes, so that those that share a
prefix follow each other while it is held; of every 1/`age_share` that begin, one is the oldest, so that none starves.
Put it before an order such as fcfs, which is that of online requests; or after vtc, for shares among tenants.
When to want it: one machine for a service with slack between its bursts and for batches that can wait.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from millstream.core.events import Admitted, Event, Finished, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`offline_from`: the least number of a priority that is offline. `order` of those: by shared prefixes ("prefix"),
    or as they come ("fcfs")."""

    offline_from: int = 1
    age_share: float = 0.1
    order: str = "prefix"

    def __post_init__(self) -> None:
        if not 0 < self.age_share <= 1:
            raise ValueError(f"age_share must be above 0 and up to 1, got {self.age_share}")
        if self.order not in ("prefix", "fcfs"):
            raise ValueError(f"order must be prefix or fcfs, got {self.order!r}")


@dataclass(slots=True)
class _Node:
    """A block of prompts in the tree of those that wait. `first`: when the first prompt through it came."""

    first: int
    below: dict[int, _Node] = field(default_factory=dict)
    here: list[int] = field(default_factory=list)  # sequences whose prompt ends here
    count: int = 0  # sequences here and below


class Hygen(Policy):
    preemptive = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._root = _Node(0)
        self._paths: dict[int, tuple[int, ...]] = {}  # offline sequences that have not begun
        self._places: dict[int, int] | None = None  # of them in the walk; None when the tree has grown
        self._ages: list[tuple[float, int]] = []  # of them, the oldest first
        self._begun = 0
        self._serial = 0

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if not self._offline(seq):
            return (0.0, 0.0)
        if seq.id not in self._paths:
            # Half-done work goes on: a decode costs little, and its blocks are held.
            return (1.0, 0.0 if seq.state is State.RUNNING else 1.0)
        if self._begun % self._turn == self._turn - 1 and self._ages and self._ages[0][1] == seq.id:
            return (2.0, -1.0)
        return (2.0, float(self._walk()[seq.id]))

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        return not self._offline(seq) and self._offline(other)

    def observe(self, event: Event) -> None:
        if isinstance(event, Submitted):
            if self._offline(event.seq):
                self._enter(event.seq)
        elif isinstance(event, Admitted):
            if event.seq.id in self._paths:
                self._begun += 1
                self._leave(event.seq)
        elif isinstance(event, Finished) and event.seq.id in self._paths:
            self._leave(event.seq)

    @property
    def _turn(self) -> int:
        """Every so many offline requests that begin, one is the oldest."""
        return max(1, round(1 / self.config.age_share))

    def _offline(self, seq: SeqView) -> bool:
        return seq.priority >= self.config.offline_from

    def _enter(self, seq: SeqView) -> None:
        self._serial += 1
        path = seq.prefix if self.config.order == "prefix" else (self._serial,)
        self._paths[seq.id] = path
        insort(self._ages, (seq.arrival, seq.id))
        node = self._root
        node.count += 1
        for name in path:
            below = node.below.get(name)
            if below is None:
                below = node.below[name] = _Node(self._serial)
            node = below
            node.count += 1
        node.here.append(seq.id)
        self._places = None

    def _leave(self, seq: SeqView) -> None:
        path = self._paths.pop(seq.id)
        self._ages.remove((seq.arrival, seq.id))
        node = self._root
        node.count -= 1
        for name in path:
            below = node.below[name]
            below.count -= 1
            if below.count == 0:
                del node.below[name]
                return
            node = below
        node.here.remove(seq.id)

    def _walk(self) -> dict[int, int]:
        """The place of each in a walk through the tree: a prefix before what goes on from it, older branches first.

        Who leaves changes nobody else's order, so that it is walked anew only when somebody came.
        """
        if self._places is None:
            places: dict[int, int] = {}
            stack = [self._root]
            while stack:
                node = stack.pop()
                for seq_id in node.here:
                    places[seq_id] = len(places)
                stack += sorted(node.below.values(), key=lambda one: -one.first)
            self._places = places
        return self._places


CARD = Card("hygen", "online first, offline work by shared prefixes in what is left", paper=58)
PLUGIN = Hygen
