"""Who sent a request, and the gate that it passes: what the routes know of keys, limits and overload, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from millstream.core.errors import MillstreamError
from millstream.core.request import Slo


@dataclass(frozen=True, slots=True)
class Caller:
    """Set by the middleware as `request.state.caller` before any route is taken.

    `request_id` is ours: random, 128 bits, the key of everything that is kept of the request. `label` is what the
    client sent as X-Request-Id, never a key. `tenant` is the name that the API key stands for, "" without keys. `salt`
    keeps the cached prefixes of tenants apart: the default of a request's `cache_salt`. `background` requests, those of
    batches, take part only in steps that nobody else needs. `deadline_s` is that of the header X-Request-Timeout, known
    before the body is.
    """

    request_id: str
    tenant: str = ""
    label: str = ""
    salt: str = ""
    background: bool = False
    traceparent: str = ""
    deadline_s: float | None = None


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


class Overloaded(MillstreamError):
    """There is no room now (429, or 503 while draining). `reason` is the label of the count of what was shed."""

    def __init__(self, reason: str, message: str, retry_after_s: float, status: int = 429) -> None:
        self.reason, self.retry_after_s, self.status = reason, retry_after_s, status
        super().__init__(message)


class DeadlinePassed(MillstreamError):
    """The deadline of a request came before its first token (504)."""


class Seat(Protocol):
    """The place of one request among those inside. `leave` gives it back; a second time does nothing."""

    def first_token(self) -> None:
        """It waits no more."""
        ...

    def leave(self) -> None: ...


class Gate(Protocol):
    def look(self, caller: Caller) -> None:
        """Raises Overloaded where any request of this caller would be shed now: asked before anything is parsed."""
        ...

    def enter(self, caller: Caller, tokens: int, requests: int, slo: Slo) -> Seat:
        """A place for `requests` outputs whose prompts have `tokens` tokens together.

        Raises Overloaded when the queue is full by requests or by tokens, or when the wait that is predicted is longer
        than the deadline.
        """
        ...
