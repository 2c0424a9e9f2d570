"""Deficit longest prefix match: equal shares for tenants, and within them whoever's prompt is held already.

DLPM (Locality-aware Fair Scheduling in LLM Serving, Cao et al., 2025). Who waits is ordered by how much of its prompt
the prefix cache holds. A tenant has a deficit: it may begin requests while that is above zero, and is charged
`input_weight` for a prompt token that has to be computed (what the cache held is free) and `output_weight` for a token
of an output. When of those that wait nobody's is above zero, everybody's that is not gets `quantum` more. A small
quantum is as fair as the Virtual Token Counter, a large one keeps as much of the cache in use as the longest prefix
alone would. When to want it: several tenants with prefixes of their own, such as agents, documents or few-shot prompts.

The bound: of two tenants that both want service all the time, neither gets more than the other by over twice
U + quantum, U being the most that one may be charged once its deficit is gone: input_weight * longest prompt +
output_weight * tokens of the KV cache. A tenant that stays away keeps its deficit, which is never above `quantum`, so
nobody saves up.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from millstream.core.events import Admitted, Computed, Emitted, Event, Finished, Preempted, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import LoadView, Policy, Verdict


@dataclass(frozen=True, slots=True)
class Config:
    """`quantum`: service that is handed out at once, in weighted tokens. `remember`: idle tenants that are kept."""

    quantum: float = 4096.0
    input_weight: float = 1.0
    output_weight: float = 2.0
    remember: int = 4096

    def __post_init__(self) -> None:
        for name in ("quantum", "input_weight", "output_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if self.remember < 1:
            raise ValueError(f"remember must be at least 1, got {self.remember}")


class _Tenant:
    """`waiting`: its sequences that hold no place. `refills`: how many there had been when it was last here."""

    __slots__ = ("deficit", "live", "refills", "waiting")

    def __init__(self, deficit: float) -> None:
        self.deficit = deficit
        self.live = 0
        self.refills = 0
        self.waiting: set[int] = set()


class Dlpm(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._tenants: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()
        self._waiting: dict[str, _Tenant] = {}  # with sequences that hold no place
        self._able: set[str] = set()  # those of them whose deficit is above zero
        self._again: set[int] = set()  # sequences that lost their place
        self.refills = 0

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if seq.state is State.RUNNING:
            return (0.0, 0.0 if seq.left <= 1 else 1.0, seq.arrival)
        if seq.id in self._again:
            return (1.0, -math.inf, seq.arrival)
        return (1.0, -float(view.hit(seq)), seq.arrival)

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        # Who lost its place enters by the same rule, else one that overdrew could go on for as long as it likes.
        if self._waits(seq) and seq.tenant not in self._able:
            return Verdict.SKIP
        return Verdict.ADMIT

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        """The last in rank of the tenant that has got most beyond its share."""
        return min(reversed(running), key=lambda seq: self._deficit(seq.tenant), default=None)

    def observe(self, event: Event) -> None:
        if isinstance(event, Computed):
            if event.seq.id in self._again:
                self._begun(event.seq)
        elif isinstance(event, Emitted):
            self._charge(event.seq.tenant, self.config.output_weight * event.tokens)
        elif isinstance(event, Submitted):
            self._submitted(event.seq)
        elif isinstance(event, Admitted):
            seq = event.seq
            if self._waits(seq):
                # All but the first output of a request share the prompt that this one computes, up to its last token.
                tokens = seq.num_prompt - event.cached if seq.index == 0 else 1
                self._begun(seq)
                self._charge(seq.tenant, self.config.input_weight * tokens)
        elif isinstance(event, Preempted):
            self._again.add(event.seq.id)
            self._await(event.seq)
        elif isinstance(event, Finished):
            self._finished(event.seq)

    def _waits(self, seq: SeqView) -> bool:
        tenant = self._waiting.get(seq.tenant)
        return tenant is not None and seq.id in tenant.waiting

    def _deficit(self, name: str) -> float:
        tenant = self._tenants.get(name)
        return math.inf if tenant is None else tenant.deficit

    def _submitted(self, seq: SeqView) -> None:
        name = seq.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._idle.pop(name) if name in self._idle else _Tenant(self.config.quantum)
            if tenant.live == 0 and tenant.deficit <= 0:
                # What was handed out while it stayed away it gets too, as far as that brings it above zero.
                owed = int(-tenant.deficit // self.config.quantum) + 1
                tenant.deficit += min(owed, self.refills - tenant.refills) * self.config.quantum
            self._tenants[name] = tenant
        tenant.live += 1
        self._await(seq)

    def _await(self, seq: SeqView) -> None:
        tenant = self._tenants.get(seq.tenant)
        if tenant is not None:
            tenant.waiting.add(seq.id)
            self._waiting[seq.tenant] = tenant
            self._sort(seq.tenant, tenant)

    def _begun(self, seq: SeqView) -> None:
        tenant = self._waiting[seq.tenant]
        tenant.waiting.discard(seq.id)
        self._again.discard(seq.id)
        if not tenant.waiting:
            del self._waiting[seq.tenant]
            self._able.discard(seq.tenant)

    def _charge(self, name: str, service: float) -> None:
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.deficit -= service
            self._sort(name, tenant)

    def _finished(self, seq: SeqView) -> None:
        if self._waits(seq):
            self._begun(seq)
        tenant = self._tenants.get(seq.tenant)
        if tenant is not None:
            tenant.live -= 1
            if tenant.live <= 0:
                tenant.refills = self.refills
                self._idle[seq.tenant] = self._tenants.pop(seq.tenant)
                if len(self._idle) > self.config.remember:
                    self._idle.popitem(last=False)
        self._refill()

    def _sort(self, name: str, tenant: _Tenant) -> None:
        if name in self._waiting and tenant.deficit > 0:
            self._able.add(name)
        else:
            self._able.discard(name)
            self._refill()

    def _refill(self) -> None:
        while self._waiting and not self._able:
            self.refills += 1
            for tenant in self._tenants.values():
                if tenant.deficit <= 0:
                    tenant.deficit += self.config.quantum
            self._able = {name for name, tenant in self._waiting.items() if tenant.deficit > 0}


CARD = Card("dlpm", "tenants in equal shares, within them the longest prefix that is held", paper=64)
PLUGIN = Dlpm
