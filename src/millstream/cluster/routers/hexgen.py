"""Workflows with a deadline on engines of unlike speed: a budget for each call, and an engine that fits and is free.

HexGen-Text2SQL: Optimizing LLM Inference Request Scheduling for Agentic Text-to-SQL Workflow. Three things it keeps:

The table t(step, e): how long a step is expected to take on an engine. Mean lengths of a step's calls, priced by what
steps cost there (`Member.cost`) in the company of `rows` others; where that is not known, what the step's calls took
there. Means are those of calls that have ended, unless `lengths` gives them (`sim/tune.py` makes them of a trace).
Before the first of a step has ended, a call is taken to be as long as its prompt is, and its output as it is hinted, or
`start_output` tokens.

The budget of a call when it is made: (deadline - elapsed) * t(step) / (t(step) + t of the steps to come), t averaged
over the engines. The deadline is `slo.e2e_s` of the workflow's first call, else `slo_s`. Steps to come are those behind
it in the template `steps`; a step that is passed takes unused ones of before it away, such as repairs. Without a
template, they are what has followed such a step on the average. The budget is the call's `slo.e2e_s`, and t on the
chosen engine its `hints.expected_s`: the policy `urgency` reads both.

The engine, chosen once, is the one with the highest

    alpha * t(step, base) / t(step, e)  -  (1 - alpha) * W[e] / W[base]

where W is the work that is there and has not ended, by the same table, and base the first engine. An idle base counts
as if it had this one call, so that the ratio is always a number. `work="cumulative"` counts all that was ever sent, as
the paper's code does. For one class of engine and one of calls this is the engine with the fewest calls, the first of
several.

Two things that the paper does not do. `table="call"`: a call's own prompt, whose length is known, stands for the mean
of its step. `work="occupied"`: calls decode side by side, so what one takes of an engine's time is its prompt and a
share of its decoding, `rows` others having theirs; t counts a long output as if it held the engine alone.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from millstream.cluster.protocol import Done, Member, Router
from millstream.core.registry import Card
from millstream.core.request import Request
from millstream.core.shape import StepShape

WORK = ("outstanding", "occupied", "cumulative")
DISPATCH = ("fit", "turns")
TABLE = ("step", "call")
# What is left of a deadline that has passed: budgets are above 0.
LATE_S = 1e-6
# Steps of one workflow that are learned from; a session may have thousands of calls.
MOST_WAVES = 256
# Names of steps are the clients' to choose.
MOST_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Config:
    """`alpha`: 1 looks at nothing but how fast a step is on an engine, 0 at nothing but what waits there.

    `slo_s`: the deadline of workflows that name none (None: none, and no budgets). `work`: outstanding, occupied or
    cumulative. `table`: of steps, or of calls. `dispatch`: fit, or turns (engines in turn, with budgets all the same,
    for comparison). `steps`: the template. `lengths`: step -> (prompt, output) tokens. `rows`: how many are taken to
    decode beside a call. `start_output`: tokens of outputs of which nothing is known. `quiet_s`: a workflow has ended
    when it has had nothing inside for so long. `remember`: workflows that are kept, the oldest forgotten first.
    """

    alpha: float = 0.5
    slo_s: float | None = None
    work: str = "outstanding"
    dispatch: str = "fit"
    table: str = "step"
    steps: Sequence[str] = ()
    lengths: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rows: int = 8
    start_output: int = 64
    quiet_s: float = 1.0
    remember: int = 65_536

    def __post_init__(self) -> None:
        if not _number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a number from 0 to 1, got {self.alpha!r}")
        if self.slo_s is not None and not (_number(self.slo_s) and self.slo_s > 0):
            raise ValueError(f"slo_s is a number above 0, got {self.slo_s!r}")
        for name, allowed in (("work", WORK), ("dispatch", DISPATCH), ("table", TABLE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.steps, str) or not all(isinstance(step, str) for step in self.steps):
            raise ValueError(f"steps are a list of names, got {self.steps!r}")
        if not isinstance(self.lengths, Mapping):
            raise ValueError(f"lengths is a mapping from steps to (prompt, output) tokens, got {self.lengths!r}")
        for step, pair in self.lengths.items():
            if len(pair) != 2 or not all(_number(tokens) and tokens >= 0 for tokens in pair):
                raise ValueError(f"lengths of {step!r} are two numbers, prompt and output tokens, got {pair!r}")
        for name in ("rows", "start_output", "remember"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is an integer from 1, got {getattr(self, name)!r}")
        if not _number(self.quiet_s) or self.quiet_s < 0:
            raise ValueError(f"quiet_s is a number from 0, got {self.quiet_s!r}")


class _Mean:
    __slots__ = ("count", "values")

    def __init__(self, width: int) -> None:
        self.count = 0
        self.values = [0.0] * width

    def add(self, *values: float) -> None:
        self.count += 1
        for place, value in enumerate(values):
            self.values[place] += (value - self.values[place]) / self.count


@dataclass(slots=True)
class _Workflow:
    """`waves`: steps so far, one for all calls that ran side by side; `parents` of the calls of the last one. `place`:
    how far it has come in the template. `last`: requests of the last wave. `inside`: calls that have not ended; `since`
    when there were none left."""

    began: float
    deadline_s: float | None
    waves: list[str] = field(default_factory=list)
    parents: tuple[int, ...] | None = None
    place: int = -1
    last: set[int] = field(default_factory=set)
    inside: int = 0
    since: float = 0.0


class Hexgen(Router):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps = {"", *config.steps, *config.lengths}
        self._seen: dict[str, _Mean] = {}  # step -> prompt and output tokens of calls that ended
        self._took: dict[tuple[str, int], _Mean] = {}  # step, place -> seconds of service
        # step -> place, prompt -> t and the time of the engine that it takes, until something of the step ends
        self._priced: dict[str, dict[tuple[int, int], tuple[float, float]]] = {}
        self._workflows: OrderedDict[tuple[str, str], _Workflow] = OrderedDict()
        self._quiet: OrderedDict[tuple[str, str], None] = OrderedDict()
        # By step, and how often it had been there before: workflows that had it, and all steps that followed it.
        self._followed: dict[tuple[str, int], tuple[int, Counter[str]]] = {}
        self._outstanding: dict[int, Counter[tuple[str, int]]] = {}  # place -> calls of each step and prompt
        self._sent_s: dict[int, float] = {}  # place -> seconds of work that were ever sent
        self._next = 0
        self._chosen: tuple[int, int] | None = None  # request, place

    # -- the table

    def lengths(self, step: str, request: Request | None = None) -> tuple[float, float]:
        """Prompt and output tokens of a step's calls; of `request` where nothing is known of the step."""
        given = self.config.lengths.get(step)
        if given is not None:
            return float(given[0]), float(given[1])
        seen = self._seen.get(step)
        if seen is not None:
            return seen.values[0], seen.values[1]
        if request is None:
            return 1.0, float(self.config.start_output)
        return float(request.num_prompt), float(request.hints.expected_output_len or self.config.start_output)

    def seconds(self, step: str, member: Member, request: Request | None = None) -> float:
        """t(step, engine), above 0; of a call of its own where the table is one of calls."""
        return self._times(step, self._prompt(request), member, request)[0]

    def _step(self, request: Request) -> str:
        """The name of its step; of names that come when there are MOST_STEPS already nothing is learned apart."""
        name = "" if request.program is None else request.program.stage
        if name not in self._steps:
            if len(self._steps) >= MOST_STEPS:
                return ""
            self._steps.add(name)
        return name

    def _prompt(self, request: Request | None) -> int:
        """What of a prompt the table goes by: its length, or 0 where a step stands for all its calls."""
        return request.num_prompt if request is not None and self.config.table == "call" else 0

    def _times(self, step: str, prompt: int, member: Member, request: Request | None = None) -> tuple[float, float]:
        """How long such a call takes on an engine, and how much of the engine's time, which others share."""
        known = self._priced.setdefault(step, {})
        times = known.get((member.place, prompt))
        if times is None:
            rows, (mean, output) = self.config.rows, self.lengths(step, request)
            alone = priced(member, prompt or mean, output, rows)
            first = min(1.0, priced(member, prompt or mean, 1, rows) / alone) if alone > 0 else 1.0
            took = self._took.get((step, member.place))
            seconds = max(LATE_S, took.values[0] if member.cost is None and took is not None else alone)
            times = seconds, seconds * (first + (1 - first) / rows)
            if step in self._seen or step in self.config.lengths:
                known[member.place, prompt] = times
        return times

    def _mean_seconds(self, step: str, members: Sequence[Member], request: Request | None = None) -> float:
        return sum(self.seconds(step, one, request) for one in members) / len(members)

    # -- budgets

    def prepare(self, request: Request, members: Sequence[Member], now: float) -> Request:
        self._settle(now)
        step = self._step(request)
        place = self._choose(request, members)
        self._chosen = (request.id, place)
        member = next(one for one in members if one.place == place)
        hints = replace(request.hints, expected_s=self.seconds(step, member, request))
        workflow = self._enter(request, now)
        slo = request.slo
        if workflow.deadline_s is not None:
            own = self._mean_seconds(step, members, request)
            later = self._later_s(workflow, members)
            left = workflow.deadline_s - (now - workflow.began)
            # Of a call that is sent again the engine counts from its first arrival.
            slo = replace(slo, e2e_s=max(LATE_S, left * own / (own + later) + (now - request.arrival)))
        return replace(request, hints=hints, slo=slo)

    def _enter(self, request: Request, now: float) -> _Workflow:
        """The workflow of a call, with the call in it."""
        key = _key(request)
        workflow = self._workflows.get(key)
        deadline_s = request.slo.e2e_s or self.config.slo_s
        if workflow is None:
            workflow = _Workflow(min(now, request.arrival), deadline_s)
            self._workflows[key] = workflow
            if len(self._workflows) > self.config.remember:
                forgotten, _ = self._workflows.popitem(last=False)
                self._quiet.pop(forgotten, None)
        self._quiet.pop(key, None)
        if request.id in workflow.last:
            return workflow  # it is sent again
        parents = None if request.program is None else request.program.parents
        if not workflow.waves or parents is None or parents != workflow.parents:
            step = self._step(request)
            workflow.parents, workflow.last = parents, set()
            if len(workflow.waves) < MOST_WAVES:
                workflow.waves.append(step)
            ahead = [place for place, one in enumerate(self.config.steps) if one == step and place > workflow.place]
            # A step that is not ahead, such as one repair more, leaves it where it is.
            workflow.place = ahead[0] if ahead else workflow.place
        workflow.last.add(request.id)
        return workflow

    def _later_s(self, workflow: _Workflow, members: Sequence[Member]) -> float:
        """Seconds that the steps behind the one that a workflow is at are expected to take."""
        if self.config.steps:
            later = Counter(self.config.steps[workflow.place + 1 :])
            return sum(count * self._mean_seconds(step, members) for step, count in later.items())
        found = self._followed.get(_position(workflow.waves, len(workflow.waves) - 1))
        if found is None:
            return 0.0
        times, counts = found
        return sum(count / times * self._mean_seconds(step, members) for step, count in counts.items())

    def _settle(self, now: float) -> None:
        """Learns from workflows that have ended what comes after each of their steps."""
        while self._quiet:
            key = next(iter(self._quiet))
            if now - self._workflows[key].since <= self.config.quiet_s:
                return
            del self._quiet[key]
            waves, later = self._workflows.pop(key).waves, Counter[str]()
            for place in range(len(waves) - 1, -1, -1):
                times, counts = self._followed.get(_position(waves, place), (0, Counter[str]()))
                self._followed[_position(waves, place)] = (times + 1, counts + later)
                later[waves[place]] += 1

    # -- dispatch

    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        chosen, self._chosen = self._chosen, None
        if chosen is not None and chosen[0] == request.id and any(one.place == chosen[1] for one in members):
            return chosen[1]
        return self._choose(request, members)

    def _choose(self, request: Request, members: Sequence[Member]) -> int:
        if self.config.dispatch == "turns":
            later = [one.place for one in members if one.place >= self._next]
            place = later[0] if later else members[0].place
            self._next = place + 1
            return place
        step, alpha, base = self._step(request), self.config.alpha, members[0]
        base_s = self.seconds(step, base, request)
        base_work = self.work_s(base) or base_s
        best, score = base, -math.inf
        for one in members:
            fits, works = base_s / self.seconds(step, one, request), self.work_s(one) / base_work
            if (value := alpha * fits - (1 - alpha) * works) > score:
                best, score = one, value
        return best.place

    def work_s(self, member: Member) -> float:
        """W: seconds of work there, by the table as it is now; ever sent, by the tables of then."""
        if self.config.work == "cumulative":
            return self._sent_s.get(member.place, 0.0)
        calls = self._outstanding.get(member.place, Counter())
        which = 1 if self.config.work == "occupied" else 0
        return sum(count * self._times(step, prompt, member)[which] for (step, prompt), count in calls.items())

    def sent(self, request: Request, place: int, now: float) -> None:
        self._outstanding.setdefault(place, Counter())[self._step(request), self._prompt(request)] += 1
        self._sent_s[place] = self._sent_s.get(place, 0.0) + (request.hints.expected_s or 0.0)
        if (workflow := self._workflows.get(_key(request))) is not None:
            workflow.inside += 1

    def ended(self, request: Request, place: int, done: Done, now: float) -> None:
        step, key = self._step(request), _key(request)
        calls = self._outstanding.get(place, Counter())
        kind = (step, self._prompt(request))
        calls[kind] -= 1
        if calls[kind] <= 0:
            del calls[kind]
        if done.whole:
            self._priced.pop(step, None)
            self._seen.setdefault(step, _Mean(2)).add(request.num_prompt, done.num_output)
            if done.service_s > 0:
                self._took.setdefault((step, place), _Mean(1)).add(done.service_s)
        workflow = self._workflows.get(key)
        if workflow is not None:
            workflow.inside -= 1
            if workflow.inside <= 0:
                workflow.since = now
                self._quiet[key] = None
                self._quiet.move_to_end(key)

    def lost(self, place: int) -> None:
        # Who is there next may be another machine.
        self._priced.clear()
        for key in [key for key in self._took if key[1] == place]:
            del self._took[key]


def priced(member: Member, prompt: float, output: float, rows: int = 1) -> float:
    """Seconds that a call of so many tokens takes on an engine, `rows` others decoding with it.

    The prompt is a step of its own, each further token a row of a step. Where the cost of steps is not known, a token
    of an output counts as OUTPUT_TOKENS of a prompt.
    """
    if member.cost is None:
        return (prompt + OUTPUT_TOKENS * output) / member.speed
    tokens = max(1, round(prompt))
    first = StepShape(1, tokens, tokens * (tokens + 1) // 2, sampled=1)
    middle = round(prompt + output / 2)
    later = StepShape(decode_rows=rows, decode_keys=rows * middle, sampled=rows)
    return member.cost.seconds(first) + max(0.0, output - 1) * member.cost.seconds(later)


OUTPUT_TOKENS = 16.0


def _position(waves: Sequence[str], place: int) -> tuple[str, int]:
    """A step and how often it has been there before: the same step comes again at other places of a workflow."""
    return waves[place], list(waves[:place]).count(waves[place])


def _key(request: Request) -> tuple[str, str]:
    # What is no part of a program is one of a single call.
    return (request.tenant, f"call {request.id}" if request.program is None else f"program {request.program.id}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


CARD = Card("hexgen", "budgets within a workflow's deadline, and the engine that fits and has least to do", paper=1)
PLUGIN = Hexgen
