"""A model in pieces: groups of its layers are services of their own, each with its own number of servers.

Every step of a request (its prompt, then each token) goes through all stages in order, and takes in each its share of
the step's time; a request's next step begins when the last one has left the last stage. Each stage has one queue, first
come, first served, before servers that take one step at a time: a tandem queue. That is a model of such services, not
an engine: nothing is batched, and moving activations from stage to stage takes no time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millstream.cluster.protocol import Autoscaler, FleetView, Member
from millstream.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Job:
    """A request: when it comes, and the seconds that each of its steps takes of the whole model."""

    at_s: float
    steps_s: tuple[float, ...]


@dataclass(slots=True)
class Passed:
    """What became of jobs: when each had its first step and its last; of stages, how long they worked, in seconds, and
    how many servers they came to have."""

    first_s: list[float]
    ended_s: list[float]
    worked_s: list[float]
    servers: list[int]


@dataclass(slots=True)
class _Stage:
    share: float
    servers: int
    free: int
    queue: deque[tuple[int, int]] = field(default_factory=deque)  # job, step
    starting: int = 0
    worked_s: float = 0.0
    seen_s: float = 0.0  # of the work, at the last look
    arrived: int = 0
    ended: int = 0


def tandem(
    jobs: Sequence[Job],
    shares: Sequence[float],
    servers: Sequence[int],
    autoscalers: Sequence[Autoscaler] = (),
    *,
    cold_start_s: float = 0.0,
    most: int = 8,
) -> Passed:
    """Passes jobs through stages of `shares` of the time, with `servers` at the start; one autoscaler a stage, or none.

    Raises BadRequest.
    """
    if len(shares) != len(servers) or not shares or (autoscalers and len(autoscalers) != len(shares)):
        raise BadRequest("stages", (len(shares), len(servers), len(autoscalers)), "as many shares as servers and rules")
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise BadRequest("shares", tuple(shares), "numbers above 0 whose sum is 1")
    if min(servers) < 1 or most < max(servers):
        raise BadRequest("servers", tuple(servers), f"integers from 1 to {most}")
    if any(not job.steps_s for job in jobs):
        raise BadRequest("jobs", "one without steps", "one step or more each")
    run = _Run(jobs, [_Stage(share, count, count) for share, count in zip(shares, servers, strict=True)])
    for place, rule in enumerate(autoscalers):
        run.at(rule.interval_s, run.look, place, rule, cold_start_s, most)
    return run.run()


class _Run:
    def __init__(self, jobs: Sequence[Job], stages: list[_Stage]) -> None:
        self.jobs, self.stages = jobs, stages
        self.now, self.left = 0.0, len(jobs)
        self.first = [0.0] * len(jobs)
        self.ended = [0.0] * len(jobs)
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.serials = itertools.count()
        for number, job in enumerate(jobs):
            self.at(job.at_s, self.come, number, 0, 0)

    def at(self, when: float, work: Callable[..., None], *given: object) -> None:
        heapq.heappush(self.heap, (when, next(self.serials), lambda: work(*given)))

    def run(self) -> Passed:
        while self.heap and self.left:
            self.now, _, work = heapq.heappop(self.heap)
            work()
        return Passed(
            self.first, self.ended, [stage.worked_s for stage in self.stages], [stage.servers for stage in self.stages]
        )

    def come(self, number: int, step: int, place: int) -> None:
        stage = self.stages[place]
        stage.arrived += 1
        stage.queue.append((number, step))
        self.serve(place)

    def serve(self, place: int) -> None:
        stage = self.stages[place]
        while stage.free > 0 and stage.queue:
            number, step = stage.queue.popleft()
            stage.free -= 1
            seconds = self.jobs[number].steps_s[step] * stage.share
            stage.worked_s += seconds
            self.at(self.now + seconds, self.leave, number, step, place)

    def leave(self, number: int, step: int, place: int) -> None:
        stage = self.stages[place]
        stage.free += 1
        stage.ended += 1
        if place + 1 < len(self.stages):
            self.come(number, step, place + 1)
        else:
            if step == 0:
                self.first[number] = self.now
            if step + 1 < len(self.jobs[number].steps_s):
                self.come(number, step + 1, 0)
            else:
                self.ended[number] = self.now
                self.left -= 1
        self.serve(place)

    def look(self, place: int, rule: Autoscaler, cold_start_s: float, most: int) -> None:
        stage = self.stages[place]
        working = stage.servers - max(0, stage.free)
        view = FleetView(
            self.now,
            [Member(one, f"stage {place}/{one}") for one in range(stage.servers)],
            len(stage.queue),
            working,
            0.0,
            min(1.0, (stage.worked_s - stage.seen_s) / (stage.servers * rule.interval_s)),
            None,
            stage.starting,
            stage.arrived,
            stage.ended,
            rule.interval_s,
        )
        stage.arrived = stage.ended = 0
        stage.seen_s = stage.worked_s
        wanted = max(1, min(most, rule.target(view, self.now)))
        for _ in range(wanted - view.size):
            stage.starting += 1
            self.at(self.now + cold_start_s, self.start, place)
        if wanted < stage.servers and not stage.starting:
            # Who works yet ends what it has: `free` is below 0 until then.
            stage.free -= stage.servers - wanted
            stage.servers = wanted
        self.at(self.now + rule.interval_s, self.look, place, rule, cold_start_s, most)

    def start(self, place: int) -> None:
        stage = self.stages[place]
        stage.starting -= 1
        stage.servers += 1
        stage.free += 1
        self.serve(place)
