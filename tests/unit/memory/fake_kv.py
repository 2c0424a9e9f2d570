"""A KV cache made of hashes: it proves that what the ledger says a sequence holds is what was computed for it."""

from __future__ import annotations

from collections.abc import Iterable

from millstream.core.cache import CacheGroup, Keep
from millstream.core.plan import NO_BLOCK, Holding, Move, Tier
from millstream.core.registry import Choice
from millstream.core.request import Request, Tokens
from millstream.core.sequence import Sequence, Stamps

FULL = CacheGroup("full")


def window(size: int, name: str = "window") -> CacheGroup:
    return CacheGroup(name, Keep.WINDOW, size)


def sequence(seq_id: int, tokens: Iterable[int], salt: str = "", adapter: str = "") -> Sequence:
    ids = list(tokens)
    request = Request(seq_id, (Tokens(tuple(ids)),), cache_salt=salt, adapter=adapter)
    return Sequence(
        id=seq_id,
        request=request,
        index=0,
        tokens=ids,
        num_prompt=len(ids),
        max_len=10**6,
        seed=0,
        stop_ids=frozenset(),
        decode=Choice("autoregressive"),
        method=None,
        stamps=Stamps(0.0),
    )


class FakeKv:
    """Memory by (tier, group, block): what was last written at each offset, as (position, hash of the whole prefix)."""

    def __init__(self, groups: tuple[CacheGroup, ...], block_size: int) -> None:
        self.groups = groups
        self.block_size = block_size
        self.cells: dict[tuple[Tier, str, int], list[tuple[int, int] | None]] = {}

    def move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            source = self.cells.get((move.source_tier, move.group, move.source), [None] * self.block_size)
            self.cells[(move.target_tier, move.group, move.target)] = list(source)

    def compute(self, holdings: dict[str, Holding], tokens: list[int], salt: str, start: int, stop: int) -> None:
        """Writes positions `start` to `stop` - 1, after checking that all that they read is there."""
        self.verify(holdings, tokens, salt, start, start)
        hashes = prefix_hashes(tokens, salt)
        for group in self.groups:
            holding = holdings[group.name]
            assert holding.tier is Tier.DEVICE
            assert holding.length >= stop
            for position in range(start, stop):
                block = holding.blocks[position // self.block_size]
                assert block != NO_BLOCK
                cells = self.cells.setdefault((Tier.DEVICE, group.name, block), [None] * self.block_size)
                cells[position % self.block_size] = (position, hashes[position])

    def verify(self, holdings: dict[str, Holding], tokens: list[int], salt: str, settled: int, stop: int) -> None:
        """Checks that all positions below `stop` that a token at `settled` or later reads hold what `tokens` say."""
        hashes = prefix_hashes(tokens, salt)
        if stop == 0:
            return
        for group in self.groups:
            holding = holdings[group.name]
            first = 0 if group.keep is Keep.FULL else max(0, settled - (group.window or 1) + 1)
            for position in range(first, stop):
                block = holding.blocks[position // self.block_size]
                assert block != NO_BLOCK, f"position {position} of {group.name} is a hole"
                cell = self.cells[(holding.tier, group.name, block)][position % self.block_size]
                assert cell == (position, hashes[position]), f"position {position} of {group.name} is not its own"


def prefix_hashes(tokens: list[int], salt: str) -> list[int]:
    found: list[int] = []
    state = sum(map(ord, salt)) + 1
    for token in tokens:
        state = hash((state, token))
        found.append(state)
    return found
