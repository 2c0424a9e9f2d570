"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after the other or a list in one.

NousResearch's Hermes function calling; Qwen 2.5 and 3, SmolLM2 and 3 and many others were trained on the same.
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.text.tools import lark
from millstream.text.tools.calls import CallReader
from millstream.text.tools.protocol import Reader, Shape
from millstream.text.tools.scan import BLANKS

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    marks = (OPEN, CLOSE)

    def matches(self, template: str) -> bool:
        return OPEN in template

    def reader(self, names: frozenset[str], certain: bool, many: bool) -> Reader:
        return _Reader(names, certain, many, OPEN)

    def grammar(self, shape: Shape, template: str) -> str:
        rules = lark.calls(shape.tools, "arguments")
        body = f"ws call ws {shape.mark(CLOSE)}"
        if shape.must or shape.content is not None:
            rules += f"one: {shape.mark(OPEN)} {body}\n"
            more = f' ("\\n" one){{0,{lark.MAX_CALLS - 1}}}' if shape.many else ""
            start = f"one{more}" if shape.must else f"one{more} | content"
            if not shape.must:
                rules += f"content: {shape.content}\n"
        else:
            # Text before a call ends where the mark is whole; a control token is no text to begin with.
            if shape.is_token(OPEN):
                rules += f"one: TEXT {shape.mark(OPEN)} {body}\n"
            else:
                rules += f"one: opening {body}\nopening[lazy]: TEXT {lark.literal(OPEN)}\n"
            start = f"one{{0,{lark.MAX_CALLS}}} tail" if shape.many else "tail | one"
            rules += "tail: TEXT\n"
        return f"{lark.HEAD}start: {start}\n{rules}{lark.TAIL}"

    def call_id(self, id: str) -> str:
        return id


class _Reader(CallReader):
    def on_mark(self) -> None:
        self._closed = 0
        self.state = self.call_or_list

    def after_calls(self, char: str) -> None:
        if char == CLOSE[self._closed]:
            self._closed += 1
            if self._closed == len(CLOSE):
                self.state = self.in_content
        elif char not in BLANKS or self._closed:
            # The model left it out; what looked like it is content, or the next opening mark.
            self.state = self.in_content
            for each in CLOSE[: self._closed]:
                self.state(each)
            self.state(char)


CARD = Card("hermes", "tool calls of Hermes, Qwen, SmolLM: JSON between <tool_call> tags")
PLUGIN = Hermes
