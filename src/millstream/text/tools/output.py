"""One output read as it comes: thinking, content, calls."""

from __future__ import annotations

from millstream.text.reasoning import Thinking
from millstream.text.tools.protocol import Content, Piece, Reader, merged


class OutputReader:
    """Text in, pieces out; the pieces do not depend on how the text was cut.

    `thinking` and `calls` are None where there is none to look for. A call within the thinking is none.
    """

    def __init__(self, thinking: Thinking | None = None, calls: Reader | None = None) -> None:
        self._thinking, self._calls = thinking, calls

    @property
    def thinks(self) -> bool:
        """Whether the next text is thinking, as far as is known: tokens are counted by it."""
        return self._thinking is not None and self._thinking.thinks

    def push(self, text: str) -> list[Piece]:
        return merged(self._read(text, False))

    def finish(self) -> list[Piece]:
        return merged(self._read("", True))

    def _read(self, text: str, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        if self._thinking is not None:
            thought, text = self._thinking.push(text)
            pieces += thought
            if last:
                thought, rest = self._thinking.finish()
                pieces += thought
                text += rest
        if self._calls is None:
            return [*pieces, Content(text)]
        pieces += self._calls.push(text)
        if last:
            pieces += self._calls.finish()
        return pieces
