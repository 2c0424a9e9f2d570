"""Who may come in: a queue that is bounded by requests, by tokens and by time, deadlines, and quotas of tenants.

A request waits here from its arrival to its first token. How long a new one would wait is told by how fast prompts
leave the queue: their tokens a second, over the last seconds in which there was one. Each request counts as some more
tokens than its prompt has, so that a few short prompts behind long work do not make every other one look slow. A server
that was never behind does not know how fast it is, so its guess counts only once somebody has really waited; for some
minutes after it was behind it knows, and a burst is cut to what fits from its first request on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from millstream.core.request import Slo
from millstream.serve.caller import Caller, Overloaded
from millstream.serve.config import AdmissionConfig
from millstream.serve.pace import Pace

# The rate is that of about so many seconds in which somebody waited.
WINDOW_S = 10.0
# Nobody is turned away for a guess before somebody has waited so long.
PROOF_S = 0.5
# How long it is remembered how fast the server was when it was behind, and what it takes to know.
MEMORY_S, KNOWN_S = 120.0, 1.0
# What a request costs beside its prompt, in tokens of prompts.
REQUEST_TOKENS = 64
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
DRAIN_RETRY_S = 5.0
MINUTE_S = 60.0
# Of the queue, what one tenant may fill while others have come within the last minute: they find room then.
TENANT_SHARE = 0.75


class Place:
    """The seat of one request."""

    __slots__ = (
        "_admission",
        "background",
        "began",
        "deadline_s",
        "inside",
        "requests",
        "since",
        "tenant",
        "tokens",
        "waits",
    )

    def __init__(
        self,
        admission: Admission,
        caller: Caller,
        tokens: int,
        requests: int,
        since: float,
        deadline_s: float | None = None,
    ) -> None:
        self._admission, self.tenant, self.background = admission, caller.tenant, caller.background
        self.tokens, self.requests, self.since, self.deadline_s = tokens, requests, since, deadline_s
        self.began = False
        self.waits, self.inside = not caller.background, True

    def first_token(self) -> None:
        self.began = True
        if self.waits:
            self._admission._leave_queue(self, served=True)

    def leave(self) -> None:
        if self.waits:
            self._admission._leave_queue(self, served=False)
        if self.inside:
            self.inside = False
            self._admission._left(self)


class _Tenant:
    __slots__ = ("filled_at", "requests", "tokens")

    def __init__(self, tokens: float, now: float) -> None:
        self.requests, self.tokens, self.filled_at = 0, tokens, now


class _Rate:
    """Work a second of the recent past. It fades with the time that is counted, not with the time that passes."""

    __slots__ = ("busy_s", "work")

    def __init__(self) -> None:
        self.work = self.busy_s = 0.0

    def passed(self, seconds: float) -> None:
        fade = math.exp(-seconds / WINDOW_S)
        self.work *= fade
        self.busy_s = self.busy_s * fade + seconds

    @property
    def value(self) -> float:
        return self.work / self.busy_s if self.busy_s > 0 else 0.0


class Admission:
    """A Gate. `draining` tells whether the server takes nothing any more; `now` are seconds of a monotonic clock.

    `losses` tells how often the engine was lost: what waited while there was none says nothing of how fast it is.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        draining: Callable[[], bool] = lambda: False,
        now: Callable[[], float] = time.monotonic,
        losses: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config, self._draining, self._now, self._losses = config, draining, now, losses
        self.waiting_requests = self.waiting_tokens = 0
        self._lost = losses()
        self._queue: dict[Place, None] = {}  # in the order of arrival
        self._waiting_of: dict[str, int] = {}  # of tenants for whom somebody waits
        self._seen: dict[str, float] = {}  # when each tenant came last; as many as there are keys
        # While somebody waits, and while somebody has waited for so long that the server is behind.
        self._any, self._behind = _Rate(), _Rate()
        self._behind_at = -math.inf
        self._counted_at = now()
        self.pace = Pace(now)
        # As many as there are keys; those of whom nothing is inside and whose quota is whole are forgotten.
        self._tenants: dict[str, _Tenant] = {}

    # -- what is known of the queue

    @property
    def rate(self) -> float:
        """Work that leaves the queue a second, as `_work` counts it; 0 before there was any."""
        self._count()
        return self._any.value

    def wait_s(self, more: int = 0) -> float:
        """How long it takes until what waits now, and so much work more, have left; 0 where nobody can tell."""
        waited_s = self._waited_s()
        if waited_s is None:
            return 0.0
        self._count()
        if waited_s < PROOF_S:
            known = self._behind.busy_s >= KNOWN_S and self._now() - self._behind_at < MEMORY_S
            rate = self._behind.value if known else 0.0
            return (self._waiting + more) / rate if rate > 0 else 0.0
        rate = self._any.value
        if rate > 0:
            return (self._waiting + more) / rate
        # Nothing has left yet. One alone may have a long prompt; of several the next will wait as long at least.
        return waited_s if len(self._queue) > 1 else 0.0

    @property
    def _waiting(self) -> int:
        return _work(self.waiting_tokens, self.waiting_requests)

    def _waited_s(self) -> float | None:
        """How long the first in the queue has waited."""
        first = next(iter(self._queue), None)
        return None if first is None else self._now() - first.since

    # -- Gate

    def look(self, caller: Caller) -> None:
        self._check(caller, 0, 1)
        self._check_deadline(caller, 1, caller.deadline_s)

    def enter(self, caller: Caller, tokens: int, requests: int, slo: Slo) -> Place:
        self._check(caller, tokens, requests)
        wait_s = 0.0 if slo.deadline_s is None or caller.background else self.wait_s(_work(tokens, requests))
        if slo.deadline_s is not None and wait_s > slo.deadline_s:
            raise Overloaded(
                "deadline", f"it would wait for {wait_s:.1f} s, and its deadline is in {slo.deadline_s:g} s", wait_s
            )
        self._check_deadline(caller, requests, slo.deadline_s)
        config, now = self.config, self._now()
        place = Place(self, caller, tokens, requests, now, slo.deadline_s)
        if config.tenant_requests or config.tenant_tokens_per_min:
            tenant = self._tenant(caller.tenant)
            tenant.requests += requests
            tenant.tokens -= tokens if config.tenant_tokens_per_min else 0
        if place.waits:
            self.pace.entered(requests)
            self._count()
            self._queue[place] = None
            self.waiting_requests += requests
            self._waiting_of[caller.tenant] = self._waiting_of.get(caller.tenant, 0) + requests
            self.waiting_tokens += tokens
        return place

    def _check(self, caller: Caller, tokens: int, requests: int) -> None:
        """Raises Overloaded."""
        config = self.config
        if self._draining():
            raise Overloaded("draining", "the server is shutting down; ask another one", DRAIN_RETRY_S, 503)
        self._check_tenant(caller.tenant, tokens, requests)
        if caller.background:
            return
        self._seen[caller.tenant] = self._now()
        most = max(1, int(TENANT_SHARE * config.queued_requests))
        mine = self._waiting_of.get(caller.tenant, 0)
        if config.queued_requests and mine and mine + requests > most and self._others_came(caller.tenant):
            raise self._full("tenant_queue", f"{mine} requests of this key wait already, and others come too")
        # An empty queue takes whatever the engine can.
        if self.waiting_requests:
            if config.queued_requests and self.waiting_requests + requests > config.queued_requests:
                raise self._full("queue_full", f"{self.waiting_requests} requests wait already")
            if config.queued_tokens and self.waiting_tokens + tokens > config.queued_tokens:
                raise self._full("queue_tokens", f"{self.waiting_tokens} tokens of prompts wait already")
        wait_s = self.wait_s() if config.max_wait_s else 0.0
        if wait_s > config.max_wait_s:
            raise self._full("predicted_wait", f"it would wait for {wait_s:.0f} s")

    def _check_deadline(self, caller: Caller, requests: int, deadline_s: float | None) -> None:
        """Raises Overloaded."""
        if deadline_s is None or caller.background:
            return
        took_s = self.pace.late_s(requests, deadline_s)
        if took_s is not None:
            retry_s = min(MAX_RETRY_S, max(MIN_RETRY_S, took_s / 2))
            raise Overloaded(
                "deadline", f"it would take {took_s:.1f} s, and its deadline is in {deadline_s:g} s", retry_s
            )

    def _full(self, reason: str, message: str) -> Overloaded:
        # When what waits now is through, there is room for all who were turned away; half of it is enough for most.
        retry_s = min(MAX_RETRY_S, max(MIN_RETRY_S, self.wait_s() / 2))
        return Overloaded(reason, f"the server is busy: {message}; ask again in {retry_s:.0f} s", retry_s)

    def _check_tenant(self, name: str, tokens: int, requests: int) -> None:
        config = self.config
        if not (config.tenant_requests or config.tenant_tokens_per_min):
            return
        tenant = self._tenant(name)
        if config.tenant_requests and tenant.requests + requests > config.tenant_requests and tenant.requests:
            raise Overloaded(
                "tenant_requests",
                f"{tenant.requests} requests of this key are inside, at most {config.tenant_requests} may be",
                MIN_RETRY_S,
            )
        quota = config.tenant_tokens_per_min
        # One that is larger than the quota itself passes when the quota is whole, and is paid for afterwards.
        if quota and tenant.tokens < min(max(tokens, 1), quota):
            retry_s = (min(max(tokens, 1), quota) - tenant.tokens) * MINUTE_S / quota
            raise Overloaded("tenant_tokens", f"this key has used its {quota} tokens a minute", retry_s)

    def _others_came(self, name: str) -> bool:
        now = self._now()
        return any(tenant != name and now - at < MINUTE_S for tenant, at in self._seen.items())

    def _tenant(self, name: str) -> _Tenant:
        quota, now = self.config.tenant_tokens_per_min, self._now()
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(float(quota), now)
        tenant.tokens = min(float(quota), tenant.tokens + (now - tenant.filled_at) * quota / MINUTE_S)
        tenant.filled_at = now
        return tenant

    def _left(self, place: Place) -> None:
        if not place.background:
            self.pace.left(place.requests, self._now() - place.since, place.deadline_s, place.began)
        tenant = self._tenants.get(place.tenant)
        if tenant is not None:
            tenant.requests -= place.requests
            if tenant.requests <= 0 and self._tenant(place.tenant).tokens >= self.config.tenant_tokens_per_min:
                del self._tenants[place.tenant]

    def _leave_queue(self, place: Place, served: bool) -> None:
        behind = self._count()
        place.waits = False
        if place in self._queue:
            del self._queue[place]
            self.waiting_requests -= place.requests
            self._waiting_of[place.tenant] -= place.requests
            if not self._waiting_of[place.tenant]:
                del self._waiting_of[place.tenant]
            self.waiting_tokens -= place.tokens
            if served:
                work = _work(place.tokens, place.requests)
                self._any.work += work
                if behind:
                    self._behind.work += work

    def _count(self) -> bool:
        """Accounts for the time since the last change of the queue; whether the server is behind."""
        now, waited_s = self._now(), self._waited_s()
        passed_s, self._counted_at = now - self._counted_at, now
        if self._lost != self._losses():
            self._lost, passed_s = self._losses(), 0.0
        behind = waited_s is not None and waited_s >= PROOF_S
        if waited_s is not None:
            self._any.passed(passed_s)
        if behind:
            self._behind.passed(passed_s)
            self._behind_at = now
        return behind


def _work(tokens: int, requests: int) -> int:
    return tokens + REQUEST_TOKENS * requests
