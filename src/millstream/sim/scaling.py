"""A cluster that grows and shrinks in virtual time: cold starts, readiness, draining, starts that fail.

The rule is one of `cluster/autoscale/`, the same object as in a live cluster. Here it is asked every `interval_s`, held
to the bounds, and what it wants is done: a replica that is added gets traffic when its cold start is over; one that is
removed gets no more, and ends when what is inside has ended. Replicas of a run are never used again: who comes later
has a place of its own, and an empty cache.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millstream.cluster.protocol import Autoscaler, FleetView
from millstream.core.errors import BadRequest
from millstream.core.request import Slo
from millstream.core.sequence import State

if TYPE_CHECKING:
    from millstream.sim.simulate import Served, Simulation

# Starts that failed are tried again after so long, twice as long each time: the back-off of a kubelet.
BACKOFF_S, MOST_BACKOFF_S = 10.0, 300.0


class Stage(enum.Enum):
    """DOWN: it was lost and will be back. GONE: it will not."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ScalingSetting:
    """How a cluster is scaled.

    `cold_start_s` is from the order of a replica to its first request. There are `least` to `most` replicas, whatever
    the rule says. `promise` is what requests without wishes of their own are promised, as attainment counts it over
    the last `window_s`. Raises BadRequest.
    """

    autoscaler: Autoscaler
    cold_start_s: float = 0.0
    least: int = 1
    most: int = 8
    promise: Slo = Slo()
    window_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.cold_start_s >= 0:
            raise BadRequest("cold_start_s", self.cold_start_s, "a number from 0")
        if self.least < 1:
            raise BadRequest("min_replicas", self.least, "an integer from 1")
        if self.most < self.least:
            raise BadRequest("max_replicas", self.most, f"an integer from min_replicas ({self.least})")
        if not self.window_s > 0:
            raise BadRequest("window_s", self.window_s, "a number above 0")


@dataclass(slots=True)
class Span:
    """The life of a replica, in seconds of the run; None: not come to yet."""

    place: int
    started_s: float
    ready_s: float | None = None
    drained_s: float | None = None
    ended_s: float | None = None
    stage: Stage = Stage.STARTING
    serial: int = 0  # of its start: one that was overtaken counts for nothing
    failed_starts: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What the rule saw, and what it wanted, held to the bounds."""

    at_s: float
    ready: int
    starting: int
    waiting: int
    running: int
    busy: float
    wanted: int


@dataclass(slots=True)
class ScalingLog:
    """What became of the number of replicas. `end_s` is when the last call ended."""

    spans: list[Span] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    changes: list[tuple[float, int, int]] = field(default_factory=list)  # when, from how many, to how many
    end_s: float = 0.0

    @property
    def replica_seconds(self) -> float:
        """What is paid for: from the start of each cold start to the end of the drain, or of the run."""
        return sum(self._end(span) - min(span.started_s, self.end_s) for span in self.spans)

    @property
    def reversals(self) -> int:
        """How often the number turned: up after down, or down after up."""
        ways = [after > before for _, before, after in self.changes]
        return sum(one != other for one, other in itertools.pairwise(ways))

    @property
    def peak(self) -> int:
        """The most replicas at once, starting and draining ones included."""
        edges = sorted([(span.started_s, 1) for span in self.spans] + [(self._end(span), -1) for span in self.spans])
        count = most = 0
        for _, change in edges:
            count += change
            most = max(most, count)
        return most

    def _end(self, span: Span) -> float:
        return self.end_s if span.ended_s is None else min(span.ended_s, self.end_s)


class Scaler:
    """Asks the rule, and does what it says to a simulation."""

    def __init__(self, simulation: Simulation, setting: ScalingSetting) -> None:
        self.simulation, self.setting = simulation, setting
        self.log = ScalingLog()
        self._kept: deque[tuple[float, bool]] = deque()
        self._arrived = self._ended = 0
        self._looked_s = 0.0
        self._busy_s: dict[int, float] = {}

    @property
    def interval_s(self) -> float:
        return self.setting.autoscaler.interval_s

    def first(self, count: int) -> None:
        """The replicas that are there, and ready, when the run begins."""
        for place in range(count):
            self.log.spans.append(Span(place, 0.0, 0.0, stage=Stage.READY))

    # -- what the simulation tells

    def arrived(self) -> None:
        self._arrived += 1

    def ended(self, served: Served, now: float) -> None:
        """A call has ended; a replica that drains and has nothing more inside is gone."""
        self._ended += 1
        met = self._met(served)
        if met is not None:
            self._kept.append((now, met))
        if 0 <= served.replica < len(self.log.spans):
            self.emptied(served.replica, now)

    def emptied(self, place: int, now: float) -> None:
        span, fleet = self.log.spans[place], self.simulation.fleet
        if span.stage is Stage.DRAINING and not fleet.members[place].requests:
            self._leave(span, now)

    def lost(self, place: int, for_s: float, crashes: int, now: float) -> bool:
        """A replica is lost; whether the simulation shall end what is inside."""
        if place >= len(self.log.spans):
            return False  # there is none yet: if it comes, its starts fail
        span = self.log.spans[place]
        if span.stage in (Stage.GONE, Stage.DOWN):
            return False
        span.serial += 1
        if span.stage is Stage.DRAINING:
            return True  # `emptied` is told when what was inside has gone elsewhere
        was, span.stage = span.stage, Stage.DOWN
        again = now + for_s
        if crashes or was is Stage.STARTING:
            again += self._start_s(span, crashes)
        self.simulation.at(again, self.ready, place, span.serial)
        return was is Stage.READY

    def ready(self, place: int, serial: int) -> None:
        """A start is over, well."""
        span = self.log.spans[place]
        if span.serial != serial or span.stage not in (Stage.STARTING, Stage.DOWN):
            return
        span.stage = Stage.READY
        if span.ready_s is None:
            span.ready_s = self.simulation.clock.now()
        self.simulation.restore(place)

    # -- the rule

    def look(self) -> None:
        """Asks the rule how many there should be, and begins what it takes to get there."""
        simulation, setting = self.simulation, self.setting
        if not simulation.open_calls:
            return
        now = simulation.clock.now()
        view = self.view(now)
        wanted = max(setting.least, min(setting.most, setting.autoscaler.target(view, now)))
        self.log.looks.append(
            Look(now, len(view.members), view.starting, view.waiting, view.running, view.busy, wanted)
        )
        if wanted != view.size:
            self.log.changes.append((now, view.size, wanted))
        for _ in range(wanted - view.size):
            self._start(now)
        for place in self._spare(view.size - wanted):
            self._remove(self.log.spans[place], now)
        simulation.at(now + self.interval_s, self.look)

    def view(self, now: float) -> FleetView:
        """The cluster since the last view. What is counted over time begins anew."""
        simulation = self.simulation
        members = simulation.fleet.up
        interval_s, self._looked_s = now - self._looked_s, now
        worked_s = able_s = 0.0
        waiting, running = len(simulation.homeless), 0
        oldest = min((simulation.arrival_of(call.id) for call in simulation.homeless), default=now)
        taken = blocks = 0
        for member in members:
            place = member.place
            ready_s = self.log.spans[place].ready_s or 0.0
            busy_s = simulation.busy_s(place)
            worked_s += busy_s - self._busy_s.get(place, 0.0)
            able_s += min(interval_s, now - ready_s)
            self._busy_s[place] = busy_s
            scheduler = simulation.replicas[place].engine.scheduler
            held = [seq for seq in scheduler.live.values() if seq.state is not State.RUNNING]
            waiting += len(held)
            running += len(scheduler.live) - len(held)
            oldest = min([oldest, *(seq.stamps.arrival for seq in held if not seq.num_output)])
            taken += scheduler.ledger.total() - scheduler.ledger.free()
            blocks += scheduler.ledger.total()
        while self._kept and self._kept[0][0] < now - self.setting.window_s:
            self._kept.popleft()
        view = FleetView(
            now,
            members,
            waiting,
            running,
            now - oldest,
            min(1.0, worked_s / able_s) if able_s > 0 else 0.0,
            sum(met for _, met in self._kept) / len(self._kept) if self._kept else None,
            sum(span.stage in (Stage.STARTING, Stage.DOWN) for span in self.log.spans),
            self._arrived,
            self._ended,
            interval_s,
            taken / blocks if blocks else 0.0,
        )
        self._arrived = self._ended = 0
        return view

    def _met(self, served: Served) -> bool | None:
        """Whether a call got what it was promised; None where that was nothing."""
        promised = served.call.slo or self.setting.promise
        times, arrival_s = served.times_s, served.arrival_s
        if not times or served.finish not in ("stop", "length"):
            return None if promised.met(None, None, 0.0) is None else False
        pace_s = (times[-1] - times[0]) / max(1, len(times) - 1)
        return promised.met(times[0] - arrival_s, pace_s, times[-1] - arrival_s)

    # -- what it takes

    def _start_s(self, span: Span, crashes: int) -> float:
        """How long until a start is over, where so many fail before, each at its end."""
        span.failed_starts += crashes
        waits = sum(min(MOST_BACKOFF_S, BACKOFF_S * 2.0**turn) for turn in range(crashes))
        return (1 + crashes) * self.setting.cold_start_s + waits

    def _start(self, now: float) -> None:
        place = self.simulation.grow()
        span = Span(place, now)
        self.log.spans.append(span)
        seconds = self._start_s(span, self.simulation.crashes_of(place, now))
        self.simulation.at(now + seconds, self.ready, place, span.serial)

    def _spare(self, count: int) -> list[int]:
        """Who goes: those that start yet, the last one first, then those with the least inside."""
        if count <= 0:
            return []
        spans, members = self.log.spans, self.simulation.fleet.members
        starting = [span.place for span in spans if span.stage in (Stage.STARTING, Stage.DOWN)]
        ready = [span.place for span in spans if span.stage is Stage.READY]
        order = sorted(starting, reverse=True)
        order += sorted(ready, key=lambda place: (members[place].requests, members[place].work_s, -place))
        return order[:count]

    def _remove(self, span: Span, now: float) -> None:
        span.drained_s = now
        empty = self.simulation.fleet.drain(span.place)
        span.stage = Stage.DRAINING
        if empty:
            self._leave(span, now)

    def _leave(self, span: Span, now: float) -> None:
        span.stage, span.ended_s = Stage.GONE, now
        self._busy_s.pop(span.place, None)
        self.simulation.shrink(span.place)
