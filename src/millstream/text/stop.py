"""Stop strings, matched over bytes as they come (Aho and Corasick, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Match:
    """A stop string found: which one (`index` in the given list), and where in the stream its bytes lie."""

    stop: str | bytes
    index: int
    start: int
    end: int


class StopMatcher:
    """Watches a byte stream for the first of several stop strings.

    The match that ends first wins; of those that end at the same byte, the longest. After a match the matcher rests: it
    returns that match to every further `push`. Each byte costs amortized constant time, whatever the number of strings.
    """

    __slots__ = ("_fail", "_found", "_goto", "_length", "_state", "matched", "seen", "stops")

    def __init__(self, stop: Sequence[str | bytes]) -> None:
        """Raises BadRequest for an empty stop string, or one that is neither str nor bytes."""
        if isinstance(stop, str | bytes):
            stop = [stop]
        self.stops = tuple(stop)
        self._goto: list[dict[int, int]] = [{}]
        # Of each state: the index of the longest stop string that ends there (-1: none), and the state's depth.
        self._found = [-1]
        self._length = [0]
        for index, item in enumerate(self.stops):
            self._add(index, item)
        self._fail = self._links()
        self._state = 0
        self.seen = 0
        self.matched: Match | None = None

    @property
    def held(self) -> int:
        """How many of the last bytes could still be the beginning of a stop string."""
        return 0 if self.matched else self._length[self._state]

    @property
    def safe_bytes(self) -> int:
        """How many bytes from the start of the stream are certainly before any stop string."""
        return self.matched.start if self.matched else self.seen - self.held

    def push(self, data: bytes) -> Match | None:
        """Takes the next bytes. Returns the match as soon as there is one; bytes after it are not looked at."""
        if self.matched is not None:
            return self.matched
        goto, fail, found, state = self._goto, self._fail, self._found, self._state
        for at, byte in enumerate(data):
            while state and byte not in goto[state]:
                state = fail[state]
            state = goto[state].get(byte, 0)
            index = found[state]
            if index >= 0:
                self._state = state
                self.seen += at + 1
                stop = self.stops[index]
                self.matched = Match(stop, index, self.seen - len(_as_bytes(stop)), self.seen)
                return self.matched
        self._state = state
        self.seen += len(data)
        return None

    def _add(self, index: int, item: str | bytes) -> None:
        state = 0
        for byte in _as_bytes(item):
            following = self._goto[state].get(byte)
            if following is None:
                following = self._goto[state][byte] = len(self._goto)
                self._goto.append({})
                self._found.append(-1)
                self._length.append(self._length[state] + 1)
            state = following
        if self._found[state] < 0:
            self._found[state] = index

    def _links(self) -> list[int]:
        fail = [0] * len(self._goto)
        queue = deque(self._goto[0].values())
        while queue:
            state = queue.popleft()
            for byte, following in self._goto[state].items():
                back = fail[state]
                while back and byte not in self._goto[back]:
                    back = fail[back]
                fail[following] = self._goto[back].get(byte, 0)
                # The string that ends here is longer than any that ends at the link, so the link only fills a gap.
                if self._found[following] < 0:
                    self._found[following] = self._found[fail[following]]
                queue.append(following)
        return fail


def _as_bytes(item: str | bytes) -> bytes:
    if isinstance(item, str):
        try:
            data = item.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest("stop", item, "valid Unicode (it holds a lone surrogate)") from None
    elif isinstance(item, bytes):
        data = item
    else:
        raise BadRequest("stop", item, "strings or bytes")
    if not data:
        raise BadRequest("stop", item, "strings of at least one character")
    return data
