"""A cluster in virtual time: calls come, a router picks an engine for each, engines make their steps.

Nothing here decides anything: replicas are the production engine (`replica.py`), routers those of `cluster/`. One heap
holds what happens and when; ties are broken by the order in which things were put there, so that a run is a function
of its inputs.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from millstream.cluster.fleet import Fleet, NoEngine
from millstream.cluster.protocol import Autoscaler, Done, Router
from millstream.core import registry
from millstream.core.client import Chunk
from millstream.core.clock import VirtualClock
from millstream.core.errors import BadRequest
from millstream.core.events import Event, Stepped
from millstream.core.request import Prior, Request, SamplingParams, Slo, Tokens
from millstream.sched.profiles import Profile
from millstream.sim.leap import earliest_end, leap
from millstream.sim.replica import EngineSetting, Replica, build, member_of
from millstream.sim.scaling import Scaler, ScalingLog, ScalingSetting
from millstream.sim.sim_runner import VOCAB
from millstream.sim.workload import Call, Releases

# Objects that are made before Python looks for cycles among them.
YOUNG = 10_000


@dataclass(frozen=True, slots=True)
class Failure:
    """Replica number `replica` is lost at `at_s` and is back, empty, `for_s` seconds later.

    With `crashes` it then starts so many times in vain, each start a cold start long and waiting longer than the last
    one, before one is well. Of a replica that is added after `at_s` it is the first start that fails so.
    """

    replica: int
    at_s: float
    for_s: float
    crashes: int = 0


@dataclass(slots=True)
class Served:
    """One call as its client saw it. Seconds of the virtual clock; `times_s` has an entry for each output token."""

    call: Call
    arrival_s: float
    replica: int = -1
    times_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    cached: int = 0
    preemptions: int = 0
    retries: int = 0
    finish: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepMade:
    """A step as a trace shows it."""

    replica: int
    start_s: float
    seconds: float
    rows: int
    tokens: int
    prompt_tokens: int
    waiting: int
    running: int


@dataclass(slots=True)
class Result:
    """What came of a simulation. `wall` is left to whoever reads a clock."""

    served: list[Served]
    replicas: list[Replica]
    duration_s: float
    steps: int
    busy_s: list[float]
    made: list[StepMade]
    scaling: ScalingLog | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of every call's times, counts and end: equal runs have equal ones."""
        found = hashlib.sha256()
        for one in self.served:
            found.update(
                struct.pack(
                    f"<qdqqqq{len(one.times_s)}d",
                    one.call.id,
                    one.arrival_s,
                    one.replica,
                    one.cached,
                    one.preemptions,
                    one.retries,
                    *one.times_s,
                )
            )
            found.update(one.finish.encode())
        return found.hexdigest()[:16]


class Simulation:
    """One run. `slo` gives every request its wishes and deadline, `oracle` tells policies true output lengths, or by
    call whatever an experiment's arm takes for the truth.

    `max_tokens` is what clients say that they want at most, which is all that a policy may know of an output's length.
    `progress` hears of each call that ended. With `keep_steps` every step is kept, for a trace. Without `leaps` every
    step is planned, also where it could not be another than the last (`leap.py`).

    With an `autoscaler` replicas come and go (`scaling.py`): `replicas` are those that are there at the start, and who
    is added is of the first one's kind. There are `min_replicas` to `max_replicas`, and an added one is ready
    `cold_start_s` seconds after it was ordered. `promise` is what requests without wishes of their own are promised,
    as the autoscaler sees it. Raises BadRequest.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        replicas: Sequence[tuple[str, Profile]],
        setting: EngineSetting,
        router: Router | None = None,
        *,
        slo: Slo | None = None,
        failures: Sequence[Failure] = (),
        seed: int = 0,
        oracle: bool | Mapping[int, int] = False,
        max_tokens: int = 4096,
        keep_steps: bool = False,
        leaps: bool = True,
        progress: Callable[[], None] | None = None,
        autoscaler: Autoscaler | None = None,
        cold_start_s: float = 0.0,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        promise: Slo | None = None,
    ) -> None:
        if not replicas:
            raise BadRequest("replicas", 0, "at least one")
        self.clock = VirtualClock()
        self.calls, self.setting, self.seed = calls, setting, seed
        self.slo, self.oracle, self.max_tokens = slo or Slo(), oracle, max_tokens
        self.progress = progress
        self._keep = keep_steps
        self._context = min(profile.max_context for _, profile in replicas)
        self._leaps = leaps and not keep_steps and setting.plans == 1 and not setting.noise
        # When something comes from outside: calls, losses, deadlines.
        self._outside: list[float] = []
        self.made: list[StepMade] = []
        self.replicas = [self._replica(place, name, profile) for place, (name, profile) in enumerate(replicas)]
        members = [member_of(place, replica) for place, replica in enumerate(self.replicas)]
        self.fleet = Fleet(router or registry.make("router", "least-work"), members)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = itertools.count()
        self._served: dict[int, Served] = {}
        self._releases = Releases(calls)
        self.homeless: list[Call] = []  # no replica is up
        self.open_calls = len(calls)
        self._failures = tuple(failures)
        self._scaler: Scaler | None = None
        self._lost_steps = 0  # of engines that are gone
        self._busy_s = [0.0] * len(self.replicas)
        for call in self._releases.first:
            self.at(call.at_s, self._arrive, call)
        for failure in failures:
            if failure.replica < 0 or (autoscaler is None and failure.replica >= len(self.replicas)):
                raise BadRequest("failure", failure.replica, f"a replica from 0 to {len(self.replicas) - 1}")
            if failure.crashes < 0 or (failure.crashes and autoscaler is None):
                raise BadRequest("crashes", failure.crashes, "0, or with an autoscaler an integer from 0")
            self.at(failure.at_s, self._lose, failure)
            if autoscaler is None:
                self.at(failure.at_s + failure.for_s, self.restore, failure.replica)
        if autoscaler is not None:
            most = max(len(replicas), min_replicas) if max_replicas is None else max_replicas
            setting_of = ScalingSetting(autoscaler, cold_start_s, min_replicas, most, promise or self.slo)
            if not min_replicas <= len(replicas) <= most:
                raise BadRequest("replicas", len(replicas), f"from {min_replicas} to {most} at the start")
            self._scaler = Scaler(self, setting_of)
            self._scaler.first(len(replicas))
            self.at(self._scaler.interval_s, self._scaler.look)

    def _replica(self, place: int, name: str, profile: Profile) -> Replica:
        def hear(event: Event) -> None:
            if type(event) is Stepped:
                self._keep_step(place, event)

        # What nobody hears of is not told.
        return build(name, profile, self.setting, self.clock, self.seed + place, (hear,) if self._keep else ())

    def at(self, when: float, work: Callable[..., None], *given: object, inside: bool = False) -> None:
        """Has something done at a time. Not `inside`: it may change what engines do, who never leap beyond it."""
        if not inside:
            heapq.heappush(self._outside, when)
        heapq.heappush(self._heap, (when, next(self._serials), lambda: work(*given)))

    def run(self) -> Result:
        """Raises what engines raise for calls that no replica can ever take."""
        # To look for cycles among so many tokens takes a tenth of a run, and few are ever found.
        usual = gc.get_threshold()
        gc.set_threshold(usual[0] and max(usual[0], YOUNG), *usual[1:])
        try:
            return self._run()
        finally:
            gc.set_threshold(*usual)

    def _run(self) -> Result:
        heap, clock = self._heap, self.clock
        while heap:
            when, _, work = heapq.heappop(heap)
            if when > clock.now():
                clock.to(when)
            work()
        served = [self._served[call.id] for call in self.calls if call.id in self._served]
        for place, replica in enumerate(self.replicas):
            self._busy_s[place] += replica.runner.busy_s
        steps = self._lost_steps + sum(replica.engine.num_steps for replica in self.replicas)
        ends = [one.ended_s for one in served if one.ended_s is not None]
        start = min((one.arrival_s for one in served), default=0.0)
        scaling = None
        if self._scaler is not None:
            scaling = self._scaler.log
            scaling.end_s = max(ends, default=start)
        return Result(served, self.replicas, max(ends, default=start) - start, steps, self._busy_s, self.made, scaling)

    # -- what happens

    def _arrive(self, call: Call) -> None:
        self._served[call.id] = Served(call, self.clock.now())
        if self._scaler is not None:
            self._scaler.arrived()
        self._send(call)

    def _send(self, call: Call) -> None:
        served, now = self._served[call.id], self.clock.now()
        try:
            request, place = self.fleet.send(self._request(call, served), now)
        except NoEngine:
            self.homeless.append(call)
            return
        replica = self.replicas[place]
        served.replica = place
        replica.inside.add(call.id)
        try:
            replica.engine.submit(request, lambda chunk: self._hear_chunk(place, call, chunk))
        except BadRequest as error:
            replica.inside.discard(call.id)
            self.fleet.ended(call.id, Done(0, whole=False), now)
            served.error, served.ended_s, served.finish = str(error), self.clock.now(), "error"
            self._over(call)
            return
        if self.slo.deadline_s is not None:
            self.at(self.clock.now() + self.slo.deadline_s, self._kick, place)
        if not replica.busy:
            self._kick(place)

    def _request(self, call: Call, served: Served) -> Request:
        # The seed tells the runner, and nobody else, where the output ends.
        most = max(1, min(self.max_tokens, self._context - call.num_prompt))
        params = SamplingParams(max_tokens=max(most, call.num_output), temperature=0.0, seed=call.num_output)
        prior = (Prior(0, self._told(served)),) if served.times_s else ()
        return Request(
            call.id,
            (Tokens(call.prompt, below=VOCAB),),
            params,
            arrival=served.arrival_s,
            tenant=call.tenant,
            program=call.program,
            slo=self.slo if call.slo is None else call.slo,
            priority=call.priority,
            hints=replace(call.hints, oracle=self._truth(call)) if self.oracle else call.hints,
            prior=prior,
        )

    def _truth(self, call: Call) -> int:
        return call.num_output if isinstance(self.oracle, bool) else self.oracle[call.id]

    @staticmethod
    def _told(served: Served) -> tuple[int, ...]:
        """Tokens that stand for what a lost engine had answered already."""
        return tuple(range(1, 1 + len(served.times_s)))

    def _hear_chunk(self, place: int, call: Call, chunk: Chunk) -> None:
        served, now = self._served[call.id], self.clock.now()
        if len(chunk.tokens) == 1:
            served.times_s.append(now)
        else:
            served.times_s += [now] * len(chunk.tokens)
        if chunk.usage is not None and chunk.usage.cached_tokens > served.cached:
            served.cached = chunk.usage.cached_tokens
        if chunk.finish is not None:
            served.ended_s, served.finish, served.error = now, chunk.finish.value, chunk.error or ""
            served.preemptions += 0 if chunk.metrics is None else chunk.metrics.preemptions
            replica = self.replicas[place]
            replica.inside.discard(call.id)
            worked = 0.0 if chunk.metrics is None else chunk.metrics.worked_s
            self.fleet.ended(call.id, Done(len(served.times_s), served.cached, worked), now)
            replica.served += 1
            self._over(call)

    def _over(self, call: Call) -> None:
        self.open_calls -= 1
        if self._scaler is not None:
            self._scaler.ended(self._served[call.id], self.clock.now())
        for follower in self._releases.ended(call.id):
            self.at(self.clock.now() + follower.think_s, self._arrive, follower)
        if self.progress is not None:
            self.progress()

    def _keep_step(self, place: int, event: Stepped) -> None:
        self.made.append(
            StepMade(
                place,
                event.now - event.seconds,
                event.seconds,
                event.rows,
                event.tokens,
                event.prompt_tokens,
                event.waiting,
                event.running,
            )
        )

    def _kick(self, place: int) -> None:
        """Has an idle engine make a step, where there is one to make."""
        replica = self.replicas[place]
        if replica.busy or not replica.up:
            return
        if replica.engine.launch():
            replica.busy = True
            self.at(replica.runner.launched[0].done_at, self._done, place, replica.epoch, inside=True)

    def _done(self, place: int, epoch: int) -> None:
        replica = self.replicas[place]
        if replica.epoch != epoch:
            return  # it was lost meanwhile
        replica.engine.collect()
        replica.busy = False
        if self._leaps and (times := leap(replica, self.clock.now(), self._quiet_until(place))):
            for number in replica.inside:
                self._served[number].times_s += times
            replica.runner.free_at = times[-1]
            replica.busy = True
            self.at(times[-1], self._go_on, place, epoch, inside=True)
            return
        self._kick(place)

    def _go_on(self, place: int, epoch: int) -> None:
        replica = self.replicas[place]
        if replica.epoch == epoch:
            replica.busy = False
            self._kick(place)

    def _quiet_until(self, place: int) -> float:
        """Until when nothing comes to a replica from outside of it."""
        now = self.clock.now()
        while self._outside and self._outside[0] < now:
            heapq.heappop(self._outside)
        quiet = self._outside[0] if self._outside else math.inf
        if self._releases:
            # What ends anywhere may bring the next call of a session.
            quiet = min([quiet, *(earliest_end(one, now) for one in self.replicas if one is not self.replicas[place])])
        return quiet

    def _lose(self, failure: Failure) -> None:
        place, now = failure.replica, self.clock.now()
        if self._scaler is not None:
            if not self._scaler.lost(place, failure.for_s, failure.crashes, now):
                return
        elif not self.replicas[place].up:
            return
        inside = [request.id for request in self.fleet.lost(place, now)]
        for seq in self.replicas[place].engine.scheduler.live.values():
            self._served[seq.request.id].preemptions += seq.preemptions
        self._empty(place)
        for number in inside:
            served = self._served[number]
            served.retries += 1
            self._send(served.call)
        if self._scaler is not None:
            self._scaler.emptied(place, now)

    def _empty(self, place: int) -> None:
        """A fresh replica in the place of another, not up yet."""
        replica = self.replicas[place]
        self._busy_s[place] += replica.runner.busy_s
        self._lost_steps += replica.engine.num_steps
        fresh = self._replica(place, replica.name, replica.profile)
        fresh.up, fresh.epoch, fresh.served = False, replica.epoch + 1, replica.served
        self.replicas[place] = fresh

    def restore(self, place: int) -> None:
        """The replica there takes requests from now on."""
        self.replicas[place].up = self.fleet.members[place].up = True
        waiting, self.homeless = self.homeless, []
        for call in waiting:
            self._send(call)

    # -- for who scales

    def grow(self) -> int:
        """One more replica of the first one's kind, not up yet; its place."""
        place, profile = len(self.replicas), self.replicas[0].profile
        replica = self._replica(place, f"{profile.name}/{place}", profile)
        replica.up = False
        self.replicas.append(replica)
        self._busy_s.append(0.0)
        like = member_of(place, replica)
        self.fleet.add(like.name, like.speed, like.cost, up=False)
        return place

    def shrink(self, place: int) -> None:
        """A replica with nothing inside is gone."""
        self.fleet.leave(place)
        self.replicas[place].up = False

    def busy_s(self, place: int) -> float:
        """How long a replica has computed up to now."""
        runner = self.replicas[place].runner
        return self._busy_s[place] + runner.busy_s - max(0.0, runner.free_at - self.clock.now())

    def arrival_of(self, call: int) -> float:
        return self._served[call].arrival_s

    def crashes_of(self, place: int, now: float) -> int:
        """How many of the starts of a replica that is added now fail."""
        return sum(one.crashes for one in self._failures if one.replica == place and one.at_s <= now)
