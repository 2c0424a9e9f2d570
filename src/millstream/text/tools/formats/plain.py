"""Plain JSON: an answer that is `{"name": ..., "arguments": {...}}`, or a list of these, is a call.

For models whose template says nothing of calls: they are asked for this in words (`text/tools/prompt.py`).
"""

from __future__ import annotations

from millstream.core.registry import Card
from millstream.text.tools import lark
from millstream.text.tools.calls import JsonReader
from millstream.text.tools.protocol import Reader, Shape


class Plain:
    marks: tuple[str, ...] = ()

    def matches(self, template: str) -> bool:
        return False

    def reader(self, names: frozenset[str], certain: bool, many: bool) -> Reader:
        return JsonReader(names, certain, many)

    def grammar(self, shape: Shape, template: str) -> str:
        count = len(shape.tools)
        rules = lark.calls(shape.tools, "arguments")
        listed = f'(ws "," ws call){{0,{lark.MAX_CALLS - 1}}} ws "]"'
        if shape.must or shape.content is not None:
            start = f'call | "[" ws call {listed}' if shape.many else "call"
            if not shape.must:
                start, rules = f"{start} | content", f"{rules}content: {shape.content}\n"
        else:
            start = "TEXT | one | listed" if shape.many else "TEXT | one"
            rules += f"one: {lark.either('one', count)}\n{lark.begins(shape.tools, 'one', '')}"
            if shape.many:
                rules += f"listed: ({lark.either('listed', count)}) {listed}\n"
                rules += lark.begins(shape.tools, "listed", r"\[[\x20\n\r\t]{0,32}")
        return f"{lark.HEAD}start: {start}\n{rules}{lark.TAIL}"

    def call_id(self, id: str) -> str:
        return id


CARD = Card("plain", "tool calls as plain JSON, asked for in words where a model's template knows no tools")
PLUGIN = Plain
