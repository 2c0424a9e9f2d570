"""Who sent a request, and the gate that it passes: what the routes know of keys, limits and overload, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from millstream.core.errors import MillstreamError
from millstream.core.request import Slo

# The attribute of a route's handler that turns callers away, with Overloaded, before anything is read of what they ask.
LOOK = "look"


@dataclass(frozen=True, slots=True)
class Rights:
    """What a key may ask for: `[serve.auth.rights.NAME]`.

    `models` are names of models as clients call them; without any it may use all. Without `control_tokens` the token
    ids that it sends are those of text: none may be a control token but what stands before and behind every text.
    """

    models: tuple[str, ...] = ()
    control_tokens: bool = True

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model of these names."""
        return not self.models or any(name in self.models for name in names)


ALL_RIGHTS = Rights()


@dataclass(frozen=True, slots=True)
class Caller:
    """Set by the middleware as `request.state.caller` before any route is taken.

    `request_id` is ours: random, 128 bits, the key of everything that is kept of the request. `label` is what the
    client sent as X-Request-Id, never a key. `tenant` is the name that the API key stands for, "" without keys. `salt`
    keeps the cached prefixes of tenants apart: the default of a request's `cache_salt`. `background` requests, those of
    batches, take part only in steps that nobody else needs. `deadline_s` is that of the header X-Request-Timeout, known
    before the body is. `rights` are those of the key.
    """

    request_id: str
    tenant: str = ""
    label: str = ""
    salt: str = ""
    background: bool = False
    traceparent: str = ""
    deadline_s: float | None = None
    rights: Rights = ALL_RIGHTS


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
