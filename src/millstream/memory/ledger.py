"""Who holds which block: every sequence's block tables, shared by reference and copied before they are written.

The scheduler asks (`room`, `match`, `free`) and tells (`attach`, `grow`, `settle`, `release`, ...); the ledger keeps
`seq.holdings` true and queues the Moves that the next plan must carry. It copies no bytes and reads no clock. Paper:
PagedAttention (Kwon et al., 2023), with a prefix index under it.

What makes it safe:
- A block is written only while one sequence alone refers to it; `grow` copies it first where that is not so.
- Plans run in launch order and moves before extends, so a block given up now may be handed out again at once: whatever
  still reads it, a plan in flight or a move queued earlier, runs before its next writer.
- `seq.computed` bounds what is shared: slots that a plan in flight still writes are never given to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from millstream.core import registry
from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import ConfigError
from millstream.core.plan import NO_BLOCK, Holding, Move, Tier
from millstream.core.sequence import Sequence
from millstream.memory.blocks import BlockFault, BlockPool, OutOfBlocks
from millstream.memory.protocol import PrefixIndex, TierStore

# To look up a member of an enum takes longer than to compare with it.
_DEVICE = Tier.DEVICE
_RECURRENT = Keep.RECURRENT
_WINDOW = Keep.WINDOW


@dataclass(slots=True)
class _Held:
    """What the ledger knows of a sequence that holds something, beside its holdings.

    `place` and `tried` say where the prefix index knows it and up to how many full blocks an insert was tried.
    `dropped` counts, by group, the blocks given up behind a window. `reserved` tokens stay claimed by a rollback.
    """

    seq: Sequence
    dropped: dict[str, int]
    place: object = None
    tried: int = 0
    reserved: int = 0
    contiguous: bool = False
    swapped: bool = False


class Ledger:
    """The block tables of one engine.

    `num_blocks` gives the device blocks of each group, `host` the slots of the host tier (none when absent). `key`
    is the part of the cache key that all sequences have in common: model and KV format. `prefix` is an index as
    `registry.make("prefix", ...)` gives it; the ledger binds it to its pools. Raises ConfigError on sizes that are
    not positive or groups without blocks.

    A block table may be longer than its holding's `length` needs (blocks claimed ahead). Misuse raises BlockFault.
    """

    def __init__(
        self,
        groups: Seq[CacheGroup],
        block_size: int,
        num_blocks: Mapping[str, int],
        prefix: PrefixIndex,
        host: Mapping[str, int] | None = None,
        key: Hashable = (),
    ) -> None:
        names = [group.name for group in groups]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"cache groups need different names, and at least one; got {names}")
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}, allowed are integers from 1")
        for group in groups:
            if num_blocks.get(group.name, 0) < 1:
                raise ConfigError(f"cache group {group.name!r} has {num_blocks.get(group.name, 0)} blocks, at least 1")
            if group.keep is _WINDOW and (group.window is None or group.window < 1):
                raise ConfigError(f"cache group {group.name!r} has window {group.window}, allowed are integers from 1")
        self.block_size = block_size
        self.groups = tuple(groups)
        self.index = prefix
        self.host: TierStore = registry.make("tier", "host", slots=dict(host or {}))
        self._key = key
        self._pools = {group.name: BlockPool(num_blocks[group.name]) for group in groups}
        self._windows = tuple(
            (group.name, group.window) for group in groups if group.keep is _WINDOW and group.window is not None
        )
        self._recurrent = any(group.keep is _RECURRENT for group in groups)
        self._held: dict[int, _Held] = {}
        self._moves: list[Move] = []
        self._stats: Counter[str] = Counter()
        prefix.bind(self._pools, self.groups, block_size)

    # -- reading

    def free(self, group: str | None = None) -> int:
        """Device blocks that are free or could be by evicting prefixes; the smallest such number over the groups."""
        if group is None:
            return min(self.free(name) for name in self._pools)
        return self._pools[group].num_free + self.index.evictable(group)

    def total(self, group: str | None = None) -> int:
        if group is None:
            return min(pool.num_blocks for pool in self._pools.values())
        return self._pools[group].num_blocks

    def room(self, seq: Sequence, n: int) -> int:
        """How many of the next `n` tokens, from `seq.next_start` on, could get slots now in every group."""
        if self._owns_slots(seq, n):
            return n
        start = seq.next_start
        if self._is_swapped(seq):
            return 0
        for group in self.groups:
            if n <= 0:
                return 0
            table = self._table(seq, group.name)
            left = self.free(group.name)
            pool = self._pools[group.name]
            for i in self._written(group, start, start + n, len(table)):
                if pool.references(table[i]) > 1:
                    if left == 0:
                        n = max(0, min(n, i * self.block_size - start)) if group.keep is not _RECURRENT else 0
                        break
                    left -= 1
            if group.keep is _RECURRENT:
                n = n if table or left else 0
            else:
                n = min(n, (len(table) + left) * self.block_size - start)
        return max(0, n)

    def blocks_needed(self, seq: Sequence, n: int) -> int:
        """Blocks that `n` more tokens would take in the group that takes the most, copies of shared ones included."""
        if self._owns_slots(seq, n):
            return 0
        return max(new + len(shared) for new, shared in (self._wanted(group, seq, n) for group in self.groups))

    def match(self, seq: Sequence, now: float) -> int:
        """Length of the prefix hit that `attach` would find: at most known - 1, so that one token is computed."""
        limit = min(seq.known - 1, len(seq.tokens))
        return self.index.match(self._cache_key(seq), seq.tokens, now, limit).length if limit > 0 else 0

    def holds(self, seq: Sequence) -> bool:
        """Whether it holds blocks in any tier."""
        return seq.id in self._held

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now (`used_blocks`, `idle_blocks`: summed over the groups)."""
        counters = (
            "prefix_query_tokens",
            "prefix_hit_tokens",
            "evicted_blocks",
            "copied_blocks",
            "deduplicated_blocks",
            "distrusted_blocks",
            "swapped_out_blocks",
            "swapped_in_blocks",
        )
        found = {name: self._stats[name] for name in counters}
        idle = sum(self.index.evictable(name) for name in self._pools)
        free = sum(pool.num_free for pool in self._pools.values())
        found["idle_blocks"] = idle
        found["used_blocks"] = sum(pool.num_blocks for pool in self._pools.values()) - free - idle
        found["holders"] = len(self._held)
        return found

    # -- changing

    def attach(self, seq: Sequence, now: float, limit: int | None = None) -> int:
        """Gives a sequence that holds nothing its prefix hit of at most `limit` tokens; returns how many it holds now.

        Whole blocks are shared; a last one used in part is copied, and where there is no block for that the hit is
        cut. The caller sets `seq.computed`.
        """
        self._fresh(seq)
        most = min(seq.known - 1, len(seq.tokens))
        limit = most if limit is None else min(limit, most)
        if limit <= 0:
            return 0
        self._stats["prefix_query_tokens"] += limit
        key = self._cache_key(seq)
        while limit > 0:
            hit = self.index.match(key, seq.tokens, now, limit)
            if hit.length == 0:
                return 0
            for name, blocks in hit.blocks.items():
                for block in blocks:
                    if block != NO_BLOCK:
                        self._pools[name].share(block)
            partly = hit.length % self.block_size > 0
            if not partly or all(self.free(name) for name in self._pools):
                break
            for name, blocks in hit.blocks.items():
                self._let_go(name, blocks)
            limit = hit.length - hit.length % self.block_size
        else:
            return 0
        place = self.index.enter(key, seq.tokens, hit.length, now).place
        dropped: dict[str, int] = {}
        for name, blocks in hit.blocks.items():
            dropped[name] = _leading_holes(blocks)
            table = (*blocks[:-1], self._copy(name, blocks[-1], now)) if partly else blocks
            seq.holdings[name] = Holding(name, table, hit.length)
        full = hit.length // self.block_size
        self._held[seq.id] = _Held(seq, dropped, place, full)
        self._stats["prefix_hit_tokens"] += hit.length
        return hit.length

    def grow(self, seq: Sequence, n: int, now: float) -> None:
        """Slots for the next `n` tokens from `seq.next_start` on. O(1) while they fit the blocks that it has.

        Shared blocks that will be written are copied; prefixes are evicted as needed. Raises OutOfBlocks, and changes
        no holding, when `room` said that there is less.
        """
        if n <= 0:
            return
        start, stop = seq.next_start, seq.next_start + n
        if self._owns_slots(seq, n):
            for one, own in seq.holdings.items():
                if stop > own.length:
                    seq.holdings[one] = Holding(one, own.blocks, stop)
            return
        if self._is_swapped(seq):
            raise BlockFault(f"sequence {seq.id} grows, but it is swapped out")
        wants = [self._wanted(group, seq, n) for group in self.groups]
        for group, (new, shared) in zip(self.groups, wants, strict=True):
            if (new or shared) and new + len(shared) > self.free(group.name):
                raise OutOfBlocks(
                    f"sequence {seq.id} needs {new + len(shared)} blocks of {group.name!r} for tokens {start} to "
                    f"{stop - 1}; {self.free(group.name)} of {self.total(group.name)} can be had"
                )
        if seq.id not in self._held:
            self._held[seq.id] = _Held(seq, dict.fromkeys(self._pools, 0))
        for group, (new, shared) in zip(self.groups, wants, strict=True):
            name = group.name
            holding = seq.holdings.get(name)
            if holding is None:
                seq.holdings[name] = Holding(name, self._take(name, new, now), stop)
                continue
            if not new and not shared:
                if stop > holding.length:
                    seq.holdings[name] = Holding(name, holding.blocks, stop)
                continue
            table = list(holding.blocks)
            for i in shared:
                table[i] = self._copy(name, table[i], now)
            table.extend(self._take(name, new, now))
            seq.holdings[name] = Holding(name, tuple(table), max(stop, holding.length))

    def reserve(self, seq: Sequence, num_tokens: int, now: float, contiguous: bool = False) -> bool:
        """Claims blocks for up to `num_tokens` tokens in all; False, and no change to holdings, when there are fewer.

        A shared block that these tokens will be written into is copied at once, so that `grow` up to there needs no
        more; sharing it anew (a fork) makes that one copy necessary again.
        With `contiguous` (for a sequence that holds nothing) each group's blocks are one run of ascending ids, for
        which every idle prefix may be evicted; such a sequence keeps its very blocks and enters the prefix index only
        when it is released.
        """
        if self._is_swapped(seq):
            raise BlockFault(f"sequence {seq.id} reserves blocks, but it is swapped out")
        if contiguous:
            self._fresh(seq)
        wants = {group.name: self._wanted(group, seq, num_tokens - seq.next_start) for group in self.groups}
        if any(new + len(shared) > self.free(name) for name, (new, shared) in wants.items()):
            return False
        got: dict[str, tuple[int, ...]] = {}
        for name, (new, _) in wants.items():
            if not contiguous:
                got[name] = self._take(name, new, now)
                continue
            run = self._pools[name].take_run(new)
            if run is None:
                self._evict(name, self.index.evictable(name), now)
                run = self._pools[name].take_run(new)
            if run is None:
                for taken, blocks in got.items():
                    self._let_go(taken, blocks)
                return False
            got[name] = run
        held = self._held.setdefault(seq.id, _Held(seq, dict.fromkeys(self._pools, 0)))
        held.reserved = max(held.reserved, num_tokens)
        held.contiguous = held.contiguous or contiguous
        for name, (new, shared) in wants.items():
            holding = seq.holdings.get(name)
            if holding is None:
                seq.holdings[name] = Holding(name, got[name], 0)
            elif new or shared:
                table = list(holding.blocks)
                for i in shared:
                    table[i] = self._copy(name, table[i], now)
                seq.holdings[name] = Holding(name, (*table, *got[name]), holding.length)
        return True

    def has_run(self, num_tokens: int) -> bool:
        """Whether each group has free blocks in a row for `num_tokens` tokens, without evicting anything."""
        return all(
            self._pools[group.name].find_run(self._num_blocks(group, num_tokens)) is not None for group in self.groups
        )

    def settle(self, seq: Sequence, now: float) -> None:
        """After `seq.computed` advanced: remembers its new full blocks, gives up those behind the windows.

        Where the index knows the same tokens already, the sequence changes over to the index's blocks. Of one that is
        computed anew because it was not finite (`cold`) nothing is remembered. One token more
        than the next query needs is kept, so that the last computed token can be computed anew (a fork does that).
        """
        held = self._held.get(seq.id)
        if held is None or held.swapped:
            return
        full = min(seq.computed, len(seq.tokens)) // self.block_size
        if full > held.tried and not held.contiguous and not seq.cold:
            held.tried = full
            tables = {name: holding.blocks for name, holding in seq.holdings.items()}
            done = self.index.insert(self._cache_key(seq), seq.tokens, full * self.block_size, tables, now, held.place)
            held.place = done.place
            if done.known:
                self._change_over(seq, done.known)
        for name, window in self._windows:
            keep_from = max(0, seq.computed - window) // self.block_size
            first = held.dropped[name]
            if keep_from <= first:
                continue
            holding = seq.holdings[name]
            self._let_go(name, holding.blocks[first:keep_from])
            blocks = (NO_BLOCK,) * keep_from + holding.blocks[keep_from:]
            seq.holdings[name] = Holding(name, blocks, holding.length)
            held.dropped[name] = keep_from

    def distrust(self, seq: Sequence) -> None:
        """What the index holds under its key is given to nobody any more: it may be what damaged this sequence."""
        self._stats["distrusted_blocks"] += self.index.forget(self._cache_key(seq))

    def fork(self, parent: Sequence, child: Sequence, length: int) -> None:
        """The child, which holds nothing, shares the first `length` tokens (at most `parent.computed`) of the parent.

        Whichever of the two writes first into a block that both hold copies it. The caller sets `child.computed`.
        Raises BlockFault where the parent gave up what the child would need (behind a window).
        """
        self._fresh(child)
        self.permute([(child, parent, length)])

    def adopt(self, seq: Sequence, source: Sequence, length: int) -> None:
        """`seq` gives up what it holds and shares the first `length` tokens of `source`."""
        self.permute([(seq, source, length)])

    def permute(self, assign: Seq[tuple[Sequence, Sequence, int]]) -> None:
        """Each (seq, source, length): `seq` gives up what it holds and shares the source's first `length` tokens.

        All at once: sources are read as they were before, so that the beams of a group may change places freely. A
        `seq` may hold nothing or be swapped out, and may be its own source. Blocks claimed ahead are given up.
        """
        if len({seq.id for seq, _, _ in assign}) != len(assign):
            raise BlockFault("a sequence is given two sources at once")
        for _, source, length in assign:
            self._shareable(source, length)
        fresh: list[tuple[Sequence, dict[str, Holding], _Held]] = []
        for seq, source, length in assign:
            held = self._held.get(source.id)
            if held is None or length == 0:
                fresh.append((seq, {}, _Held(seq, {})))
                continue
            holdings: dict[str, Holding] = {}
            for group in self.groups:
                blocks = self._table(source, group.name)[: self._num_blocks(group, length)]
                for block in blocks[held.dropped[group.name] :]:
                    self._pools[group.name].share(block)
                holdings[group.name] = Holding(group.name, blocks, length)
            full = length // self.block_size
            place = self.index.above(held.place, full)
            fresh.append((seq, holdings, _Held(seq, dict(held.dropped), place, min(held.tried, full))))
        for seq, _, _ in fresh:
            self._give_up(seq)
        for seq, holdings, held in fresh:
            seq.holdings = holdings
            if holdings:
                self._held[seq.id] = held

    def rollback(self, seq: Sequence, length: int) -> None:
        """Forgets the slots beyond `length` tokens and gives up the blocks that only they needed.

        Blocks that were reserved stay, those that others share by now excepted. The caller sets `seq.computed` when it
        was beyond. Raises BlockFault where what a window needs at `length` was given up.
        """
        held = self._held.get(seq.id)
        if held is None:
            return
        current = max((holding.length for holding in seq.holdings.values()), default=0)
        if length >= current:
            return
        if length == 0 and held.swapped:
            seq.holdings = {name: Holding(name, (), 0, Tier.HOST) for name in self._pools}
            held.dropped = dict.fromkeys(self._pools, 0)
            return
        if length == 0 and (not held.reserved or any(held.dropped.values())):
            self._give_up(seq)
            return
        self._reaches(seq, held, length)
        for group in self.groups:
            name = group.name
            holding = seq.holdings[name]
            keep = self._num_blocks(group, max(length, held.reserved))
            if held.swapped:
                # The slots beyond are freed with the rest when it comes back.
                seq.holdings[name] = Holding(name, holding.blocks, length, Tier.HOST)
                continue
            need = max(self._num_blocks(group, length), held.dropped[name])
            pool = self._pools[name]
            # Of what was reserved only unshared blocks can stay: to hold a shared one without those before it would
            # lock the middle of a prefix whose beginning may be evicted.
            spare = tuple(block for block in holding.blocks[need:keep] if pool.references(block) == 1)
            kept = set(spare)
            self._let_go(name, [block for block in holding.blocks[need:] if block not in kept])
            seq.holdings[name] = Holding(name, holding.blocks[:need] + spare, length)
        full = length // self.block_size
        held.place = self.index.above(held.place, full)
        held.tried = min(held.tried, full)

    def release(self, seq: Sequence, now: float, remember: bool) -> None:
        """Gives everything up, in whatever tier. With `remember` the prefix index gets the computed tokens first,
        a partly filled last block included. Nothing happens to a sequence that holds nothing."""
        held = self._held.get(seq.id)
        if held is None:
            return
        if remember and not held.swapped:
            length = min(seq.computed, len(seq.tokens))
            tables = {name: holding.blocks for name, holding in seq.holdings.items()}
            self.index.insert(self._cache_key(seq), seq.tokens, length, tables, now, held.place)
        self._give_up(seq)

    def swap_out(self, seq: Sequence, now: float) -> bool:
        """Copies all that it holds to the host tier and gives up its device blocks; False when there is no room."""
        held = self._held.get(seq.id)
        if held is None or held.swapped:
            raise BlockFault(f"sequence {seq.id} is swapped out, but it holds nothing on the device")
        tables = {
            group.name: seq.holdings[group.name].blocks[: self._num_blocks(group, seq.holdings[group.name].length)]
            for group in self.groups
        }
        slots = self.host.push(seq.id, {name: len(table) - held.dropped[name] for name, table in tables.items()})
        if slots is None:
            return False
        for name, table in tables.items():
            first = held.dropped[name]
            for source, target in zip(table[first:], slots[name], strict=True):
                self._moves.append(Move(name, source, target, _DEVICE, Tier.HOST))
            holding = seq.holdings[name]
            self._let_go(name, holding.blocks)
            seq.holdings[name] = Holding(name, table[:first] + tuple(slots[name]), holding.length, Tier.HOST)
            self._stats["swapped_out_blocks"] += len(table) - first
        self._held[seq.id] = _Held(seq, held.dropped, swapped=True)
        return True

    def swap_in_room(self, seq: Sequence) -> bool:
        """Whether `swap_in` would find the device blocks that it needs."""
        held = self._held.get(seq.id)
        if held is None or not held.swapped:
            return False
        return all(
            len(self._swapped_table(group, seq)) - held.dropped[group.name] <= self.free(group.name)
            for group in self.groups
        )

    def swap_in(self, seq: Sequence, now: float) -> None:
        """Brings it back to the device. Raises OutOfBlocks, and changes no holding, when there is no room."""
        held = self._held.get(seq.id)
        if held is None or not held.swapped:
            raise BlockFault(f"sequence {seq.id} is swapped in, but it is not swapped out")
        if not self.swap_in_room(seq):
            raise OutOfBlocks(f"sequence {seq.id} is swapped in, but its blocks do not fit")
        for group in self.groups:
            name = group.name
            table = self._swapped_table(group, seq)
            first = held.dropped[name]
            blocks = self._take(name, len(table) - first, now)
            for source, target in zip(table[first:], blocks, strict=True):
                self._moves.append(Move(name, source, target, Tier.HOST, _DEVICE))
            seq.holdings[name] = Holding(name, table[:first] + blocks, seq.holdings[name].length)
            self._stats["swapped_in_blocks"] += len(blocks)
        self.host.pull(seq.id)
        held.swapped = False

    def drain_moves(self) -> tuple[Move, ...]:
        """The moves since the last drain, in the order in which they must run, before the next plan's forward pass."""
        moves = tuple(self._moves)
        self._moves.clear()
        return moves

    # -- checking

    def check(self) -> None:
        """Raises AssertionError when references, holdings, pools, index and host slots contradict each other."""
        held_by: dict[str, Counter[int]] = {name: Counter() for name in self._pools}
        for seq_id, held in self._held.items():
            seq = held.seq
            assert seq.id == seq_id and set(seq.holdings) == set(self._pools), f"sequence {seq_id} lacks a group"
            assert len({holding.length for holding in seq.holdings.values()}) == 1, "groups disagree on the length"
            assert self.host.holds(seq_id) is held.swapped
            for group in self.groups:
                holding = seq.holdings[group.name]
                assert holding.tier is (Tier.HOST if held.swapped else _DEVICE)
                assert len(holding.blocks) >= self._num_blocks(group, holding.length), "tokens without a slot"
                first = held.dropped[group.name]
                assert first == _leading_holes(holding.blocks), "the holes of a window are miscounted"
                assert NO_BLOCK not in holding.blocks[first:], "a hole that is not behind the window"
                if not held.swapped:
                    held_by[group.name].update(holding.blocks[first:])
        for name, pool in self._pools.items():
            pool.check()
            for block in range(pool.num_blocks):
                holders = held_by[name][block] + pool.is_remembered(block)
                assert pool.references(block) == holders, (
                    f"block {block} of {name} has {pool.references(block)} references and {holders} holders"
                )
        self.index.check()
        self.host.check()

    # -- parts

    def _cache_key(self, seq: Sequence) -> Hashable:
        return (self._key, seq.request.adapter, seq.request.cache_salt)

    def _num_blocks(self, group: CacheGroup, num_tokens: int) -> int:
        if group.keep is _RECURRENT:
            return min(1, num_tokens)
        return -(-num_tokens // self.block_size)

    def _table(self, seq: Sequence, name: str) -> tuple[int, ...]:
        holding = seq.holdings.get(name)
        return () if holding is None else holding.blocks

    def _swapped_table(self, group: CacheGroup, seq: Sequence) -> tuple[int, ...]:
        holding = seq.holdings[group.name]
        return holding.blocks[: self._num_blocks(group, holding.length)]

    def _written(self, group: CacheGroup, start: int, stop: int, num_held: int) -> range:
        """Which of the blocks held already would be written by tokens `start` to `stop` - 1."""
        if group.keep is _RECURRENT:
            return range(min(1, num_held))
        return range(start // self.block_size, min(num_held, -(-stop // self.block_size)))

    def _owns_slots(self, seq: Sequence, n: int) -> bool:
        """Whether the next `n` tokens fall into one block of each group, which it holds on the device and alone.

        So it is with nearly every token of an output, for which nothing else is worked out.
        """
        start = seq.computed + seq.in_flight
        place = start // self.block_size
        if n <= 0 or (start + n - 1) // self.block_size != place or not seq.holdings or self._recurrent:
            return False
        for name, holding in seq.holdings.items():
            if holding.tier is not _DEVICE or place >= len(holding.blocks):
                return False
            if not self._pools[name].is_single(holding.blocks[place]):
                return False
        return True

    def _wanted(self, group: CacheGroup, seq: Sequence, n: int) -> tuple[int, list[int]]:
        """How many new blocks `n` more tokens take, and which of the table must be copied first."""
        if n <= 0:
            return 0, []
        start = seq.next_start
        table = self._table(seq, group.name)
        pool = self._pools[group.name]
        shared = [i for i in self._written(group, start, start + n, len(table)) if pool.references(table[i]) > 1]
        return max(0, self._num_blocks(group, start + n) - len(table)), shared

    def _take(self, name: str, count: int, now: float) -> tuple[int, ...]:
        if count <= 0:
            return ()
        pool = self._pools[name]
        if pool.num_free < count:
            self._evict(name, count - pool.num_free, now)
        return pool.take_some(count)

    def _evict(self, name: str, count: int, now: float) -> None:
        self._stats["evicted_blocks"] += self.index.evict(name, count, now)

    def _copy(self, name: str, source: int, now: float) -> int:
        """A block of its own for the caller in place of `source`, which it gives up."""
        (target,) = self._take(name, 1, now)
        self._moves.append(Move(name, source, target))
        self._pools[name].release(source)
        self._stats["copied_blocks"] += 1
        return target

    def _change_over(self, seq: Sequence, known: tuple[tuple[str, int, int], ...]) -> None:
        tables: dict[str, list[int]] = {}
        for name, i, block in known:
            table = tables.setdefault(name, list(seq.holdings[name].blocks))
            self._pools[name].share(block)
            self._pools[name].release(table[i])
            table[i] = block
        for name, table in tables.items():
            seq.holdings[name] = Holding(name, tuple(table), seq.holdings[name].length)
        self._stats["deduplicated_blocks"] += len(known)

    def _let_go(self, name: str, blocks: Seq[int]) -> None:
        pool = self._pools[name]
        # From the end, so that low ids and the beginnings of prefixes are handed out and evicted last.
        for block in reversed(blocks):
            if block != NO_BLOCK:
                pool.release(block)

    def _give_up(self, seq: Sequence) -> None:
        held = self._held.pop(seq.id, None)
        if held is None:
            return
        if held.swapped:
            self.host.pull(seq.id)
        else:
            for name, holding in seq.holdings.items():
                self._let_go(name, holding.blocks)
        seq.holdings = {}

    def _is_swapped(self, seq: Sequence) -> bool:
        held = self._held.get(seq.id)
        return held is not None and held.swapped

    def _fresh(self, seq: Sequence) -> None:
        if seq.id in self._held:
            raise BlockFault(f"sequence {seq.id} takes blocks as a fresh one, but it holds some already")

    def _shareable(self, source: Sequence, length: int) -> None:
        held = self._held.get(source.id)
        if length < 0 or length > source.computed:
            raise BlockFault(f"{length} tokens of sequence {source.id} are shared; it has computed {source.computed}")
        if length == 0:
            return
        if held is None or held.swapped:
            raise BlockFault(f"sequence {source.id} shares its blocks, but it holds none on the device")
        self._reaches(source, held, length)

    def _reaches(self, seq: Sequence, held: _Held, length: int) -> None:
        """Raises BlockFault unless it still holds what a token at position `length` reads."""
        for group in self.groups:
            if length == 0:
                continue
            if group.keep is _RECURRENT and length < seq.computed:
                raise BlockFault(
                    f"sequence {seq.id} goes back to {length} tokens, but {group.name!r} keeps only its last"
                )
            first = held.dropped[group.name] * self.block_size
            if group.keep is _WINDOW and first > max(0, length - (group.window or 1) + 1):
                raise BlockFault(
                    f"sequence {seq.id} goes back to {length} tokens, but {group.name!r} keeps only those from {first}"
                )


def _leading_holes(blocks: Seq[int]) -> int:
    for i, block in enumerate(blocks):
        if block != NO_BLOCK:
            return i
    return len(blocks)
