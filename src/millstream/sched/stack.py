"""Several policies as one: ranks concatenate, all must admit, the smallest budget wins, the first victim named wins."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Seq

from millstream.core.events import Event
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import Budget, LoadView, Policy, Verdict

# To look up a member of an enum takes longer than to compare with it.
_ADMIT = Verdict.ADMIT
_HOLD = Verdict.HOLD
_RUNNING = State.RUNNING

_log = logging.getLogger(__name__)


class Order:
    """How policies rank together, the most important first. Ties end by sequence id, so that an order is total.

    What ranks below a policy that asks for it (`Policy.atop`) is an order of its own, asked once for both.
    """

    def __init__(self, policies: Seq[Policy]) -> None:
        self.constant_rank = all(policy.constant_rank for policy in policies)
        asks = (place for place, policy in enumerate(policies[:-1], 1) if type(policy).atop is not Policy.atop)
        split = next(asks, len(policies))
        self._first, self._others = policies[0], tuple(policies[1:split])
        self._below = Below(policies[split:]) if split < len(policies) else None
        if self._below is not None:
            policies[split - 1].atop(self._below)

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        ranks = self._first.rank(seq, view)
        for policy in self._others:
            ranks += policy.rank(seq, view)
        return (*ranks, seq.id) if self._below is None else ranks + self._below.rank(seq, view)


class Below(Order):
    """The order below a policy that asks for it, too: nobody's rank is made twice in one plan, nor again where ranks
    never change."""

    def __init__(self, policies: Seq[Policy]) -> None:
        super().__init__(policies)
        self._view: LoadView | None = None
        self._ranks: dict[int, tuple[float, ...]] = {}

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if view is not self._view:
            self._view = view
            # Those that have gone are forgotten once they are as many as those that are here.
            if not self.constant_rank or len(self._ranks) > 2 * (len(view.waiting) + len(view.running)):
                self._ranks = {}
        rank = self._ranks.get(seq.id)
        if rank is None:
            rank = self._ranks[seq.id] = Order.rank(self, seq, view)
        return rank


class PolicyStack(Order):
    """A Policy made of policies, the most important first.

    While as many run as may and none of the policies would have anybody take a place, nobody that waits is ranked: they
    are last, and none gets in before the next step.
    """

    def __init__(self, policies: Seq[Policy]) -> None:
        super().__init__(policies)
        self.policies = tuple(policies)
        self.preemptive = any(policy.preemptive for policy in self.policies)
        # Ranks that never change are asked for once, whatever that step is like.
        self._queues = not (self.preemptive or self.constant_rank)
        # Who has no opinion is not asked.
        self._admitting = [policy for policy in self.policies if type(policy).admit is not Policy.admit]
        self._budgeting = [policy for policy in self.policies if type(policy).budget is not Policy.budget]
        self._observing = [policy for policy in self.policies if type(policy).observe is not Policy.observe]
        self._failed: list[Policy] = []

    @property
    def observes(self) -> bool:
        """Whether any policy hears of events."""
        return bool(self._observing)

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if view.full and self._queues and seq.state is not _RUNNING:
            return (math.inf, seq.id)
        return super().rank(seq, view)

    def admit(self, seq: SeqView, view: LoadView) -> Verdict:
        if view.full and self._queues:
            return _HOLD
        for policy in self._admitting:
            if (verdict := policy.admit(seq, view)) is not _ADMIT:
                return verdict
        return _ADMIT

    def budget(self, view: LoadView) -> Budget:
        if not self._budgeting:
            return Budget()
        budgets = [policy.budget(view) for policy in self._budgeting]
        return Budget(
            tokens=min((b.tokens for b in budgets if b.tokens is not None), default=None),
            rows=min((b.rows for b in budgets if b.rows is not None), default=None),
        )

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        for policy in self.policies:
            if (chosen := policy.victim(running, view)) is not None:
                return chosen
        return None

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        return any(policy.displaces(seq, other, view) for policy in self.policies if policy.preemptive)

    def observe(self, event: Event) -> None:
        """A policy that cannot follow an event goes on without it: the event has happened, whoever minds."""
        for policy in self._observing:
            try:
                policy.observe(event)
            except Exception:
                if policy not in self._failed:
                    self._failed.append(policy)
                    _log.exception("policy %s failed in observe; further failures are not told", type(policy).__name__)
