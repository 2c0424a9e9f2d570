"""Which engine was sent which prefix: what a router knows of caches that lie elsewhere.

Prompts are cut into blocks, each named by a hash of itself and all before it. What an engine was sent it is taken to
hold, until so many other blocks came that it has been forgotten here, or the engine is lost. Routers of SGLang and
Preble keep such a tree of what they sent; D2LPM (Locality-aware Fair Scheduling in LLM Serving) its global one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from millstream.core.prefix import names


class PrefixMap:
    """`block` tokens a block, at most `most` blocks an engine, the least recently used forgotten first."""

    def __init__(self, block: int = 64, most: int = 65_536) -> None:
        self.block, self.most = block, most
        self._held: dict[int, OrderedDict[int, None]] = {}  # place -> hashes of blocks

    def chain(self, tokens: Sequence[int], salt: str = "") -> tuple[int, ...]:
        """The names of the whole blocks of a prompt, in order."""
        return names(tokens, self.block, salt)

    def matched(self, chain: Sequence[int], place: int) -> int:
        """How many tokens of a prompt the engine at `place` is taken to hold."""
        held = self._held.get(place)
        count = 0
        if held is not None:
            for name in chain:
                if name not in held:
                    break
                count += 1
        return count * self.block

    def insert(self, chain: Sequence[int], place: int) -> None:
        held = self._held.setdefault(place, OrderedDict())
        # The end first: what is forgotten first is the end of a prompt, never what it begins with.
        for name in reversed(chain):
            held[name] = None
            held.move_to_end(name)
        while len(held) > self.most:
            held.popitem(last=False)

    def lost(self, place: int) -> None:
        self._held.pop(place, None)
