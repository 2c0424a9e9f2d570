"""Tuning by replay: a recent window of traffic is simulated with each value of an option, and the best one is kept.

HexGen-Text2SQL chooses its alpha so: a grid from 0 to 1, judged by the share of workflows within their deadline, and
again when the mix of steps has shifted. Any option of a plug-in can be tuned, and any number of a scenario.

What is replayed has ended, so its lengths are known; the traffic to come is not looked at.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from millstream.core import registry
from millstream.core.errors import BadRequest, ConfigError, UnknownName
from millstream.core.registry import Choice
from millstream.sim import report
from millstream.sim.metrics import percentile
from millstream.sim.scenario import Prepared, Scenario
from millstream.sim.simulate import Result
from millstream.sim.workload import Call

# Of a scenario, what holds plug-ins: the name in an option -> field.
_PLUGINS = {"router": "router", "prefix": "prefix", "policy": "policies", "meter": "meters"}
_NUMBERS = ("rate", "speed", "burstiness", "blocks", "step_tokens", "max_rows", "plans", "host_blocks", "max_tokens")


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one value. `p95_s` is of workflows, where there are any, else of requests; end to end."""

    value: Any
    attainment: float
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Tuned:
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The highest attainment; of equal ones the lowest p95, then the first."""
        return min(self.trials, key=lambda trial: (-trial.attainment, trial.p95_s))


def trial(value: Any, result: Result, slo: Mapping[str, float]) -> Trial:
    ends = sorted(row.seconds for row in report.workflows(result))
    if not ends:
        ends = sorted(report.timing_of(one).e2el_s or math.inf for one in result.served)
    whole = [seconds for seconds in ends if seconds < math.inf]
    p50, p95 = (percentile(whole, q) if len(whole) == len(ends) else math.inf for q in (50, 95))
    return Trial(value, report.attainment(result, slo), p50, p95)


def grid(
    run: Callable[[Any], Result],
    values: Iterable[Any],
    slo: Mapping[str, float],
    told: Callable[[], None] | None = None,
) -> Tuned:
    """Tries each of `values`. Raises BadRequest for none of them."""
    trials = []
    for value in values:
        trials.append(trial(value, run(value), slo))
        if told is not None:
            told()
    if not trials:
        raise BadRequest("tune", "no values", "one or more, with commas")
    return Tuned(tuple(trials))


def parse_option(given: str) -> tuple[str, list[Any]]:
    """ "router.alpha=0,0.5,1": an option and values, which are JSON or words. Raises ConfigError."""
    name, found, text = given.partition("=")
    values = [part.strip() for part in text.split(",")]
    if not found or not name.strip() or not all(values):
        raise ConfigError(f"{given!r} is no option with values, such as router.alpha=0,0.5,1")
    return name.strip(), [_value(part) for part in values]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_option(scenario: Scenario, option: str, value: Any) -> Scenario:
    """The scenario with one option changed.

    "router.alpha", "prefix.X", "policy.X" and "meter.X" are options of its plug-ins; of several policies or meters
    "policy.NAME.X" says which. A plain name ("step_tokens") is a number of the scenario. Raises ConfigError and
    UnknownName.
    """
    point, _, rest = option.partition(".")
    if not rest:
        if option not in _NUMBERS:
            raise UnknownName("option", option, [*_NUMBERS, *(f"{one}.OPTION" for one in _PLUGINS)])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{option}: got {value!r}, allowed is a number")
        kinds = {one.name: str(one.type) for one in fields(Scenario)}
        if "float" not in kinds[option] and not isinstance(value, int):
            raise ConfigError(f"{option}: got {value!r}, allowed is an integer")
        changes: dict[str, Any] = {option: value}
        return replace(scenario, **changes)
    if point not in _PLUGINS:
        raise UnknownName("option", option, [*_NUMBERS, *(f"{one}.OPTION" for one in _PLUGINS)])
    field = _PLUGINS[point]
    held = getattr(scenario, field)
    choices = (held,) if isinstance(held, Choice) else held
    name, _, last = rest.partition(".")
    if last:
        places = [place for place, choice in enumerate(choices) if choice.name == name]
        if not places:
            raise UnknownName(point, name, [choice.name for choice in choices])
        place, key = places[0], last
    elif len(choices) == 1:
        place, key = 0, rest
    else:
        named = ", ".join(f"{point}.{choice.name}.{rest}" for choice in choices) or "none, for there is no such plug-in"
        raise ConfigError(f"{option}: which of them? There are: {named}")
    changed = Choice(choices[place].name, {**choices[place].options, key: value})
    registry.options(point, changed)  # says what is wrong with it
    changes = {field: changed if isinstance(held, Choice) else (*choices[:place], changed, *choices[place + 1 :])}
    return replace(scenario, **changes)


def tune(
    scenario: Scenario,
    option: str,
    values: Sequence[Any],
    slo: Mapping[str, float],
    *,
    calls: list[Call] | None = None,
    told: Callable[[], None] | None = None,
) -> Tuned:
    """Replays `calls`, or all that the scenario sends, with each value. Raises what `with_option` and runs raise."""
    changed = {place: with_option(scenario, option, value) for place, value in enumerate(values)}

    def run(place: int) -> Result:
        prepared = Prepared(changed[place])
        return prepared.run(calls=calls if calls is None else list(calls))

    found = grid(run, changed, slo, told)
    return Tuned(tuple(replace(one, value=values[place]) for place, one in enumerate(found.trials)))


def recent(calls: Sequence[Call], until_s: float, seconds: float) -> list[Call]:
    """The workflows, sessions and single calls that began in the `seconds` before `until_s`, whole, from second 0."""
    first: dict[tuple[str, str], float] = {}
    for call in calls:
        if not call.after:
            key = (call.tenant, call.session or f"call {call.id}")
            first[key] = min(call.at_s, first.get(key, math.inf))
    begin = until_s - seconds
    kept = []
    for call in calls:
        at_s = first.get((call.tenant, call.session or f"call {call.id}"), math.inf)
        if begin <= at_s < until_s:
            kept.append(replace(call, at_s=max(0.0, call.at_s - begin)))
    return kept


def mix(stages: Iterable[str]) -> dict[str, float]:
    """The share of each step among calls."""
    counts = Counter(stages)
    total = sum(counts.values())
    return {stage: count / total for stage, count in counts.items()}


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Of two mixes, from 0 (equal) to 1 (nothing in common): the share of calls that would have to be other ones."""
    return sum(abs(one.get(stage, 0.0) - other.get(stage, 0.0)) for stage in {*one, *other}) / 2


class Retuner:
    """Tunes after the first `window` calls, and again each time that the mix of steps of the last `window` calls is
    further than `shift` from that of the calls it last tuned for.

    Two windows of one mix of k steps differ by about sqrt(k / (pi * window)) by chance alone: 0.1 for 7 steps and 200
    calls, so `shift` should be well above that. `find` is given the calls of the window and gives the new value.
    """

    def __init__(self, find: Callable[[list[Call]], Any], window: int = 200, shift: float = 0.2) -> None:
        if window < 1:
            raise BadRequest("window", window, "an integer from 1")
        if not 0 < shift <= 1:
            raise BadRequest("shift", shift, "a number above 0, up to 1")
        self.find, self.shift = find, shift
        self.value: Any = None
        self.times = 0
        self._last: deque[Call] = deque(maxlen=window)
        self._counts: Counter[str] = Counter()
        self._tuned_for: dict[str, float] | None = None

    def ended(self, call: Call) -> bool:
        """A call has ended. Gives whether there is a new value."""
        if len(self._last) == self._last.maxlen:
            self._counts[self._last[0].stage] -= 1
        self._last.append(call)
        self._counts[call.stage] += 1
        if len(self._last) < (self._last.maxlen or 0):
            return False
        now = {stage: count / len(self._last) for stage, count in self._counts.items() if count}
        if self._tuned_for is not None and distance(now, self._tuned_for) <= self.shift:
            return False
        self.value = self.find(list(self._last))
        self._tuned_for, self.times = now, self.times + 1
        return True


def lengths(calls: Iterable[Call]) -> dict[str, tuple[float, float]]:
    """Mean (prompt, output) tokens of each step, as the router `hexgen` takes them of a trace to train on."""
    sums: dict[str, list[float]] = {}
    for call in calls:
        own = sums.setdefault(call.stage, [0.0, 0.0, 0.0])
        own[0] += 1
        own[1] += call.num_prompt
        own[2] += call.num_output
    return {stage: (prompts / count, outputs / count) for stage, (count, prompts, outputs) in sums.items()}
