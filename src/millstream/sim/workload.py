"""What is sent to a simulated cluster: calls with their times, lengths and shared prefixes, and sessions of calls.

A trace gives calls; arrivals, lengths, tenants and rates are then changed apart from each other. The prompt of a call
is made of numbers that stand for text: two calls share a prefix exactly as far as the trace says that they do.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from millstream.core.errors import BadRequest
from millstream.core.request import Hints, Program, Slo
from millstream.sim import traces
from millstream.sim.arrivals import Bursts, Diurnal, RateCurve, arrival_times
from millstream.sim.traces import BLOCK_TOKENS, Row

# Calls of one stage of one workflow (candidates, evaluations, repairs) ask about the same question and schema: they
# begin alike for this share of each, which is our assumption. Those of different stages have other instructions first.
ALIKE = 0.9
# Texts of their own begin so far apart.
TEXT = 1 << 20
# Where texts of blocks that traces name begin, and behind them those of sessions and of single calls.
_BLOCKS, _SESSIONS, _CALLS = 0, 1 << 37, 1 << 38


@dataclass(frozen=True, slots=True)
class Call:
    """One request to be. `prompt` are its tokens, `num_output` how long its output will really be.

    A call with `after` begins `think_s` seconds after all those calls of the same session have ended, else at `at_s`.
    `slo` are wishes of its own. `hints` are what somebody guesses of it.
    """

    id: int
    at_s: float
    prompt: tuple[int, ...]
    num_output: int
    tenant: str = ""
    session: str = ""
    after: tuple[int, ...] = ()
    think_s: float = 0.0
    thread: int = 0
    stage: str = ""
    slo: Slo | None = None
    priority: int = 0
    hints: Hints = Hints()

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def program(self) -> Program | None:
        """Its place among the calls of its session, as a request has it."""
        return Program(self.session, self.id, self.thread, self.stage, self.after) if self.session else None


class Releases:
    """Which calls may begin: `first` those that wait for none, the others when the last that they wait for has ended.

    True while any call waits.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self.first: list[Call] = []
        self._followers: dict[int, list[Call]] = {}
        self._awaited: dict[int, set[int]] = {}
        for call in calls:
            if not call.after:
                self.first.append(call)
                continue
            self._awaited[call.id] = set(call.after)
            for before in self._awaited[call.id]:
                self._followers.setdefault(before, []).append(call)

    def __bool__(self) -> bool:
        return bool(self._awaited)

    def ended(self, call: int) -> list[Call]:
        """A call has ended: those that may begin now, each when it has thought for its `think_s`."""
        free = []
        for follower in self._followers.pop(call, ()):
            awaited = self._awaited[follower.id]
            awaited.discard(call)
            if not awaited:
                del self._awaited[follower.id]
                free.append(follower)
        return free


@dataclass(frozen=True, slots=True)
class Source:
    """What one tenant sends: rows of a trace, and what of them is changed.

    `rate` is requests a second (None: as recorded): recorded gaps are stretched, or with `burstiness` replaced by
    random ones (1: Poisson). With a `diurnal` or `bursts` it is a mean, and requests come at random by how it changes.
    `speed` replays faster. `count` and `seconds` cut it. `slo` and `priority` are those of its requests.

    Calls of a workflow come as one: of such rows `rate` is workflows a second (always with random gaps), and `count`
    takes workflows until they have so many calls.
    """

    rows: Sequence[Row]
    tenant: str = ""
    rate: float | None = None
    speed: float = 1.0
    burstiness: float | None = None
    count: int | None = None
    seconds: float | None = None
    slo: Slo | None = None
    priority: int = 0
    diurnal: Diurnal | None = None
    bursts: Bursts | None = None


def calls(sources: Iterable[Source], max_context: int, seed: int = 0) -> list[Call]:
    """All calls of all tenants in order of time, those of sessions behind each other; none is longer than the context.

    Raises BadRequest.
    """
    found: list[tuple[float, int, Row, str]] = []
    sources = list(sources)
    for place, source in enumerate(sources):
        rows = _timed(source, seed + place)
        found += [(row.at_s, place, row, source.tenant or row.tenant) for row in rows]
    if not found:
        raise BadRequest("trace", "no requests", "at least one")
    found.sort(key=lambda one: (one[0], one[1]))
    ids = itertools.count(1)
    sessions: dict[tuple[int, str], tuple[int, int]] = {}  # -> its text, its last call
    bases: dict[tuple[int, str], int] = {}
    waves: dict[tuple[int, str], _Waves] = {}
    out: list[Call] = []
    for at_s, place, row, tenant in found:
        number = next(ids)
        num_output = max(1, min(row.num_output, max_context - 1))
        length = max(1, min(row.num_prompt, max_context - num_output))
        after: tuple[int, ...] = ()
        thread = 0
        if row.wave is not None:
            key = (place, row.session)
            own = waves.setdefault(key, _Waves())
            after, thread = own.join(row.wave, number)
            base = bases.setdefault((place, f"{row.session} {row.stage}"), _SESSIONS + len(bases) * TEXT)
            alike = int(ALIKE * length)
            start = _CALLS + number * TEXT
            prompt = (*range(base, base + alike), *range(start, start + length - alike))
        elif row.session:
            key = (place, row.session)
            base = bases.setdefault(key, _SESSIONS + len(bases) * TEXT)
            prompt = tuple(range(base, base + length))
            if key in sessions:
                after = (sessions[key][1],)
            sessions[key] = (base, number)
        else:
            prompt = _prompt(row, length, place, number)
        source = sources[place]
        out.append(
            Call(
                number,
                at_s,
                prompt,
                num_output,
                tenant,
                row.session,
                after,
                row.think_s,
                thread,
                row.stage,
                slo=source.slo,
                priority=source.priority,
            )
        )
    return out


class _Waves:
    """The calls of one workflow so far: those of its last wave, and of the one before."""

    def __init__(self) -> None:
        self.wave = -1
        self.now: list[int] = []
        self.before: tuple[int, ...] = ()

    def join(self, wave: int, number: int) -> tuple[tuple[int, ...], int]:
        """The calls that this one waits for, and which of its wave it is."""
        if wave != self.wave:
            self.wave, self.before, self.now = wave, tuple(self.now), []
        self.now.append(number)
        return self.before, len(self.now) - 1


def _timed(source: Source, seed: int) -> list[Row]:
    if any(row.wave is not None for row in source.rows):
        return _timed_workflows(source, seed)
    rows = list(source.rows)
    if source.speed <= 0:
        raise BadRequest("speed", source.speed, "a number above 0")
    if source.speed != 1:
        rows = [replace(row, at_s=row.at_s / source.speed, think_s=row.think_s / source.speed) for row in rows]
    if source.count is not None:
        if source.count < 1:
            raise BadRequest("requests", source.count, "an integer from 1")
        # A trace that is shorter begins anew.
        rows = list(itertools.islice(_again(rows), source.count))
    if source.diurnal is not None or source.bursts is not None:
        rate = source.rate or len(rows) / max(rows[-1].at_s, 1e-9)
        curve = RateCurve(rate, source.diurnal, source.bursts, seed)
        rows = [replace(row, at_s=at) for row, at in zip(rows, curve.arrivals(), strict=False)]
    elif source.burstiness is not None or (source.rate is not None and _untimed(rows)):
        rate = source.rate or len(rows) / max(rows[-1].at_s, 1e-9)
        times = arrival_times(len(rows), rate, source.burstiness or 1.0, seed=seed)
        rows = [replace(row, at_s=at) for row, at in zip(rows, times, strict=True)]
    elif source.rate is not None:
        if not source.rate > 0:
            raise BadRequest("rate", source.rate, "a number above 0")
        stretch = len(rows) / source.rate / rows[-1].at_s
        rows = [replace(row, at_s=row.at_s * stretch) for row in rows]
    if source.seconds is not None:
        rows = [row for row in rows if row.at_s <= source.seconds]
    return rows


def _timed_workflows(source: Source, seed: int) -> list[Row]:
    """As `_timed` has it for rows, for workflows as wholes: the first row of each stands for it."""
    groups: dict[str, list[Row]] = {}
    for row in source.rows:
        groups.setdefault(row.session, []).append(row)
    count = None if source.count is None else _whole(list(groups.values()), source.count)
    first = [replace(group[0], wave=None) for group in groups.values()]
    burstiness = source.burstiness if source.rate is None else source.burstiness or 1.0
    heads = _timed(replace(source, rows=first, count=count, burstiness=burstiness), seed)
    # One that came again has a session of its own; its calls are those of the first.
    return [
        replace(row, at_s=head.at_s, think_s=row.think_s / source.speed, session=head.session)
        for head in heads
        for row in groups[head.session if head.session in groups else head.session.rpartition("/")[0]]
    ]


def _whole(groups: Sequence[Sequence[Row]], count: int) -> int:
    """How many workflows, taken in turn, have `count` calls between them. Raises BadRequest."""
    if count < 1:
        raise BadRequest("requests", count, "an integer from 1")
    calls = taken = 0
    while calls < count:
        calls += len(groups[taken % len(groups)])
        taken += 1
    return taken


def _untimed(rows: Sequence[Row]) -> bool:
    """Whether the rows tell no times."""
    return not rows or rows[-1].at_s <= 0


def _again(rows: Sequence[Row]) -> Iterator[Row]:
    if not rows:
        return
    length = rows[-1].at_s + rows[-1].at_s / max(1, len(rows) - 1)
    for turn in itertools.count():
        for row in rows:
            blocks = tuple(block + turn * TEXT for block in row.blocks)
            session = f"{row.session}/{turn}" if row.session else ""
            yield replace(row, at_s=row.at_s + turn * length, blocks=blocks, session=session)


def _prompt(row: Row, length: int, place: int, number: int) -> tuple[int, ...]:
    own = _CALLS + number * TEXT
    if not row.blocks:
        return tuple(range(own, own + length))
    # Tenants share no text: their blocks lie in places of their own.
    ids: list[int] = []
    for block in row.blocks:
        start = _BLOCKS + (place * (1 << 26) + block % (1 << 26)) * BLOCK_TOKENS
        ids += range(start, start + min(BLOCK_TOKENS, length - len(ids)))
        if len(ids) >= length:
            break
    ids += range(own, own + length - len(ids))
    return tuple(ids)


def hinted(found: Sequence[Call], error: float, seed: int) -> list[Call]:
    """The same calls with guesses of their outputs, off by a factor whose logarithm has the deviation `error`."""
    draw = random.Random(f"hints {seed}")
    out = []
    for call in found:
        guess = call.num_output * draw.lognormvariate(0.0, error) if error else float(call.num_output)
        hints = Hints(max(1, round(guess)), score=-math.log(max(1.0, guess)))
        out.append(replace(call, hints=hints))
    return out


def load(name: str) -> list[Row]:
    """The rows of a trace, by its name or the path of a file. Raises UnknownName, BadFile and DownloadError."""
    path = Path(name)
    if name not in {**traces.TRACES, **traces.UNTIMED} and (
        path.suffix in (".csv", ".jsonl", ".gz", ".json") or path.is_file()
    ):
        return traces.load_file(path)
    return traces.load(name)


def mixed(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same lengths in another order, with the times where they were: arrivals and lengths apart.

    Of workflows, which come as one, the workflows are in another order.
    """
    if any(row.wave is not None for row in rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.session, []).append(row)
        times = [group[0].at_s for group in groups.values()]
        shuffled = list(groups.values())
        random.Random(seed).shuffle(shuffled)
        return [replace(row, at_s=at) for at, group in zip(times, shuffled, strict=True) for row in group]
    order = list(rows)
    random.Random(seed).shuffle(order)
    return [replace(other, at_s=row.at_s) for row, other in zip(rows, order, strict=True)]
