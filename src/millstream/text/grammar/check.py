"""The bounds of a grammar, checked before it is compiled, with the place where one is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from millstream.core.errors import MillstreamError
from millstream.core.request import MAX_STRUCTURED_CHARS, Structured

MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_ENUM = 4096
MAX_PROPERTIES = 2048
MAX_COUNT = 65_536
MAX_CHOICES = 4096
MAX_REGEX_CHARS = 16_384

_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"enum", "const", "default", "examples", "example"})
# An output that needs more than this can never be finished.
_LEAST = frozenset({"minItems", "minLength", "minProperties", "minContains"})


class Refused(MillstreamError):
    """A bound is broken: what was found (naming the keyword and the place), and what is allowed."""

    def __init__(self, got: str, allowed: str) -> None:
        self.got, self.allowed = got, allowed
        super().__init__(f"{got}, allowed is {allowed}")


def checked(structured: Structured) -> Structured:
    """The same, a GBNF grammar as Lark. Raises Refused."""
    if structured.kind == "json_schema":
        check_schema(_parsed(structured.text, "a JSON Schema"))
    elif structured.kind == "choice":
        _check_choices(_parsed(structured.text, "a JSON list of strings"))
    elif structured.kind == "regex":
        if len(structured.text) > MAX_REGEX_CHARS:
            raise Refused(f"{len(structured.text)} characters", f"at most {MAX_REGEX_CHARS}")
    elif structured.kind == "grammar" and "::=" in structured.text:
        return replace(structured, text=_lark(structured.text))
    return structured


def check_schema(schema: Any) -> None:
    """Depth, size and counts of a JSON Schema. Raises Refused."""
    if not isinstance(schema, Mapping | bool):
        raise Refused(f"a {type(schema).__name__}", "a JSON Schema: an object, or true")
    if schema is False:
        raise Refused("false, a schema that nothing fulfils", "a schema that some output fulfils")
    nodes = 0
    left: list[tuple[Any, str, int, str]] = [(schema, "schema", 0, "$")]
    while left:
        value, role, depth, path = left.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise Refused(f"a schema of more than {MAX_NODES} values", f"at most {MAX_NODES}")
        if depth > MAX_DEPTH:
            raise Refused(f"nesting deeper than {MAX_DEPTH} at {_short(path)}", f"at most {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            for key, item in value.items():
                if role == "schema":
                    _check_keyword(key, item, path)
                left.append((item, _role(role, key), depth + 1, f"{path}.{key}"))
        elif isinstance(value, list):
            left += ((item, role, depth + 1, f"{path}[{i}]") for i, item in enumerate(value))


def without_patterns(text: str) -> str:
    """A schema that has passed `checked`, without its patterns of strings."""
    schema = json.loads(text)
    left: list[tuple[Any, str]] = [(schema, "schema")]
    while left:
        value, role = left.pop()
        if isinstance(value, dict):
            if role == "schema":
                value.pop("pattern", None)
            left += ((item, _role(role, key)) for key, item in value.items())
        elif isinstance(value, list):
            left += ((item, role) for item in value)
    return json.dumps(schema, ensure_ascii=False)


def _role(role: str, key: str) -> str:
    """Whether keys below are keywords ("schema"), names of properties ("names") or none of ours ("data")."""
    if role == "schema":
        return "names" if key in _NAMES else "data" if key in _DATA else "schema"
    return "schema" if role == "names" else "data"


def _check_keyword(key: str, value: Any, path: str) -> None:
    where = _short(f"{path}.{key}")
    if key == "enum" and isinstance(value, list) and len(value) > MAX_ENUM:
        raise Refused(f"enum of {len(value)} values at {where}", f"at most {MAX_ENUM} values of an enum")
    if key in _NAMES and isinstance(value, Mapping) and len(value) > MAX_PROPERTIES:
        raise Refused(f"{key} of {len(value)} names at {where}", f"at most {MAX_PROPERTIES}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _LEAST and number and value > MAX_COUNT:
        raise Refused(f"{key} {value:g} at {where}", f"at most {MAX_COUNT}: no output is that long")


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not 0 < len(choices) <= MAX_CHOICES:
        count = len(choices) if isinstance(choices, list) else type(choices).__name__
        raise Refused(f"{count} choices", f"a list of 1 to {MAX_CHOICES} strings")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise Refused(repr(choice)[:80], "strings that are not empty")


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_integer)
    except RecursionError:
        raise Refused("nesting deeper than can be read", f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Refused(f"a text that is not JSON ({error})", what) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int | float:
    # Python refuses to read integers of more than 4,300 digits, with advice that is none for a client.
    return int(digits) if len(digits) < 1000 else float(digits)


def _lark(gbnf: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = str(any_to_lark(gbnf))
    except RecursionError:
        raise Refused("a grammar nested too deep", "a GBNF grammar of less depth") from None
    except Exception as error:
        # The converter raises what it comes upon; it sees nothing but the client's text.
        raise Refused(f"a GBNF grammar that cannot be read ({error})"[:300], "a GBNF grammar, or one in Lark") from None
    if len(lark) > MAX_STRUCTURED_CHARS:
        raise Refused(f"{len(lark)} characters as Lark", f"at most {MAX_STRUCTURED_CHARS}")
    return lark


def _short(path: str) -> str:
    return path if len(path) <= 120 else f"{path[:60]}...{path[-57:]}"
