"""What the cluster room promises: several engines behind one, and who gets which request.

A router prefers; the fleet (`fleet.py`) keeps count of what is where. Live and simulated clusters run the same objects:
time comes as an argument, and nothing here does I/O.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from millstream.core.client import EngineClient
from millstream.core.request import Request
from millstream.sched.protocol import StepCost


@dataclass(slots=True)
class Member:
    """One engine as a router sees it. Read-only for routers.

    `requests` were sent there and have not ended; `prompt_tokens` and `output_tokens` are what these ask for, outputs
    as far as somebody guesses them. `speed` is prompt tokens a second, of whatever unit all members share. `cost` tells
    how long its steps take, where that is known.
    """

    place: int
    name: str
    speed: float = 1.0
    cost: StepCost | None = None
    up: bool = True
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def work_s(self) -> float:
        """What it has to do yet for prompts, in seconds of its own speed."""
        return self.prompt_tokens / self.speed


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a request at one engine.

    `service_s` is how long it was worked on there, `cached` how much of its prompt was held already. `whole` is false
    where it did not end by itself (the engine was lost, the client left).
    """

    num_output: int
    cached: int = 0
    service_s: float = 0.0
    whole: bool = True


class Router(Protocol):
    """Picks an engine for each request. Routers derive from this; what they have no opinion on does nothing.

    A request that is sent again (its engine was lost) comes through all of it again, its `prior` in it.
    """

    def prepare(self, request: Request, members: Sequence[Member], now: float) -> Request:
        """The request as engines shall see it: with the hints and wishes that its place in a program gives it."""
        return request

    @abstractmethod
    def pick(self, request: Request, members: Sequence[Member], now: float) -> int:
        """The place of one of the `members`, which are those that are up: one at least, in order of place."""
        ...

    def sent(self, request: Request, place: int, now: float) -> None:
        return

    def ended(self, request: Request, place: int, done: Done, now: float) -> None:
        return

    def lost(self, place: int) -> None:
        """The engine there is gone, with all that it held."""
        return


@dataclass(frozen=True, slots=True)
class FleetView:
    """A cluster as an autoscaler sees it at `now` (seconds of the caller's clock).

    `members` are those that take requests now, `starting` are on their way and will. `waiting` requests have had no
    place in a step yet, for `oldest_wait_s` at most; `running` ones have. `busy` is the share of the members' time in
    which they had work since the last view, 0 to 1. `attainment` is the share of the requests that ended in the last
    window and met what they were promised; None where none of them was promised anything.

    Since the last view, `interval_s` ago, `arrived` requests came and `ended` ones ended. `kv` is the share of KV
    blocks that is taken, over the members. Who does not count these leaves them at 0.
    """

    now: float
    members: Sequence[Member]
    waiting: int
    running: int
    oldest_wait_s: float
    busy: float
    attainment: float | None
    starting: int = 0
    arrived: int = 0
    ended: int = 0
    interval_s: float = 0.0
    kv: float = 0.0

    @property
    def size(self) -> int:
        """How many there are and will be."""
        return len(self.members) + self.starting


class Autoscaler(Protocol):
    """Says how many members a cluster should have. It is asked every `interval_s`, live and simulated alike.

    Who asks keeps the number within its own bounds, starts what lacks, and drains before it removes. A rule is a
    function of the views it was shown, in order: no clock of its own, no I/O.
    """

    interval_s: float = 15.0

    @abstractmethod
    def target(self, fleet: FleetView, now: float) -> int:
        """How many members there should be, those included that are starting."""
        ...


class Backend(Protocol):
    """Makes engines, and ends them whatever state they are in. All is called from one event loop."""

    async def start(self, name: str) -> EngineClient:
        """A new engine, that loads its model yet: its `facts` wait for that, and raise where there will be none."""
        ...

    def alive(self, client: EngineClient) -> bool:
        """False where it is known that the engine is gone; True says nothing."""
        ...

    async def kill(self, client: EngineClient) -> None:
        """Ends an engine at once, and gives back what it had taken. One that is gone is no error."""
        ...

    async def close(self) -> None:
        """Ends all of them."""
        ...


def least_used(members: Sequence[Member]) -> int:
    """The place of the member with the least work before it, then the fewest requests."""
    return min(members, key=lambda one: (one.work_s, one.requests, one.place)).place
