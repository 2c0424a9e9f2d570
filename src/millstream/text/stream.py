"""The text of one output as it is generated: decoded, held back where a stop string may begin, cut where one is."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from millstream.core.errors import BadRequest
from millstream.text.detokenizer import TokenBytesStream
from millstream.text.stop import Match, StopMatcher
from millstream.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from millstream.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class StreamText:
    """Ids of one output -> text that is safe to show.

    The pieces of `push` and `finish`, joined, are `text`, and equal what decoding all ids and then cutting at the
    first stop string gives. Stop strings are looked for in the bytes of the text, so one may lie across tokens and
    characters. Control tokens are no part of the text, so none completes or breaks a stop string while `skip_special`
    holds.

    `continuation` (the default, for an output follows a prompt) keeps a leading space also where the tokenizer would
    put one before every text. `shown` are control tokens whose spelling is part of the text all the same.
    """

    def __init__(
        self,
        source: Tokenizer | Vocabulary,
        stop: Sequence[str | bytes] = (),
        *,
        skip_special: bool = True,
        include_stop_str_in_output: bool = False,
        continuation: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._stream = TokenBytesStream(source, skip_special, continuation=continuation, shown=shown)
        self._matcher = StopMatcher(stop)
        self._include_stop = include_stop_str_in_output
        self._decoder = _UTF8("replace")
        self._pending = b""
        self._pieces: list[str] = []
        self._finished = False
        self.num_tokens = 0
        """Ids taken, up to and with the one that completed a stop string."""

    @property
    def stopped(self) -> bool:
        return self._matcher.matched is not None

    @property
    def match(self) -> Match | None:
        return self._matcher.matched

    @property
    def stop_reason(self) -> str | bytes | None:
        """The stop string that ended the output."""
        return self._matcher.matched.stop if self._matcher.matched else None

    @property
    def text(self) -> str:
        """All text that was given out so far; the whole of it after a stop or `finish`."""
        return "".join(self._pieces)

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids. After a stop (or `finish`) further ids are ignored."""
        if self.stopped or self._finished:
            return ""
        out = ""
        try:
            for token_id in ids:
                data = self._stream.push(token_id)
                self.num_tokens += 1
                out += self._take(data)
                if self.stopped:
                    break
        except TypeError:
            raise BadRequest("ids", ids, "a sequence of int") from None
        self._pieces.append(out)
        return out

    def finish(self) -> str:
        """The output ended without a stop string: what was held back."""
        if self.stopped or self._finished:
            return ""
        self._finished = True
        out = self._decoder.decode(self._pending, True)
        self._pending = b""
        self._pieces.append(out)
        return out

    def _take(self, data: bytes) -> str:
        if not data:
            return ""
        matcher = self._matcher
        before = matcher.seen - len(self._pending)
        match = matcher.push(data)
        pending = self._pending + data
        if match is not None:
            end = match.end if self._include_stop else match.start
            self._pending = b""
            return self._decoder.decode(pending[: end - before], True)
        safe = len(pending) - matcher.held
        self._pending = pending[safe:]
        return self._decoder.decode(pending[:safe])
