"""The vocabulary as the engine sees it: id -> bytes, and which ids are control tokens.

The engine knows no text. Stop strings and grammars work on the bytes that a token stands for, so a token that is half
of a character is as good as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from millstream.core.errors import BadRequest


class Vocabulary:
    """Id -> bytes, computed when first asked for.

    `lookup(id)` returns the bytes of one id in 0..size-1; it is called at most once an id. A vocabulary of 262,144
    tokens therefore costs nothing at start-up. `cut` is how the model's tokenizer cuts a text that follows other text.
    """

    __slots__ = ("_bytes", "_cut", "_ids", "_longest", "_lookup", "size", "special_ids")

    def __init__(
        self,
        size: int,
        lookup: Callable[[int], bytes],
        special_ids: Iterable[int] = (),
        cut: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.size = size
        self.special_ids = frozenset(special_ids)
        self._lookup = lookup
        self._bytes: list[bytes | None] | None = None
        self._cut = cut
        self._ids: dict[bytes, int] | None = None
        self._longest = 0

    @classmethod
    def from_bytes(cls, tokens: Iterable[bytes], special_ids: Iterable[int] = ()) -> Vocabulary:
        """A vocabulary whose bytes are all at hand."""
        table = list(tokens)
        return cls(len(table), table.__getitem__, special_ids)

    def __len__(self) -> int:
        return self.size

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; for a control token, those of its spelling. Raises BadRequest out of range."""
        if not 0 <= token_id < self.size:
            raise BadRequest("token id", token_id, f"0 to {self.size - 1}")
        table = self._bytes
        if table is None:
            table = self._bytes = [None] * self.size
        found = table[token_id]
        if found is None:
            found = table[token_id] = self._lookup(token_id)
        return found

    __getitem__ = token_bytes

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def all_bytes(self) -> list[bytes]:
        """The bytes of every id in order (about 0.3 s for 262,144 tokens the first time)."""
        return [self.token_bytes(token_id) for token_id in range(self.size)]

    def cut(self, text: str) -> list[int]:
        """Tokens, none of them a control token, whose bytes are those of a text that goes on after others.

        By the model's own tokenizer where it is known, else the longest token at each place; the tokens end before a
        byte that no token begins with.
        """
        if self._cut is not None:
            return self._cut(text)
        if self._ids is None:
            table = self.all_bytes()
            # Of equal tokens the first counts.
            self._ids = {table[i]: i for i in range(self.size - 1, -1, -1) if i not in self.special_ids and table[i]}
            self._longest = max(map(len, self._ids), default=0)
        data, at, found = text.encode("utf-8", "surrogatepass"), 0, list[int]()
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                token = self._ids.get(data[at : at + length])
                if token is not None:
                    found.append(token)
                    at += length
                    break
            else:
                break
        return found
