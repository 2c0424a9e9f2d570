"""Calls written as Lark: the pieces that the grammars of all formats share (llguidance's dialect)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from millstream.text.grammar.build import WHITESPACE

MAX_CALLS = 64

_BLANKS = r"[\x20\n\r\t]{0,32}"
# Any text. A lazy lexeme beside it ends it where a call begins.
ANY = r"/(.|\n)*/"
HEAD = "%llguidance {}\n"
# `ws` is any blanks there may be between the parts of JSON.
TAIL = f"ws: WS?\nWS: /{_BLANKS.replace('{0,', '{1,')}/\nTEXT: {ANY}\n"


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text)


def escaped(text: str) -> str:
    """A text within a regular expression of Lark."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: "\\" + found[0], text)


def calls(tools: Sequence[tuple[str, str]], key: str) -> str:
    """Rules `call` (any of the calls as a JSON object whose arguments are under `key`) and `rest_i` (what of the i-th
    follows its name)."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, (name, schema) in enumerate(tools):
        rules.append(f'call_{i}: "{{" ws "\\"name\\"" ws ":" ws {literal(json.dumps(name))} rest_{i}')
        rules.append(f'rest_{i}: ws "," ws {literal(json.dumps(key))} ws ":" ws {arguments(schema)} ws "}}"')
    return "\n".join(rules) + "\n"


def arguments(schema: str) -> str:
    return f"%json {schema}"


def begins(tools: Sequence[tuple[str, str]], rule: str, before: str) -> str:
    """Rules `rule_i`: the beginning of a call in the midst of any text, up to its name. `before` is a regular
    expression of what stands before the brace."""
    return "".join(
        f'{rule}_{i}[lazy]: /{_BLANKS}{before}\\{{{_BLANKS}"name"{_BLANKS}:{_BLANKS}"{escaped(name)}"/\n'
        for i, (name, _) in enumerate(tools)
    )


def either(rule: str, count: int) -> str:
    """`rule_0 rest_0 | rule_1 rest_1 | ...`"""
    return " | ".join(f"{rule}_{i} rest_{i}" for i in range(count))


def schema_text(schema: dict[str, object], strict: bool) -> str:
    """A schema as it stands in Lark, with the options of its compiler."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict, "coerce_one_of": not strict}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
