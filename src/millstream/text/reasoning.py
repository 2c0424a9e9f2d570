"""A model's thinking, told apart from its answer: what stands between two tags at the beginning of an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millstream.text.tools.protocol import Reasoning

_BLANKS = " \n\r\t"


@dataclass(frozen=True, slots=True)
class Tags:
    """What opens and closes the thinking. The first character of each occurs in it once."""

    open: str
    close: str


KNOWN = {"think": Tags("<think>", "</think>"), "mistral": Tags("[THINK]", "[/THINK]")}


def tags_of(template: str) -> Tags | None:
    """The tags that a chat template knows, None for a model that does not think aloud."""
    return next((tags for tags in KNOWN.values() if tags.close in template or tags.open in template), None)


def opened_by(prompt_end: str, tags: Tags) -> bool:
    """Whether a prompt ends within the thinking: some templates write the opening tag themselves."""
    return prompt_end.rstrip().endswith(tags.open)


class Thinking:
    """Splits a stream of text into thinking and the rest, whatever its cuts.

    Thinking comes first or not at all; `inside`: the prompt has opened it. Blanks at its edges belong to nobody.
    `ended` says whether all that comes is answer.
    """

    def __init__(self, tags: Tags, inside: bool = False) -> None:
        self._tags = tags
        self._state: Callable[[str], None] = self._inside if inside else self._before
        self._matched = 0
        self._blanks: list[str] = []
        self._said = False
        self._thought: list[str] = []
        self._rest: list[str] = []

    @property
    def ended(self) -> bool:
        return self._state == self._after

    @property
    def thinks(self) -> bool:
        return self._state == self._inside

    def push(self, text: str) -> tuple[list[Reasoning], str]:
        """The thinking that is certain now, and the text behind it."""
        if self.ended and not self._blanks and self._said:
            return [], text
        for char in text:
            self._state(char)
        return self._take()

    def finish(self) -> tuple[list[Reasoning], str]:
        if self._state == self._before:
            self._rest += (*self._blanks, self._tags.open[: self._matched])
        elif self._state == self._inside:
            self._think(self._tags.close[: self._matched])
        self._blanks, self._matched = [], 0
        return self._take()

    def _take(self) -> tuple[list[Reasoning], str]:
        thought, rest = "".join(self._thought), "".join(self._rest)
        self._thought, self._rest = [], []
        return [Reasoning(thought)] if thought else [], rest

    def _before(self, char: str) -> None:
        mark = self._tags.open
        if not self._matched and char in _BLANKS:
            self._blanks.append(char)
        elif char == mark[self._matched]:
            self._matched += 1
            if self._matched == len(mark):
                self._matched, self._blanks, self._state = 0, [], self._inside
        else:
            self._rest += (*self._blanks, mark[: self._matched], char)
            self._matched, self._blanks, self._said, self._state = 0, [], True, self._after

    def _inside(self, char: str) -> None:
        mark = self._tags.close
        if char == mark[self._matched]:
            self._matched += 1
            if self._matched == len(mark):
                self._matched, self._blanks, self._said, self._state = 0, [], False, self._after
            return
        self._think(mark[: self._matched])
        self._matched = 0
        if char == mark[0]:
            self._matched = 1
        else:
            self._think(char)

    def _think(self, text: str) -> None:
        for char in text:
            if char in _BLANKS:
                self._blanks.append(char)
                continue
            # Blanks before the first word are left out, as those after the last.
            if self._said:
                self._thought += self._blanks
            self._blanks, self._said = [], True
            self._thought.append(char)

    def _after(self, char: str) -> None:
        if self._said or char not in _BLANKS:
            self._said = True
            self._rest.append(char)
