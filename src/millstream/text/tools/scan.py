"""JSON read a character at a time: whether it can still become valid, and where a value ends."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable

BLANKS = " \n\r\t"
MAX_DEPTH = 128

_LITERALS = ("true", "false", "null")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")


class Step(enum.Enum):
    """After a character: more is needed, the value is whole with it, was whole before it, or it cannot be JSON."""

    MORE = 0
    DONE = 1
    BEFORE = 2
    BAD = 3


class JsonScanner:
    """Follows one JSON value (RFC 8259, no leading blanks) to its end."""

    __slots__ = ("_hex", "_literal", "_number", "_stack", "_state")

    def __init__(self) -> None:
        # What the enclosing brackets are, and what is awaited now.
        self._stack: list[str] = []
        self._state: Callable[[str], Step] = self._value
        self._literal = ""
        self._number = ""
        self._hex = 0

    def push(self, char: str) -> Step:
        return self._state(char)

    @property
    def whole(self) -> bool:
        """Whether the value would be whole if nothing followed: a number has no end of its own."""
        return not self._stack and self._state == self._in_number and self._number in ("zero", "int", "frac", "exp")

    def _value(self, char: str) -> Step:
        if char in BLANKS and self._stack:
            return Step.MORE
        if char in "{[":
            if len(self._stack) >= MAX_DEPTH:
                return Step.BAD
            self._stack.append(char)
            self._state = self._first_key if char == "{" else self._first_item
            return Step.MORE
        if char == '"':
            self._state = self._in_string
            return Step.MORE
        if char == "-" or char in _DIGITS:
            self._number = "sign" if char == "-" else "zero" if char == "0" else "int"
            self._state = self._in_number
            return Step.MORE
        for literal in _LITERALS:
            if char == literal[0]:
                self._literal, self._state = literal[1:], self._in_literal
                return Step.MORE
        return Step.BAD

    def _first_item(self, char: str) -> Step:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> Step:
        return self._close(char) if char == "}" else self._key(char)

    def _key(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if char != '"':
            return Step.BAD
        self._state = self._in_key
        return Step.MORE

    def _colon(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if char != ":":
            return Step.BAD
        self._state = self._value
        return Step.MORE

    def _next(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if char == ",":
            self._state = self._key if self._stack[-1] == "{" else self._value
            return Step.MORE
        return self._close(char)

    def _close(self, char: str) -> Step:
        if char != ("}" if self._stack[-1] == "{" else "]"):
            return Step.BAD
        self._stack.pop()
        return self._ended()

    def _ended(self) -> Step:
        self._state = self._next if self._stack else self._over
        return Step.MORE if self._stack else Step.DONE

    def _over(self, char: str) -> Step:
        return Step.BEFORE

    def _in_key(self, char: str) -> Step:
        if char == '"':
            self._state = self._colon
            return Step.MORE
        return self._in_text(char, self._in_key)

    def _in_string(self, char: str) -> Step:
        if char == '"':
            return self._ended()
        return self._in_text(char, self._in_string)

    def _in_text(self, char: str, back: Callable[[str], Step]) -> Step:
        if char == "\\":
            self._state = lambda after: self._escape(after, back)
            return Step.MORE
        return Step.BAD if char < " " else Step.MORE

    def _escape(self, char: str, back: Callable[[str], Step]) -> Step:
        if char == "u":
            self._hex = 4
            self._state = lambda digit: self._in_hex(digit, back)
            return Step.MORE
        self._state = back
        return Step.MORE if char in _ESCAPES else Step.BAD

    def _in_hex(self, char: str, back: Callable[[str], Step]) -> Step:
        if char not in _HEX:
            return Step.BAD
        self._hex -= 1
        if not self._hex:
            self._state = back
        return Step.MORE

    def _in_literal(self, char: str) -> Step:
        if char != self._literal[0]:
            return Step.BAD
        self._literal = self._literal[1:]
        return Step.MORE if self._literal else self._ended()

    def _in_number(self, char: str) -> Step:
        following = _NUMBER.get((self._number, "digit" if char in _DIGITS else char.lower()))
        if self._number == "sign" and char == "0":
            following = "zero"
        if following is not None:
            self._number = following
            return Step.MORE
        if self._number not in ("zero", "int", "frac", "exp"):
            return Step.BAD
        if not self._stack:
            self._state = self._over
            return Step.BEFORE
        self._state = self._next
        return self._next(char)


# (where in a number, what comes) -> where then. A leading zero takes no more digits.
_NUMBER = {
    ("sign", "digit"): "int",
    ("int", "digit"): "int",
    ("int", "."): "dot",
    ("zero", "."): "dot",
    ("dot", "digit"): "frac",
    ("frac", "digit"): "frac",
    ("int", "e"): "e",
    ("zero", "e"): "e",
    ("frac", "e"): "e",
    ("e", "+"): "esign",
    ("e", "-"): "esign",
    ("e", "digit"): "exp",
    ("esign", "digit"): "exp",
    ("exp", "digit"): "exp",
}


def text_of(raw: str) -> str | None:
    """The string that a JSON literal stands for; None for anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
