"""A radix tree over blocks that finds prefixes at the grain of one token.

An edge of the tree is one block's tokens, so a node is one block of every cache group; only a leaf may be filled in
part. A lookup follows whole blocks by their tokens, and where none fits goes on into the child that shares the most of
what is left. Children are sorted by tokens, and that child is always one of the two neighbours of what is sought, so
a node with ten thousand children costs a bisection.

What a sequence holds is never evicted; the references in the pools are the lock. In groups that keep every token nodes
go leaf first; that all idle nodes can go (so that `evictable` is a counter) rests on one rule: a sequence that holds a
node's block holds those of all nodes above it. `insert` keeps the rule: it stops where a sequence computed in a block
of its own, which others share, what the index knows in another block.
In a WINDOW group single blocks may be given up, leaving a hole; a hit then ends where its window is all there.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from millstream.core import registry
from millstream.core.cache import CacheGroup, Keep
from millstream.core.plan import NO_BLOCK, PrefixHit
from millstream.core.registry import Card, Choice
from millstream.memory.blocks import BlockFault, BlockPool
from millstream.memory.protocol import EvictionOrder, Insertion

CARD = Card("radix", "finds every computed prefix again, token by token")


@dataclass(frozen=True, slots=True)
class Config:
    """`evict` is the eviction order: its name, or a Choice where it gets options."""

    evict: Choice | str = "lru"

    def __post_init__(self) -> None:
        if not isinstance(self.evict, Choice | str):
            raise TypeError(
                f"evict is {self.evict!r}, allowed are a name ({', '.join(registry.names('evict'))}) or a Choice"
            )


class _Node:
    """One block of tokens below its parent. `depth` counts blocks from the root, this one included."""

    __slots__ = (
        "blocks",
        "children",
        "dead",
        "depth",
        "hits",
        "last_use",
        "num_partial",
        "order",
        "parent",
        "queued",
        "tokens",
        "tree",
    )

    def __init__(self, tree: Hashable, parent: _Node | None, tokens: tuple[int, ...], blocks: list[int]) -> None:
        self.tree = tree
        self.parent = parent
        self.tokens = tokens
        self.blocks = blocks
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple[int, ...], _Node] = {}
        self.order: list[tuple[int, ...]] = []
        self.num_partial = 0
        self.last_use = 0.0
        self.hits = 0
        self.queued = 0
        self.dead = False


_Entry = tuple[tuple[float, ...], int, int, _Node]


class Radix:
    """The prefix index of one engine.

    A RECURRENT group has no state to go back to in the middle of a sequence (the trunk keeps no snapshots), so with
    such a group nothing is remembered and every match is 0.
    """

    def __init__(self, config: Config) -> None:
        self._eviction: EvictionOrder = registry.make("evict", config.evict)
        self._bound = False
        self._remembers = True
        self._block_size = 1
        self._groups: tuple[CacheGroup, ...] = ()
        self._pools: list[BlockPool] = []
        self._index: dict[str, int] = {}
        self._full: list[int] = []
        self._windows: list[tuple[int, int]] = []
        self._owners: list[dict[int, _Node]] = []
        self._heaps: list[list[_Entry]] = []
        self._roots: dict[Hashable, _Node] = {}
        self._serial = 0
        self._now = 0.0
        self.num_nodes = 0

    def bind(self, pools: Mapping[str, BlockPool], groups: Sequence[CacheGroup], block_size: int) -> None:
        if self._bound:
            raise BlockFault("this prefix index is bound to an engine already")
        self._bound = True
        self._block_size = block_size
        self._groups = tuple(groups)
        self._pools = [pools[group.name] for group in groups]
        self._index = {group.name: g for g, group in enumerate(groups)}
        self._full = [g for g, group in enumerate(groups) if group.keep is Keep.FULL]
        self._windows = [(g, group.window or 1) for g, group in enumerate(groups) if group.keep is Keep.WINDOW]
        self._remembers = not any(group.keep is Keep.RECURRENT for group in groups)
        self._owners = [{} for _ in groups]
        self._heaps = [[] for _ in groups]
        for g, pool in enumerate(self._pools):
            pool.on_idle = self._watch(g)

    # -- reading

    def match(self, key: Hashable, tokens: Sequence[int], now: float, limit: int | None = None) -> PrefixHit:
        """The longest held prefix of the first `limit` tokens, in O(blocks of the prefix).

        With WINDOW groups it may miss the longest: a path whose block was given up is followed all the same, though a
        neighbour that shares a part of that block's tokens would have done.
        """
        self._now = now
        stop = len(tokens) if limit is None else min(limit, len(tokens))
        path = self._walk(key, tokens, stop)
        size = self._block_size
        best, depth = 0, 0
        starts = [0] * len(self._groups)
        for i, (node, common) in enumerate(path):
            length = i * size + common
            fits = True
            for g, window in self._windows:
                if node.blocks[g] == NO_BLOCK:
                    starts[g] = i + 1
                    fits = False
                elif starts[g] * size > max(0, length - window + 1):
                    fits = False
            if fits:
                best, depth = length, i + 1
        for node, _ in path[:depth]:
            node.last_use = now
        blocks: dict[str, tuple[int, ...]] = {}
        if best:
            for g, group in enumerate(self._groups):
                first = max(0, best - (group.window or 1) + 1) // size if group.keep is Keep.WINDOW else 0
                blocks[group.name] = (NO_BLOCK,) * first + tuple(node.blocks[g] for node, _ in path[first:depth])
        return PrefixHit(best, blocks)

    def enter(self, key: Hashable, tokens: Sequence[int], length: int, now: float) -> Insertion:
        path = self._walk(key, tokens, length)
        for node, _ in path:
            node.last_use = now
            node.hits += 1
        depth = min(length // self._block_size, len(path))
        return Insertion(path[depth - 1][0] if depth else None)

    def above(self, place: object, num_blocks: int) -> object:
        node = place
        while isinstance(node, _Node) and node.depth > num_blocks:
            node = node.parent
        return node if isinstance(node, _Node) and node.depth else None

    def evictable(self, group: str) -> int:
        return self._pools[self._index[group]].idle

    # -- changing

    def insert(
        self,
        key: Hashable,
        tokens: Sequence[int],
        length: int,
        blocks: Mapping[str, Sequence[int]],
        now: float,
        place: object = None,
    ) -> Insertion:
        """See the protocol. O(new blocks) when `place` is given, else O(all blocks)."""
        self._now = now
        if not self._remembers:
            return Insertion(None)
        tables = [blocks[group.name] for group in self._groups]
        if isinstance(place, _Node) and not place.dead:
            node = place
        else:
            root = self._roots.get(key)
            node = _Node(key, None, (), []) if root is None else root
        size = self._block_size
        known: list[tuple[str, int, int]] = []
        for i in range(node.depth, -(-length // size)):
            piece = tuple(tokens[i * size : min((i + 1) * size, length)])
            mine = [table[i] if i < len(table) else NO_BLOCK for table in tables]
            child = node.children.get(piece) if node.children else None
            if child is None:
                if not self._new(mine):
                    break
                if len(piece) < size:
                    near = bisect_left(node.order, piece)
                    if near < len(node.order) and node.order[near][: len(piece)] == piece:
                        node.children[node.order[near]].last_use = now
                        break
                child = self._add(node, piece, mine)
            else:
                if any(
                    child.blocks[g] != mine[g] and mine[g] != NO_BLOCK and self._pools[g].references(mine[g]) > 1
                    for g in self._full
                ):
                    break
                for g, group in enumerate(self._groups):
                    if mine[g] == NO_BLOCK or child.blocks[g] == mine[g]:
                        continue
                    if child.blocks[g] == NO_BLOCK:
                        if not self._pools[g].is_remembered(mine[g]):
                            self._keep(child, g, mine[g])
                    elif len(piece) == size:
                        known.append((group.name, i, child.blocks[g]))
            child.last_use = now
            if len(piece) == size:
                node = child
        # A sequence that gave up everything but its window can leave a path behind that leads to no block.
        if node.depth and not node.children and all(block == NO_BLOCK for block in node.blocks):
            self._remove(node)
        return Insertion(node if node.depth and not node.dead else None, tuple(known))

    def evict(self, group: str, num_blocks: int, now: float) -> int:
        """See the protocol. O(log n) a block, amortized over the uses since its key was last looked at."""
        self._now = now
        g = self._index[group]
        heap, pool = self._heaps[g], self._pools[g]
        leaf_first = g in self._full
        before = pool.num_free
        entry: _Entry | None = None  # comes into the heap next: the node above one that went, mostly the next to go
        while pool.num_free - before < num_blocks and (heap or entry is not None):
            least = heapq.heappop(heap) if entry is None else heapq.heappushpop(heap, entry)
            looked_at, entry = least is entry, None
            key, _, _, node = least
            node.queued &= ~(1 << g)
            # What is not ready now is queued again when it becomes idle, or a leaf.
            if not looked_at and not self._ready(node, g):
                continue
            if not looked_at and self._key(node) > key:
                entry = self._entry(node, g)
            elif leaf_first:
                above = self._take_out(node)
                for other in self._full if above is not None else ():
                    if above is not None and other != g and self._ready(above, other):
                        self._queue(above, other)
                if above is not None and self._ready(above, g):
                    entry = self._entry(above, g)
            else:
                self._give_up(node, g)
                if not node.children and all(block == NO_BLOCK for block in node.blocks):
                    self._remove(node)
        if entry is not None:
            heapq.heappush(heap, entry)
        return pool.num_free - before

    def forget(self, key: Hashable) -> int:
        root = self._roots.get(key)
        if root is None:
            return 0
        before = sum(len(owned) for owned in self._owners)
        # From below: a node goes when those that follow it are gone.
        for node in reversed(list(self._below(root))):
            if not node.dead:
                self._remove(node)
        return before - sum(len(owned) for owned in self._owners)

    def clear(self) -> None:
        for group, pool in zip(self._groups, self._pools, strict=True):
            self.evict(group.name, pool.num_blocks, self._now)

    # -- checking

    def check(self) -> None:
        found: list[dict[int, _Node]] = [{} for _ in self._groups]
        count = 0
        for root in self._roots.values():
            assert root.children and not root.dead and root.depth == 0, "an empty tree is kept"
            for node in self._below(root):
                count += 1
                parent = node.parent
                assert parent is not None and not node.dead and parent.children.get(node.tokens) is node
                assert node.depth == parent.depth + 1 and node.order == sorted(node.children)
                assert node.num_partial == sum(len(t) < self._block_size for t in node.children)
                assert 0 < len(node.tokens) <= self._block_size
                assert len(node.tokens) == self._block_size or not node.children, "a partly filled block has children"
                assert node.children or any(block != NO_BLOCK for block in node.blocks), "an empty leaf is kept"
                for g, block in enumerate(node.blocks):
                    if block == NO_BLOCK:
                        assert g not in self._full, "a hole in a group that keeps everything"
                        continue
                    assert block not in found[g], f"block {block} is remembered twice"
                    found[g][block] = node
                    pool = self._pools[g]
                    assert pool.is_remembered(block), f"block {block} is in the tree, but its pool does not know"
                    if self._ready(node, g):
                        assert node.queued >> g & 1, "an evictable block is not queued"
                    if g in self._full and pool.is_idle(block):
                        assert all(pool.is_idle(child.blocks[g]) for child in node.children.values()), (
                            "a block is held, but one above it is not"
                        )
        assert count == self.num_nodes
        assert found == self._owners, "the owners of blocks are out of date"
        for g, pool in enumerate(self._pools):
            remembered = sum(pool.is_remembered(block) for block in range(pool.num_blocks))
            assert remembered == len(found[g]), "a pool has a remembered block that is in no tree"

    # -- the tree

    def _walk(self, key: Hashable, tokens: Sequence[int], stop: int) -> list[tuple[_Node, int]]:
        """Nodes from the top with how many of their tokens are wanted: whole blocks, then at most one in part."""
        path: list[tuple[_Node, int]] = []
        node = self._roots.get(key)
        if node is None:
            return path
        size = self._block_size
        at = 0
        while at < stop:
            piece = tuple(tokens[at : min(at + size, stop)])
            child = node.children.get(piece)
            if child is not None and len(piece) == size:
                path.append((child, size))
                node = child
                at += size
                continue
            near = bisect_left(node.order, piece)
            best: tuple[int, ...] | None = None
            most = 0
            for other in node.order[max(0, near - 1) : near + 1]:
                common = _common(piece, other)
                if common > most:
                    best, most = other, common
            if best is not None:
                path.append((node.children[best], most))
            break
        return path

    def _new(self, blocks: Sequence[int]) -> bool:
        """Whether of each group that keeps all there is a block, which the tree does not have yet."""
        return not any([blocks[g] == NO_BLOCK or self._pools[g].is_remembered(blocks[g]) for g in self._full])

    def _add(self, parent: _Node, tokens: tuple[int, ...], blocks: list[int]) -> _Node:
        if parent.depth == 0:
            self._roots[parent.tree] = parent
        node = _Node(parent.tree, parent, tokens, [NO_BLOCK] * len(self._groups))
        self.num_nodes += 1
        parent.children[tokens] = node
        if parent.order:
            insort(parent.order, tokens)
        else:
            parent.order.append(tokens)
        if len(tokens) < self._block_size:
            parent.num_partial += 1
        for g, block in enumerate(blocks):
            if block != NO_BLOCK and not self._pools[g].is_remembered(block):
                self._keep(node, g, block)
        if parent.num_partial and NO_BLOCK not in node.blocks:
            for cut in range(1, len(tokens)):
                shorter = parent.children.get(tokens[:cut])
                if shorter is not None and all(
                    block == NO_BLOCK or self._pools[g].is_idle(block) for g, block in enumerate(shorter.blocks)
                ):
                    self._remove(shorter)
        return node

    def _keep(self, node: _Node, g: int, block: int) -> None:
        self._pools[g].remember(block)
        node.blocks[g] = block
        self._owners[g][block] = node

    def _give_up(self, node: _Node, g: int) -> None:
        block = node.blocks[g]
        node.blocks[g] = NO_BLOCK
        del self._owners[g][block]
        self._pools[g].forget(block)

    def _remove(self, node: _Node) -> None:
        """Takes a leaf out, and what above it is left without children and blocks."""
        above = self._take_out(node)
        if above is not None:
            for g in self._full:
                if self._ready(above, g):
                    self._queue(above, g)

    def _take_out(self, node: _Node) -> _Node | None:
        """The same; gives the node above that has become a leaf, for which there is no place in a queue yet."""
        while True:
            for g, block in enumerate(node.blocks):
                if block != NO_BLOCK:
                    self._give_up(node, g)
            node.dead = True
            parent = node.parent
            if parent is None:
                del self._roots[node.tree]
                return None
            self.num_nodes -= 1
            if len(node.tokens) < self._block_size:
                parent.num_partial -= 1
            if len(parent.order) > 1:
                del parent.children[node.tokens]
                del parent.order[bisect_left(parent.order, node.tokens)]
                return None
            parent.children.clear()
            parent.order.clear()
            if parent.blocks.count(NO_BLOCK) < len(parent.blocks):
                return parent
            node = parent

    def _below(self, node: _Node) -> Iterator[_Node]:
        stack = list(node.children.values())
        while stack:
            one = stack.pop()
            yield one
            stack.extend(one.children.values())

    # -- the order of eviction

    def _key(self, node: _Node) -> tuple[float, ...]:
        num_tokens = (node.depth - 1) * self._block_size + len(node.tokens)
        return self._eviction.key(node.last_use, num_tokens, node.hits, self._now)

    def _ready(self, node: _Node, g: int) -> bool:
        if (node.children and g in self._full) or node.dead or node.blocks[g] == NO_BLOCK:
            return False
        return self._pools[g].is_idle(node.blocks[g])

    def _entry(self, node: _Node, g: int) -> _Entry | None:
        """What of a node comes into a queue; None where it is in there already."""
        if node.queued >> g & 1:
            return None
        node.queued |= 1 << g
        self._serial += 1
        # Of a path used at once: far behind the window is worth least, and without windows the end goes first.
        tie = -node.depth if g in self._full else node.depth
        return (self._key(node), tie, self._serial, node)

    def _queue(self, node: _Node, g: int) -> None:
        entry = self._entry(node, g)
        if entry is None:
            return
        heap = self._heaps[g]
        heapq.heappush(heap, entry)
        # A node that left through another group is still in this heap; without this, those would pile up.
        if len(heap) > 2 * len(self._owners[g]) + 64:
            heap[:] = [entry for entry in heap if not entry[3].dead]
            heapq.heapify(heap)

    def _watch(self, g: int) -> Callable[[int], None]:
        def on_idle(block: int) -> None:
            node = self._owners[g][block]
            if self._ready(node, g):
                self._queue(node, g)

        return on_idle


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


PLUGIN = Radix
