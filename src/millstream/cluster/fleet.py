"""Which request is at which engine: the books of a cluster, the same for live and simulated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millstream.cluster.protocol import Done, Member, Router
from millstream.core.errors import MillstreamError
from millstream.core.request import Request
from millstream.sched.protocol import StepCost


class NoEngine(MillstreamError):
    """No engine of the cluster is up."""


@dataclass(slots=True)
class _Sent:
    request: Request
    place: int
    output_tokens: int


class Fleet:
    """The members of a cluster and what each has inside. Places are never used again for another engine."""

    def __init__(self, router: Router, members: Sequence[Member] = ()) -> None:
        self.router = router
        self.members = list(members)
        self._sent: dict[int, _Sent] = {}

    def add(self, name: str, speed: float = 1.0, cost: StepCost | None = None, up: bool = True) -> Member:
        """One more engine, at a place of its own."""
        member = Member(len(self.members), name, speed, cost, up)
        self.members.append(member)
        return member

    def drain(self, place: int) -> bool:
        """The engine there gets nothing more; what is inside goes on. Whether nothing is, so that it can leave."""
        self.members[place].up = False
        return not self.members[place].requests

    def leave(self, place: int) -> None:
        """The engine there is gone, with nothing inside. Raises MillstreamError where something is."""
        member = self.members[place]
        if member.requests:
            raise MillstreamError(f"{member.name} cannot leave: {member.requests} requests are inside")
        member.up = False
        self.router.lost(place)

    @property
    def up(self) -> list[Member]:
        return [member for member in self.members if member.up]

    def __len__(self) -> int:
        """Requests that are inside."""
        return len(self._sent)

    def place_of(self, request_id: int) -> int | None:
        sent = self._sent.get(request_id)
        return None if sent is None else sent.place

    def inside(self, place: int) -> list[int]:
        """Ids of what is at an engine, in the order in which it was sent there."""
        return [request_id for request_id, sent in self._sent.items() if sent.place == place]

    def send(self, request: Request, now: float, without: frozenset[int] = frozenset()) -> tuple[Request, int]:
        """Picks an engine, not one of the places `without`; gives the request as it is to be sent, and the place.

        Raises NoEngine.
        """
        able = [member for member in self.members if member.up and member.place not in without]
        if not able:
            raise NoEngine("no engine is up")
        request = self.router.prepare(request, able, now)
        place = self.router.pick(request, able, now)
        output = request.hints.expected_output_len or 0
        self._sent[request.id] = _Sent(request, place, output)
        member = self.members[place]
        member.requests += 1
        member.prompt_tokens += request.num_prompt
        member.output_tokens += output
        self.router.sent(request, place, now)
        return request, place

    def ended(self, request_id: int, done: Done, now: float) -> None:
        """It ended, or is to be sent again. Unknown ids are ignored."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return
        member = self.members[sent.place]
        member.requests -= 1
        member.prompt_tokens -= sent.request.num_prompt
        member.output_tokens -= sent.output_tokens
        self.router.ended(sent.request, sent.place, done, now)

    def lost(self, place: int, now: float) -> list[Request]:
        """The engine there is gone: gives what was inside, as it was sent, in order."""
        self.members[place].up = False
        inside = [sent.request for sent in self._sent.values() if sent.place == place]
        for request in inside:
            self.ended(request.id, Done(0, whole=False), now)
        self.router.lost(place)
        return inside
