"""Ledger, radix index and host tier against a memory of hashes, in any order of what a scheduler does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from fake_kv import FULL, FakeKv, sequence, window
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millstream.core import registry
from millstream.core.plan import Tier
from millstream.core.registry import Choice
from millstream.core.sequence import Sequence, State
from millstream.memory.blocks import BlockFault, OutOfBlocks
from millstream.memory.ledger import Ledger

GROUPS = {
    "full": (FULL,),
    "full and window": (FULL, window(3)),
    "window": (window(4),),
    "full and two windows": (window(1, "narrow"), FULL, window(6, "wide")),
}


@dataclass
class Live:
    """A sequence, and the truth about its tokens: those sampled by plans in flight too."""

    seq: Sequence
    truth: list[int]
    salt: str
    written: int = 0


@dataclass
class Row:
    live: Live
    start: int
    count: int
    sampled: bool
    epoch: int
    holdings: dict[str, object] = field(default_factory=dict)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []
        self.building: list[Row] = []
        self.flights: list[list[Row]] = []
        self.now = 0.0
        self.next_id = 0
        self.past: list[list[int]] = []

    @initialize(
        groups=st.sampled_from(sorted(GROUPS)),
        block_size=st.integers(1, 5),
        data=st.data(),
        host=st.integers(0, 8),
        prefix=st.sampled_from([("radix", "lru"), ("radix", "lru"), ("radix", "cost"), ("none", "")]),
    )
    def start(self, groups: str, block_size: int, data: st.DataObject, host: int, prefix: tuple[str, str]) -> None:
        self.groups = GROUPS[groups]
        names = [group.name for group in self.groups]
        sizes = {name: data.draw(st.integers(2, 14), label=f"blocks of {name}") for name in names}
        choice = Choice(prefix[0], {"evict": prefix[1]} if prefix[1] else {})
        index = registry.make("prefix", choice)
        self.ledger = Ledger(self.groups, block_size, sizes, index, dict.fromkeys(names, host), key="model")
        self.kv = FakeKv(self.groups, block_size)
        for _ in range(3):
            self.submit_one(data)

    # -- choosing

    def pick(self, data: st.DataObject, states: set[State], idle: bool = False) -> Live | None:
        busy = {id(row.live) for row in self.building}
        found = [one for one in self.live if one.seq.state in states and id(one) not in busy]
        if idle:
            found = [one for one in found if one.seq.in_flight == 0 and one.seq.pending == 0]
        return data.draw(st.sampled_from(found), label="sequence") if found else None

    def some(self, state: State) -> bool:
        return any(one.seq.state is state for one in self.live)

    def settle_moves(self) -> None:
        # Moves run in order and before all extends of the plan being built: running them now is the same.
        self.kv.move(self.ledger.drain_moves())
        self.now += 1.0

    # -- what a scheduler does

    def submit_one(self, data: st.DataObject) -> None:
        """Mostly prompts that begin as an earlier sequence did."""
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=10), label="prompt")
        if self.past:
            before = data.draw(st.sampled_from(self.past), label="past")
            prompt = before[: data.draw(st.integers(0, len(before)), label="of it")] + prompt
        salt = data.draw(st.sampled_from(["", "", "", "b"]), label="salt")
        self.live.append(Live(sequence(self.next_id, prompt, salt), list(prompt), salt))
        self.next_id += 1
        self.past = [*self.past[-4:], prompt]

    @precondition(lambda self: len(self.live) < 5)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        self.submit_one(data)

    @precondition(lambda self: self.some(State.WAITING))
    @rule(data=st.data(), limit=st.one_of(st.none(), st.none(), st.integers(0, 14)))
    def enter(self, data: st.DataObject, limit: int | None) -> None:
        one = self.pick(data, {State.WAITING})
        assert one is not None
        self.enter_one(one, limit)

    def enter_one(self, one: Live, limit: int | None = None) -> None:
        found = self.ledger.match(one.seq, self.now)
        got = self.ledger.attach(one.seq, self.now, limit)
        assert max(got, found) <= one.seq.known - 1
        # With holes a shorter question can have a longer answer: see Radix.match.
        assert got <= found or self.groups != (FULL,)
        assert limit is None or got <= limit
        one.seq.computed = one.written = got
        one.seq.state = State.RUNNING
        self.settle_moves()

    @precondition(lambda self: self.some(State.RUNNING))
    @rule(data=st.data(), n=st.integers(1, 9))
    def schedule(self, data: st.DataObject, n: int) -> None:
        one = self.pick(data, {State.RUNNING})
        if one is not None:
            self.advance(one, data, n)

    def advance(self, one: Live, data: st.DataObject, n: int) -> None:
        seq = one.seq
        if seq.state is not State.RUNNING or seq.left <= 0:
            return
        n = min(n, seq.left)
        room = self.ledger.room(seq, n)
        assert 0 <= room <= n
        if room < n:
            before = (dict(seq.holdings), self.ledger.free())
            with pytest.raises(OutOfBlocks):
                self.ledger.grow(seq, room + 1, self.now)
            assert before == (dict(seq.holdings), self.ledger.free())
        if room == 0:
            return
        assert self.ledger.blocks_needed(seq, room) <= max(self.ledger.free(g.name) for g in self.groups)
        self.ledger.grow(seq, room, self.now)
        row = Row(one, seq.next_start, room, seq.next_start + room == seq.known, seq.epoch, dict(seq.holdings))
        if row.sampled:
            one.truth.append(data.draw(st.integers(0, 1), label="sampled"))
            seq.pending += 1
        seq.in_flight += room
        self.building.append(row)
        self.settle_moves()

    @precondition(lambda self: self.building and len(self.flights) < 2)
    @rule()
    def launch(self) -> None:
        for row in self.building:
            # The table of the plan, as it was when the row was taken.
            self.kv.compute(row.holdings, row.live.truth, row.live.salt, row.start, row.start + row.count)
            row.live.written = row.start + row.count
        self.flights.append(self.building)
        self.building = []

    @precondition(lambda self: self.flights and not self.building)
    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        self.collect_one(data)

    def collect_one(self, data: st.DataObject) -> None:
        for row in self.flights.pop(0):
            one, seq = row.live, row.live.seq
            if row.sampled and one in self.live:
                seq.tokens.append(one.truth[len(seq.tokens)])
                seq.pending -= 1
            if seq.epoch != row.epoch or seq.state in (State.WAITING, State.FINISHED):
                continue
            kept = row.count
            if row.sampled and row.count > 1 and seq.in_flight == row.count:
                kept = data.draw(st.integers(1, row.count), label="kept")
            seq.in_flight -= row.count
            seq.computed += kept
            if kept < row.count:
                del seq.tokens[seq.computed :], one.truth[seq.computed :]
                one.truth.append(1)
                seq.tokens.append(1)
                self.ledger.rollback(seq, seq.computed)
                one.written = seq.computed
            if seq.state is State.RUNNING:
                self.ledger.settle(seq, self.now)
        self.settle_moves()

    @rule(data=st.data(), n=st.integers(1, 9))
    def step(self, data: st.DataObject, n: int) -> None:
        """All that run go on by up to `n` tokens, and come back: what a scheduler does most of the time."""
        while self.flights and not self.building:
            self.collect_one(data)
        for one in self.live:
            if one.seq.state is State.WAITING:
                self.enter_one(one)
            if all(row.live is not one for row in self.building):
                self.advance(one, data, n)
        if self.building:
            if len(self.flights) == 2:
                return
            self.launch()
            while self.flights:
                self.collect_one(data)

    @precondition(lambda self: len(self.live) < 6 and self.some(State.RUNNING))
    @rule(data=st.data(), back=st.integers(0, 7))
    def fork(self, data: st.DataObject, back: int) -> None:
        parent = self.pick(data, {State.RUNNING}, idle=True)
        if parent is None:
            return
        length = max(0, parent.seq.computed - back)
        child = Live(sequence(self.next_id, parent.truth[:length] or parent.truth[:1], parent.salt), [], parent.salt)
        self.next_id += 1
        try:
            self.ledger.fork(parent.seq, child.seq, length)
        except BlockFault:
            assert back > 0 and self.groups != (FULL,), "only a window that moved on can refuse"
            return
        if length:
            child.seq.tokens.append(data.draw(st.integers(0, 1), label="diverges"))
        child.truth = list(child.seq.tokens)
        child.seq.computed = child.written = length
        child.seq.state = State.RUNNING
        self.live.append(child)
        self.settle_moves()

    @rule(data=st.data())
    def permute(self, data: st.DataObject) -> None:
        busy = {id(row.live) for row in self.building}
        group = [
            one
            for one in self.live
            if one.seq.state is State.RUNNING
            and id(one) not in busy
            and not one.seq.in_flight
            and not one.seq.pending
            and not one.salt
        ]
        if len(group) < 2:
            return
        sources = data.draw(st.lists(st.sampled_from(group), min_size=len(group), max_size=len(group)))
        new = [(list(source.truth), source.seq.computed) for source in sources]
        self.ledger.permute(
            [(one.seq, source.seq, source.seq.computed) for one, source in zip(group, sources, strict=True)]
        )
        for one, (tokens, computed) in zip(group, new, strict=True):
            one.seq.tokens = [*tokens[:computed], data.draw(st.integers(0, 1), label="beam")]
            one.truth = list(one.seq.tokens)
            one.seq.computed = one.written = computed
            one.seq.epoch += 1
        self.settle_moves()

    @rule(data=st.data(), back=st.integers(0, 9), swapped=st.booleans())
    def rollback(self, data: st.DataObject, back: int, swapped: bool) -> None:
        one = self.pick(data, {State.SWAPPED if swapped else State.RUNNING}, idle=True)
        if one is None:
            return
        seq = one.seq
        length = max(0, seq.computed - back)
        try:
            self.ledger.rollback(seq, length)
        except BlockFault:
            assert back > 0 and self.groups != (FULL,), "only a window that moved on can refuse"
            return
        seq.computed = one.written = length
        seq.tokens = [*one.truth[:length], data.draw(st.integers(0, 1), label="instead")]
        one.truth = list(seq.tokens)
        self.settle_moves()

    @precondition(lambda self: self.some(State.RUNNING))
    @rule(data=st.data())
    def preempt_by_recompute(self, data: st.DataObject) -> None:
        one = self.pick(data, {State.RUNNING})
        if one is None:
            return
        self.ledger.release(one.seq, self.now, remember=True)
        one.seq.computed = one.seq.in_flight = one.written = 0
        one.seq.epoch += 1
        one.seq.state = State.WAITING
        self.settle_moves()

    @precondition(lambda self: self.some(State.RUNNING))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        one = self.pick(data, {State.RUNNING})
        if one is None or not one.seq.holdings:
            return
        before = dict(one.seq.holdings)
        if self.ledger.swap_out(one.seq, self.now):
            one.seq.state = State.SWAPPED
            assert all(holding.tier is Tier.HOST for holding in one.seq.holdings.values())
        else:
            assert one.seq.holdings == before
        self.settle_moves()

    @precondition(lambda self: self.some(State.SWAPPED))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        one = self.pick(data, {State.SWAPPED})
        if one is None:
            return
        assert self.ledger.room(one.seq, 1) == 0
        if self.ledger.swap_in_room(one.seq):
            self.ledger.swap_in(one.seq, self.now)
            one.seq.state = State.RUNNING
        else:
            with pytest.raises(OutOfBlocks):
                self.ledger.swap_in(one.seq, self.now)
        self.settle_moves()

    @rule(data=st.data(), more=st.integers(0, 12), contiguous=st.booleans())
    def reserve(self, data: st.DataObject, more: int, contiguous: bool) -> None:
        one = self.pick(data, {State.WAITING, State.RUNNING})
        if one is None or (one.seq.state is State.WAITING) != contiguous:
            return
        before = dict(one.seq.holdings)
        if not self.ledger.reserve(one.seq, one.seq.computed + more, self.now, contiguous):
            assert one.seq.holdings == before
            return
        if contiguous:
            one.seq.state = State.RUNNING
            for holding in one.seq.holdings.values():
                first = min(holding.blocks, default=0)
                assert holding.blocks == tuple(range(first, first + len(holding.blocks)))
        self.settle_moves()
        left = max(0, one.seq.computed + more - one.seq.next_start)
        assert self.ledger.room(one.seq, left) == left

    @rule(data=st.data(), remember=st.booleans())
    def finish(self, data: st.DataObject, remember: bool) -> None:
        one = self.pick(data, {State.WAITING, State.RUNNING, State.SWAPPED})
        if one is None:
            return
        self.ledger.release(one.seq, self.now, remember)
        assert not one.seq.holdings
        one.seq.state = State.FINISHED
        self.live.remove(one)
        self.past = [*self.past[-4:], one.truth[:30]]
        self.settle_moves()

    @rule(data=st.data(), n=st.integers(1, 5))
    def evict(self, data: st.DataObject, n: int) -> None:
        name = data.draw(st.sampled_from([group.name for group in self.groups]), label="group")
        possible = self.ledger.index.evictable(name)
        freed = self.ledger.index.evict(name, n, self.now)
        assert freed == min(n, possible)

    # -- what must hold

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for one in self.live:
            if one.seq.holdings:
                self.kv.verify(one.seq.holdings, one.truth, one.salt, one.seq.computed, one.written)
            else:
                assert one.written == 0

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        for group in self.groups:
            held = {
                block
                for one in self.live
                if one.seq.state is State.RUNNING and group.name in one.seq.holdings
                for block in one.seq.holdings[group.name].blocks
                if block >= 0
            }
            assert self.ledger.free(group.name) == self.ledger.total(group.name) - len(held)

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for one in self.live:
            self.ledger.release(one.seq, self.now, remember=True)
        self.ledger.check()
        self.ledger.index.clear()
        self.ledger.check()
        stats = self.ledger.stats()
        assert stats["used_blocks"] == stats["idle_blocks"] == stats["holders"] == 0
        for group in self.groups:
            assert self.ledger.host.free(group.name) == self.ledger.host.total(group.name)


LedgerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSharingCopyingEvictingAndSwappingNeverMixTokensUp = LedgerMachine.TestCase
