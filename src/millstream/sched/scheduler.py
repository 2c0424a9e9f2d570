"""Who runs next, and how much. One loop, never subclassed: policies prefer, meters cut, the ledger keeps count.

Chunked prefill, prefix hits, speculation and preemption all fall out of one idea: a sequence has tokens known and
tokens computed, and each step lets the second catch up with the first, as far as every meter allows.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from millstream.core.errors import ConfigError
from millstream.core.events import Admitted, Event, Preempted
from millstream.core.plan import FROM_PREVIOUS, Extend, ScoreAsk, StepPlan
from millstream.core.sequence import Sequence, SeqView, State
from millstream.memory.ledger import Ledger
from millstream.sched.protocol import LoadView, Meter, Policy, StepCost, Verdict
from millstream.sched.stack import PolicyStack

# To look up a member of an enum takes longer than to compare with it.
_RUNNING = State.RUNNING
_SWAPPED = State.SWAPPED
_ADMIT = Verdict.ADMIT

# What the prefix cache holds of a sequence that waits is looked up again after so many plans.
HIT_PASSES = 8


class Scheduler:
    """Plans steps over the sequences given to it.

    `preemption` is how a victim recovers: "recompute" forgets its KV, "swap" copies it to the host (and falls back to
    recompute when the host has no room). `cost` is what policies and meters may know of how long
    steps take. Raises ConfigError where one cannot do without it.
    """

    def __init__(
        self,
        ledger: Ledger,
        policies: Seq[Policy],
        meters: Seq[Meter],
        preemption: str = "recompute",
        observe: Callable[[Event], None] = lambda event: None,
        cost: StepCost | None = None,
    ) -> None:
        self.ledger = ledger
        parts: list[Policy | Meter] = [*policies, *meters]
        if cost is None and (needy := [part for part in parts if part.needs_cost]):
            raise ConfigError(
                f"{', '.join(type(part).__name__ for part in needy)} must know how long steps take: sched.profile "
                "names a profile, which `millstream calibrate` makes"
            )
        self.policy = PolicyStack(policies)
        self.meters = list(meters)
        # Who has no opinion is not asked.
        self._closing = [meter for meter in self.meters if type(meter).closed is not Meter.closed]
        self._outgrowing = [meter for meter in self.meters if type(meter).outgrown is not Meter.outgrown]
        self.preemption = preemption
        self.observe = observe
        self.cost = cost
        self.live: dict[int, Sequence] = {}
        self._background: dict[int, Sequence] = {}
        self._aside: frozenset[int] = frozenset()  # stand aside in the step that is being planned
        self._forgotten: list[int] = []
        self._faults: dict[int, tuple[Sequence, Exception]] = {}
        self._plan_ids = itertools.count()
        self._now = 0.0
        self._passes = 0
        self._places: list[tuple[int, Sequence]] = []  # who may be displaced in this pass, in order
        self._outgrew = False  # whether somebody gave up its place in the last pass to ask for a larger one
        self._hits: dict[int, tuple[int, int]] = {}  # of those that wait: when it was looked up, in passes, and the hit
        # Where ranks never change: everybody who has one, in order, beside their ranks; and who has none yet.
        self._line: list[Sequence] = []
        self._ranks: list[tuple[float, ...]] = []
        self._rank_of: dict[int, tuple[float, ...]] = {}
        self._unranked: dict[int, Sequence] = {}

    def add(self, seq: Sequence) -> None:
        self.live[seq.id] = seq
        if self.policy.constant_rank:
            self._unranked[seq.id] = seq
        if seq.request.background:
            self._background[seq.id] = seq

    def remove(self, seq: Sequence, now: float, remember: bool) -> None:
        """Ends a sequence's stay: its blocks are given back, remembered for later prompts unless they are suspect."""
        del self.live[seq.id]
        self._background.pop(seq.id, None)
        self._hits.pop(seq.id, None)
        self._unranked.pop(seq.id, None)
        if (rank := self._rank_of.pop(seq.id, None)) is not None:
            place = bisect_left(self._ranks, rank)
            del self._ranks[place], self._line[place]
        self.ledger.release(seq, now, remember)
        seq.state = State.FINISHED
        self._forgotten.append(seq.id)

    @property
    def num_waiting(self) -> int:
        return len(self.live) - self.num_running

    @property
    def num_running(self) -> int:
        return len([1 for seq in self.live.values() if seq.state is _RUNNING])

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can be launched now.

        What a plug-in raises about one sequence takes that sequence out of the plan (`drain_faults`); what it raises
        about the whole (`budget`) comes through.
        """
        extends = self._fill(now)
        while not extends and self._outgrew:
            extends = self._fill(now)
        while not extends and (idle := self._idle_holder(now)) is not None:
            self._preempt(idle, now)
            extends = self._fill(now)
        moves = self.ledger.drain_moves()
        if not extends and not moves:
            return None
        forgotten, self._forgotten = tuple(self._forgotten), []
        return StepPlan(next(self._plan_ids), tuple(extends), moves, forgotten=forgotten)

    def drain_faults(self) -> list[tuple[Sequence, Exception]]:
        """Sequences for which a policy, a meter or a decode method raised while planning, and what it raised.

        They have no part in the plan and keep what they hold until the caller ends them.
        """
        faults, self._faults = list(self._faults.values()), {}
        return faults

    def _fill(self, now: float) -> list[Extend]:
        """One pass over everybody, the first in rank first; over background work only when nobody else is here."""
        self._aside = frozenset(self._background if len(self._background) < len(self.live) else ())
        self._passes += 1
        self._outgrew = False
        view = self.view(now)
        for meter in self.meters:
            meter.begin(view)
        order = self._order(view)
        extends: list[Extend] = []
        out: set[int] = set()  # gave up their place in this very plan
        held = False
        if self.policy.preemptive:
            self._places = [(place, seq) for place, seq in enumerate(order) if seq.state is _RUNNING and not seq.gates]
        for place, seq in enumerate(order):
            waits = seq.state is not _RUNNING
            if (waits and held) or seq.gates or seq.id in out or seq.left <= 0:
                continue
            if waits and (closed := [meter for meter in self._closing if meter.closed()]):
                other = self._last_after(place) if all(meter.counts_places for meter in closed) else None
                held = other is None
                if other is None or not self.policy.displaces(seq.view, other.view, view):
                    continue
            try:
                extend, holds = self._offer(seq, order, place, out, view, now)
            except Exception as error:
                self._faults[seq.id] = (seq, error)
                continue
            held = held or holds
            if extend is not None:
                extends.append(extend)
        return extends

    def _order(self, view: LoadView) -> list[Sequence]:
        """Everybody that no fault has ended, the first in rank first."""
        if self.policy.constant_rank:
            return self._in_line(view)
        ranked: list[tuple[tuple[float, ...], Sequence]] = []
        faults, aside, rank = self._faults, self._aside, self.policy.rank
        for seq_id, seq in self.live.items():
            if seq_id not in faults and seq_id not in aside:
                try:
                    ranked.append((rank(seq.view, view), seq))
                except Exception as error:
                    faults[seq_id] = (seq, error)
        ranked.sort(key=_rank)
        return [seq for _, seq in ranked]

    def _in_line(self, view: LoadView) -> list[Sequence]:
        """The same where ranks never change: who came since the last step is put where it belongs."""
        faults, aside = self._faults, self._aside
        for seq_id, seq in [*self._unranked.items()]:
            if seq_id in aside or seq_id in faults:
                continue
            try:
                rank = self.policy.rank(seq.view, view)
            except Exception as error:
                faults[seq_id] = (seq, error)
                continue
            del self._unranked[seq_id]
            place = bisect_left(self._ranks, rank)
            self._ranks.insert(place, rank)
            self._line.insert(place, seq)
            self._rank_of[seq_id] = rank
        if faults or aside:
            return [seq for seq in self._line if seq.id not in faults and seq.id not in aside]
        return self._line

    def _offer(
        self, seq: Sequence, order: list[Sequence], place: int, out: set[int], view: LoadView, now: float
    ) -> tuple[Extend | None, bool]:
        """What the sequence does in this step, and whether those that hold nothing yet must wait behind it."""
        entering = seq.state is not _RUNNING
        was_swapped = seq.state is _SWAPPED
        if entering:
            verdict = self.policy.admit(seq.view, view)
            if verdict is not _ADMIT:
                return None, verdict is Verdict.HOLD
            # Cheap refusals first: entering touches the cache.
            while not self._would_fit(seq):
                if not self._displace(seq, place, out, view, now):
                    return None, False
            while not self._enter(seq, now):
                if (holder := self._aside_holder()) is not None:
                    self._preempt(holder, now)
                elif not self._displace(seq, place, out, view, now):
                    # Nobody overtakes a sequence that waits for blocks: small ones would starve it.
                    return None, True
        elif self._outgrowing and any(meter.outgrown(seq) for meter in self._outgrowing):
            self._preempt(seq, now)
            out.add(seq.id)
            self._outgrew = True
            return None, False
        n = self._fit(seq)
        while n == 0 and entering and self._displace(seq, place, out, view, now):
            n = self._fit(seq)
        while self._aside and (holder := self._aside_holder()) is not None and n < self._most(seq):
            self._preempt(holder, now)
            n = self._fit(seq)
        while n == 0 and not entering and self._would_fit(seq):
            victim = self._victim(order, place, out, view)
            if victim is None:
                break
            self._preempt(victim, now)
            out.add(victim.id)
            n = self._fit(seq)
        if n == 0:
            # What came back from the host stays: carrying it out again would only cost more.
            if entering and not was_swapped:
                self._leave(seq, now)
            return None, entering
        if seq.stamps.admitted is None:
            seq.stamps.admitted = now
            self.observe(Admitted(now, seq.view, seq.cached))
        return self._take(seq, n, now), False

    def _idle_holder(self, now: float) -> Sequence | None:
        """Who gives its blocks up once nothing moves any more although somebody could go on: the last in rank.

        First of those at a gate: what one waits for may be the very sequence that needs its blocks (a beam waits for
        its siblings). Else of those that run, if one of them lacks nothing but blocks: the one that has the blocks may
        lack what a meter keeps back for the other.
        """
        live = [seq for seq in self.live.values() if seq.id not in self._aside]
        able = [seq for seq in live if not seq.gates and seq.left > 0 and seq.id not in self._faults]
        if not able or any(seq.plans_in_flight for seq in self.live.values()):
            return None
        holders = [seq for seq in live if seq.gates and seq.state is _RUNNING and seq.id not in self._faults]
        if not holders:
            holders = [seq for seq in able if seq.state is _RUNNING]
            if not any(self._would_fit(seq) for seq in holders):
                return None
        view = self.view(now)
        return max(holders, key=lambda seq: self.policy.rank(seq.view, view), default=None)

    def view(self, now: float) -> LoadView:
        """What policies are shown of the engine as it stands."""
        self._now = now
        live: Iterable[Sequence] = self.live.values()
        if self._aside:
            live = [seq for seq in live if seq.id not in self._aside]
        waiting: list[SeqView] = []
        running: list[SeqView] = []
        for seq in live:
            (running if seq.state is _RUNNING else waiting).append(seq.view)
        free, total = self.ledger.free(), self.ledger.total()
        view = LoadView(now, free, total, waiting, running, self._hit, self.cost, self.ledger.block_size)
        view.budget = self.policy.budget(view)
        return view

    def _hit(self, view: SeqView) -> int:
        seq = self.live.get(view.id)
        if seq is None or seq.state is not State.WAITING:
            return 0
        at, hit = self._hits.get(seq.id, (-HIT_PASSES, 0))
        if self._passes - at >= HIT_PASSES:
            hit = self.ledger.match(seq, self._now)
            self._hits[seq.id] = (self._passes, hit)
        return hit

    def _fit(self, seq: Sequence) -> int:
        n: int = seq.method.want(seq)
        for meter in self.meters:
            if n <= 0:
                return 0
            n = meter.fit(seq, n)
        return n

    def _most(self, seq: Sequence, place: bool = False) -> int:
        """Tokens that it would get if only blocks were there: what the meters leave that preemption cannot relieve.

        With `place`: if it had a place, too.
        """
        n: int = seq.method.want(seq)
        for meter in self.meters:
            if not meter.relieved_by_preemption and not (place and meter.counts_places):
                n = meter.fit(seq, n)
        return n

    def _would_fit(self, seq: Sequence) -> bool:
        return self._most(seq) > 0

    def _enter(self, seq: Sequence, now: float) -> bool:
        """Gives a sequence that holds nothing on the device what is there for it; False when there is no room."""
        if seq.state is _SWAPPED:
            if not self.ledger.swap_in_room(seq):
                return False
            self.ledger.swap_in(seq, now)
        else:
            # Positions whose prompt logprobs are still wanted have to be computed, whatever the cache holds.
            limit = seq.scored if seq.request.params.prompt_logprobs is not None else None
            limit = 0 if seq.cold else limit
            seq.computed = self.ledger.attach(seq, now, limit)
            if seq.stamps.admitted is None:
                seq.cached = seq.computed
        seq.state = _RUNNING
        return True

    def _leave(self, seq: Sequence, now: float) -> None:
        """Takes an entry back that led to nothing in this step."""
        self.ledger.release(seq, now, remember=False)
        seq.state = State.WAITING
        seq.computed = 0

    def _swap(self, seq: Sequence, now: float) -> bool:
        # Background work is computed again: swapped out it would hold blocks of the host that others may come to need.
        wanted = self.preemption == "swap" and not seq.request.background and seq.computed + seq.in_flight > 0
        if wanted and self.ledger.swap_out(seq, now):
            seq.state = _SWAPPED
            return True
        return False

    def forget(self, seq: Sequence, now: float, remember: bool = True) -> None:
        """Gives up what it has computed, to compute it again; the prefix index keeps what it can unless told not to."""
        self.ledger.release(seq, now, remember and not seq.cold)
        seq.state = State.WAITING
        seq.computed = seq.in_flight = 0
        seq.epoch += 1

    def _aside_holder(self) -> Sequence | None:
        """The last of those that stand aside and still hold blocks."""
        if not self._aside:
            return None
        return next((seq for seq in reversed(self._background.values()) if seq.state is _RUNNING), None)

    def _victim(self, order: list[Sequence], place: int, out: set[int], view: LoadView) -> Sequence | None:
        running = [s for s in order[place + 1 :] if s.state is _RUNNING and s.id not in out]
        if not running:
            # What waits at a gate cannot use its blocks now, and what it waits for may be this very sequence.
            running = [s for s in order[:place] if s.gates and s.state is _RUNNING and s.id not in out]
        if not running:
            return None
        chosen = self.policy.victim([seq.view for seq in running], view)
        return next((seq for seq in running if chosen is not None and seq.id == chosen.id), running[-1])

    def _displace(self, seq: Sequence, place: int, out: set[int], view: LoadView, now: float) -> bool:
        """Takes the place of the last that runs and ranks after `seq`, where a policy wants that for it."""
        if not self.policy.preemptive or self._most(seq, place=True) <= 0:
            return False
        other = self._last_after(place)
        if other is None or not self.policy.displaces(seq.view, other.view, view):
            return False
        self._preempt(other, now)
        out.add(other.id)
        return True

    def _last_after(self, place: int) -> Sequence | None:
        """The last that still has a place of those that rank after one."""
        places = self._places
        while places and places[-1][1].state is not _RUNNING:
            places.pop()
        return places[-1][1] if places and places[-1][0] > place else None

    def _preempt(self, seq: Sequence, now: float) -> None:
        seq.preemptions += 1
        for meter in self.meters:
            meter.gave_up(seq)
        how = "swap" if self._swap(seq, now) else "recompute"
        if how == "recompute":
            self.forget(seq, now)
        self.observe(Preempted(now, seq.view, how))

    def _take(self, seq: Sequence, n: int, now: float) -> Extend:
        for meter in self.meters:
            meter.take(seq, n)
        self.ledger.grow(seq, n, now)
        start = seq.next_start
        stop = start + n
        tokens = tuple(seq.tokens[start:stop])
        if len(tokens) < n:
            tokens += (FROM_PREVIOUS,) * (n - len(tokens))
        sample = seq.method.ask(seq, stop) if stop == seq.known else None
        extend = Extend(
            seq.id,
            start,
            tokens,
            tuple(seq.holdings.values()),
            sample=sample,
            score=None if seq.request.params.prompt_logprobs is None else _score_ask(seq, start, stop),
            adapter=seq.request.adapter,
            decode=seq.decode.name,
        )
        seq.in_flight += n
        seq.plans_in_flight += 1
        if sample is not None:
            seq.pending += 1
        return extend


def _score_ask(seq: Sequence, start: int, stop: int) -> ScoreAsk | None:
    top = seq.request.params.prompt_logprobs
    if top is None or seq.index > 0 or stop <= seq.scored or start >= seq.num_prompt - 1:
        return None
    targets = seq.tokens[start + 1 : min(stop + 1, seq.num_prompt)]
    return ScoreAsk(tuple(targets), top)


# Ranks end by the sequence's id, so that no two are equal.
_rank: Callable[[tuple[tuple[float, ...], Sequence]], tuple[float, ...]] = operator.itemgetter(0)
