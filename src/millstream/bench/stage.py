"""One small model, live and simulated: what experiments on scheduling have in common.

The same calls are played to the production engine in real time and to the simulator, whose steps were calibrated on
this machine just before. How long an output is stands in the call and nowhere that a policy looks: live an observer
ends it there, as a stop token would, and requests ask for `most` tokens at most. Prompts are numbers that stand for
text: each becomes a token of the model, the same one each time, so that prompts share what the calls say they share.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from millstream.core.client import Chunk
from millstream.core.events import Event, Preempted, Stepped
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Slo, Tokens
from millstream.decode.protocol import Halt, Observer
from millstream.sched.profiles import Profile
from millstream.sched.protocol import Policy, StepCost
from millstream.sched.stack import PolicyStack
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Result, Served, Simulation
from millstream.sim.workload import Call, Releases


@dataclass(frozen=True, slots=True)
class Setting:
    """The deciding stack that is tried. `blocks` of KV cache (None: all there are), `seats` and `step_tokens` of steps.

    `extra` are meters beside those of the engine, asked after the token budget. `lengths` guesses how long outputs will
    be, live only.
    """

    policies: tuple[Choice, ...]
    seats: int = 256
    step_tokens: int | None = None
    blocks: int | None = None
    extra: tuple[Choice, ...] = ()
    last: Choice = Choice("kv-blocks")
    prefix: Choice = Choice("radix")
    preemption: str = "recompute"
    lengths: Choice | None = None

    def meters(self, step_tokens: int) -> tuple[Choice, ...]:
        budget = Choice("splitfuse", {"budget": self.step_tokens or step_tokens})
        return (budget, *self.extra, Choice("seats", {"max_rows": self.seats}), self.last)


@dataclass(slots=True)
class Played:
    """A live run: calls as their clients saw them, their tokens, seconds in all, and the sums of what steps took.

    `guess_s` is what guessing lengths took.
    """

    served: list[Served]
    tokens: dict[int, tuple[int, ...]]
    seconds: float
    steps: int
    planning_s: float
    preemptions: int
    policies: tuple[Policy, ...] = ()
    guess_s: float = 0.0

    def result(self) -> Result:
        """As the simulator's own, for what reads those."""
        return Result(self.served, [], self.seconds, self.steps, [], [])


class _EndAfter:
    """Ends an output after so many tokens."""

    def __init__(self, count: int) -> None:
        self.left = count

    def see(self, tokens: Sequence[int]) -> Halt | None:
        self.left -= len(tokens)
        return Halt(None) if self.left <= 0 else None


class Stage:
    """A model that is loaded, and what its steps take here."""

    def __init__(self, model: str = "smollm2-135m", weights: str = "blocks", bytes: str = "1GiB") -> None:
        """Raises what loading raises."""
        from millstream.config.schema import CacheConfig, EngineConfig, ModelConfig
        from millstream.engine.assemble import assemble

        self.base = EngineConfig(
            model=ModelConfig(weights=weights), cache=CacheConfig(bytes=bytes, host_bytes=bytes), seed=0
        )
        self.name = model
        self.model = assemble(model, self.base, tune=True)
        self.profile: Profile | None = None
        self.error = 0.0

    def calibrate(self, seed: int = 0, repeats: int = 3, thin: int = 1) -> Profile:
        """Measures steps anew, of `thin` compositions one; some 20 seconds for all."""
        from millstream.engine import calibrate

        compositions = calibrate.grid_of(self.model)[::thin]
        found = calibrate.calibrate(self.model, compositions, repeats, seed)
        self.error = found.errors[found.best]
        self.profile = calibrate.profile_of(self.model, found)
        return self.profile

    @property
    def step_tokens(self) -> int:
        from millstream.engine import calibrate

        return calibrate.sizes_of(self.model.resolved.meters)[0]

    def ids(self, call: Call) -> tuple[int, ...]:
        """A prompt in tokens of the model."""
        vocab = self.model.spec.vocab_size
        return tuple(((number * 2654435761) >> 11) % vocab for number in call.prompt)

    def live(
        self,
        calls: Sequence[Call],
        setting: Setting,
        most: int = 512,
        deadline_s: float = 120.0,
        cost: StepCost | None = None,
        policies: Sequence[Policy] | None = None,
        answers: Mapping[int, SamplingParams] | None = None,
    ) -> Played:
        """Plays the calls to an engine under `setting`, in this thread. Outputs may be `most` tokens for all they know.

        With `answers`, by the id of a call, prompts are tokens of the model as they stand and outputs end where the
        model ends them: how long the call says that they are is read by nobody. `cost` stands for what was calibrated,
        `policies` that are made already for those of the setting. Raises what the engine raises. A run that takes
        longer than `deadline_s` ends there; calls that did not end by then are aborted.
        """
        from millstream.engine.assemble import build_engine

        model, lengths = self.model, {call.id: call.num_output for call in calls}
        sched = replace(
            self.base.sched,
            policies=setting.policies,
            preemption=setting.preemption,
            meters=setting.meters(self.step_tokens),
            lengths=setting.lengths,
        )
        config = replace(self.base, sched=sched, cache=replace(self.base.cache, prefix=setting.prefix))
        blocks, host = model.resolved.blocks, model.resolved.host_blocks
        if setting.blocks is not None:
            blocks = dict.fromkeys(blocks, setting.blocks)
        if setting.preemption != "swap":
            host = dict.fromkeys(host, 0)
        resolved = replace(
            model.resolved, blocks=blocks, host_blocks=host, meters=setting.meters(self.step_tokens), config=config
        )

        def end_as_told(request: Request) -> list[Observer]:
            return [_EndAfter(lengths[request.id])]

        if cost is None and self.profile is not None:
            cost = self.profile.step_cost()
        params, ids, watch = answers, _as_is, _nobody
        if params is None:
            ids, watch = self.ids, end_as_told
            params = {
                call.id: SamplingParams(max_tokens=max(most, call.num_output + 1), temperature=0.0, ignore_eos=True)
                for call in calls
            }
        engine = build_engine(model.built.runner, model.spec, model.tokenizer, config, resolved, cost=cost, watch=watch)
        if policies is not None:
            engine.scheduler.policy = PolicyStack(policies)
        return _Player(engine, calls, ids, params, deadline_s).run()

    def simulate(
        self,
        calls: Sequence[Call],
        setting: Setting,
        *,
        replicas: int = 1,
        router: Any = None,
        most: int = 512,
        oracle: bool | Mapping[int, int] = False,
        profile: Profile | None = None,
    ) -> Result:
        """The same calls in virtual time, over engines of the calibrated profile or another one."""
        profile = profile or self.profile
        assert profile is not None, "calibrate first"
        profile = profile.sized(setting.blocks, setting.step_tokens, setting.seats)
        meters = setting.meters(profile.step_tokens)
        engine = EngineSetting(setting.policies, meters, setting.prefix, setting.preemption, host_blocks=profile.blocks)
        kinds = [(f"engine {place}", profile) for place in range(replicas)]
        return Simulation(calls, kinds, engine, router, max_tokens=most, oracle=oracle).run()


def _as_is(call: Call) -> tuple[int, ...]:
    return call.prompt


def _nobody(request: Request) -> list[Observer]:
    return []


class _Player:
    def __init__(
        self,
        engine: Any,
        calls: Sequence[Call],
        ids: Callable[[Call], tuple[int, ...]],
        answers: Mapping[int, SamplingParams],
        deadline_s: float,
    ) -> None:
        self.engine, self.calls, self.ids, self.answers, self.deadline_s = engine, calls, ids, answers, deadline_s
        self.served: dict[int, Served] = {}
        self.tokens: dict[int, list[int]] = {}
        self.releases = Releases(calls)
        self.due: list[tuple[float, int, Call]] = []
        self.serials = itertools.count()
        self.steps = self.preemptions = 0
        self.planning_s = 0.0
        # Prompts are made ahead: it is no part of what is measured.
        self.prompts: Mapping[int, tuple[int, ...]] = {call.id: ids(call) for call in calls}
        for call in self.releases.first:
            self._at(call.at_s, call)

    def _at(self, when: float, call: Call) -> None:
        heapq.heappush(self.due, (when, next(self.serials), call))

    def now(self) -> float:
        return float(self.engine.clock.now() - self.start)

    def run(self) -> Played:
        engine = self.engine
        engine.listeners.append(self._hear)
        self.start = engine.clock.now()
        while self.due or engine.busy:
            now = self.now()
            if now > self.deadline_s:
                for number in list(self.served):
                    engine.abort(number)
                break
            while self.due and self.due[0][0] <= now:
                self._submit(heapq.heappop(self.due)[2], now)
            if engine.busy:
                engine.step()
            elif self.due:
                time.sleep(max(0.0, min(0.01, self.due[0][0] - self.now())))
        seconds = self.now()
        served = [self.served[call.id] for call in self.calls if call.id in self.served]
        tokens = {number: tuple(found) for number, found in self.tokens.items()}
        policies = engine.scheduler.policy.policies
        return Played(served, tokens, seconds, self.steps, self.planning_s, self.preemptions, policies, engine.guess_s)

    def _submit(self, call: Call, now: float) -> None:
        self.served[call.id] = Served(call, now)
        self.tokens[call.id] = []
        request = Request(
            call.id,
            (Tokens(self.prompts[call.id]),),
            self.answers[call.id],
            tenant=call.tenant,
            program=call.program,
            slo=call.slo or Slo(),
            priority=call.priority,
            hints=call.hints,
        )
        self.engine.submit(request, self._sink)

    def _sink(self, chunk: Chunk) -> None:
        served, now = self.served[chunk.request_id], self.now()
        self.tokens[chunk.request_id] += chunk.tokens
        served.times_s += [now] * len(chunk.tokens)
        if chunk.usage is not None:
            served.cached = max(served.cached, chunk.usage.cached_tokens)
        if chunk.finish is None:
            return
        served.ended_s, served.finish, served.error = now, chunk.finish.value, chunk.error or ""
        for follower in self.releases.ended(chunk.request_id):
            self._at(now + follower.think_s, follower)

    def _hear(self, event: Event) -> None:
        if type(event) is Stepped:
            self.steps += 1
            self.planning_s += event.planning_s
        elif type(event) is Preempted:
            self.preemptions += 1
            if (served := self.served.get(event.seq.request_id)) is not None:
                served.preemptions += 1
