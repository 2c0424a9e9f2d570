"""Ids -> text, piece by piece, never cutting a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from millstream.core.errors import BadRequest
from millstream.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from millstream.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class TokenBytesStream:
    """Ids -> bytes: control tokens left out (`skip_special`, save those `shown`), and a SentencePiece text's artificial
    first space too."""

    __slots__ = ("_skipped", "_source", "_strip", "_vocabulary")

    def __init__(
        self,
        source: Tokenizer | Vocabulary,
        skip_special: bool = True,
        *,
        continuation: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        if isinstance(source, Vocabulary):
            self._vocabulary = source
            self._source: Tokenizer | None = None
        else:
            self._vocabulary = source.vocabulary
            self._source = source
        self._skipped = self._vocabulary.special_ids - shown if skip_special else frozenset()
        self._strip = self._source is not None and self._source.strip_prefix and not continuation

    def push(self, token_id: int) -> bytes:
        """The bytes that one more id adds. Raises BadRequest for an id that does not exist."""
        if token_id in self._skipped:
            return b""
        data = self._vocabulary.token_bytes(token_id)
        if self._strip:
            self._strip = False
            # A space written as a byte token is one the text really had.
            if data[:1] == b" " and self._source is not None and not self._source.is_byte_token(token_id):
                return data[1:]
        return data


class Detokenizer:
    """Incremental decoding of one sequence.

    The pieces of `push` and `finish`, joined, equal the decoding of all ids at once, however the ids are cut. A
    character whose bytes have not all come is held back; bytes that can no longer become a character turn into
    U+FFFD.
    """

    __slots__ = ("_bytes", "_decoder")

    def __init__(
        self, source: Tokenizer | Vocabulary, skip_special: bool = True, *, continuation: bool = False
    ) -> None:
        self._bytes = TokenBytesStream(source, skip_special, continuation=continuation)
        self._decoder = _UTF8("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The new text that is complete after these ids. Raises BadRequest for an id that does not exist."""
        push = self._bytes.push
        try:
            data = b"".join([push(token_id) for token_id in ids])
        except TypeError:
            raise BadRequest("ids", ids, "a sequence of int") from None
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", True)
