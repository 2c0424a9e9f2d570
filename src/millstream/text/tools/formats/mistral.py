"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and since 2025 `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import hashlib
import re

from millstream.core.registry import Card
from millstream.text.tools import lark
from millstream.text.tools.calls import CallReader
from millstream.text.tools.protocol import Reader, Shape
from millstream.text.tools.scan import BLANKS

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_ID = re.compile(r"[A-Za-z0-9_-]{0,64}")
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Mistral:
    marks = (MARK, ARGS, CALL_ID)

    def matches(self, template: str) -> bool:
        return MARK in template

    def reader(self, names: frozenset[str], certain: bool, many: bool) -> Reader:
        return _Reader(names, certain, many, MARK)

    def grammar(self, shape: Shape, template: str) -> str:
        mark, most = shape.mark(MARK), lark.MAX_CALLS - 1
        if ARGS in template:
            named = " | ".join(f"named_{i}" for i in range(len(shape.tools)))
            rules = f"named: {named}\n" + "".join(
                f"named_{i}: {lark.literal(name)} {shape.mark(ARGS)} {lark.arguments(schema)}\n"
                for i, (name, schema) in enumerate(shape.tools)
            )
            body, more = "named", f" ({mark} named){{0,{most}}}" if shape.many else ""
        else:
            rules = lark.calls(shape.tools, "arguments")
            listed = f'(ws "," ws call){{0,{most}}} ' if shape.many else ""
            body, more = f'ws "[" ws call {listed}ws "]"', ""
        if shape.must or shape.content is not None:
            start = f"{mark} {body}{more}"
            if not shape.must:
                start, rules = f"{start} | content", f"{rules}content: {shape.content}\n"
        elif shape.is_token(MARK):
            start = f"TEXT | TEXT {mark} {body}{more}"
        else:
            start = f"TEXT | opening {body}{more}"
            rules += f"opening[lazy]: TEXT {lark.literal(MARK)}\n"
        return f"{lark.HEAD}start: {start}\n{rules}{lark.TAIL}"

    def call_id(self, id: str) -> str:
        # Their templates refuse any other length.
        number = int.from_bytes(hashlib.sha256(id.encode("utf-8", "replace")).digest()[:8], "big")
        chars = []
        for _ in range(9):
            number, digit = divmod(number, len(_ALPHABET))
            chars.append(_ALPHABET[digit])
        return "".join(chars)


class _Reader(CallReader):
    def on_mark(self) -> None:
        self.state = self.after_mark

    def after_mark(self, char: str) -> None:
        if char in "{[" or char in BLANKS:
            self.call_or_list(char)
        else:
            self._head = ""
            self.state = self.in_head
            self.state(char)

    def in_head(self, char: str) -> None:
        """A name and what may stand between it and the arguments."""
        name = _NAME.match(self._head)
        if char == "{" and name is not None and name[0] in self.names and _between(self._head[name.end() :], True):
            self._raw.append(self._head)
            self.arguments(name[0])
            self.state(char)
            return
        name = _NAME.match(self._head + char)
        if name is not None and _between((self._head + char)[name.end() :], False):
            self._head += char
            return
        # Another mark may have begun in what was read for a name.
        head = self._head
        self.give_up()
        self.state = self.in_content
        for each in head + char:
            self.state(each)

    def at_end(self) -> None:
        if self.state == self.in_head:
            self._raw.append(self._head)


def _between(text: str, whole: bool) -> bool:
    """Whether a text is `[CALL_ID]id[ARGS]`, `[ARGS]` or blanks alone, or can become that (unless `whole`)."""
    if text.startswith(CALL_ID):
        found = _ID.match(text, len(CALL_ID))
        text = text[found.end() if found else 0 :]
        if not text:
            return not whole
    elif not whole and text and CALL_ID.startswith(text):
        return True
    if text.startswith(ARGS):
        text = text[len(ARGS) :]
    elif not whole and text and ARGS.startswith(text):
        return True
    return not text.strip(BLANKS)


CARD = Card("mistral", "tool calls of Mistral: [TOOL_CALLS], then a list, or a name and [ARGS]")
PLUGIN = Mistral
