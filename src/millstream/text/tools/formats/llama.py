"""Llama 3.1 and later: `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`; several with `;` between.

Behind the tag there may be Python instead: `search.call(query="...")`, the form of the built-in tools, or a program for
the code interpreter, where that is among the tools.
"""

from __future__ import annotations

import ast
import json
import re

from millstream.core.registry import Card
from millstream.text.tools import lark
from millstream.text.tools.calls import JsonReader
from millstream.text.tools.protocol import Reader, Shape
from millstream.text.tools.scan import BLANKS

TAG = "<|python_tag|>"
INTERPRETERS = ("code_interpreter", "ipython", "python")
MAX_PYTHON = 16_384

_CALL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\.call\(")


class Llama:
    marks = (TAG,)

    def matches(self, template: str) -> bool:
        return TAG in template or "Environment: ipython" in template

    def reader(self, names: frozenset[str], certain: bool, many: bool) -> Reader:
        return _Reader(names, certain, many, TAG)

    def grammar(self, shape: Shape, template: str) -> str:
        count = len(shape.tools)
        rules = lark.calls(shape.tools, "parameters")
        more = f' ("; " call){{0,{lark.MAX_CALLS - 1}}}' if shape.many else ""
        if shape.must:
            start = f"call{more}"
        elif shape.content is not None:
            start, rules = f"call{more} | content", f"{rules}content: {shape.content}\n"
        else:
            rules += f"first: {lark.either('one', count)}\n{lark.begins(shape.tools, 'one', '')}"
            if shape.is_token(TAG):
                rules += f"tagged: {shape.mark(TAG)} ws call\n"
            else:
                rules += f"tagged: tag ws call\ntag[lazy]: TEXT {lark.literal(TAG)}\n"
            start = f"TEXT | (first | tagged){more}"
        return f"{lark.HEAD}start: {start}\n{rules}{lark.TAIL}"

    def call_id(self, id: str) -> str:
        return id


class _Reader(JsonReader):
    separators = ";"

    def on_mark(self) -> None:
        self.state = self.after_tag

    def after_tag(self, char: str) -> None:
        if char in BLANKS:
            self.keep(char)
        elif char == "{":
            self.state = self.call_or_list
            self.state(char)
        else:
            self._python: list[str] = []
            self._depth, self._quote, self._escaped = 0, "", False
            self.state = self.in_python
            self.state(char)

    def in_python(self, char: str) -> None:
        if len(self._python) >= MAX_PYTHON:
            self.fail(char)
            return
        self.keep(char)
        self._python.append(char)
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char == "(":
            self._depth += 1
        elif char == ")":
            self._depth -= 1
            if self._depth == 0:
                self._try_call()

    def _try_call(self) -> None:
        text = "".join(self._python)
        found = _CALL.match(text)
        if found is None or found[1] not in self.names:
            return
        arguments = _keywords(f"f({text[found.end() :]}")
        if arguments is not None:
            self.tell(found[1], arguments)
            self.state = self.after_calls

    def at_end(self) -> None:
        if self.state == self.in_python:
            interpreter = next((name for name in INTERPRETERS if name in self.names), None)
            if interpreter is not None:
                self.tell(interpreter, json.dumps({"code": "".join(self._python)}, ensure_ascii=False))


def _keywords(text: str) -> str | None:
    """The keyword arguments of `f(...)`, all of them literals, as a JSON object; None where it is anything else."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in values:
            return None
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


CARD = Card("llama", "tool calls of Llama 3.1 and later: JSON with parameters, or Python behind <|python_tag|>")
PLUGIN = Llama
