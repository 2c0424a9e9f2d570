"""What an output must look like, as clients of OpenAI's API, of vLLM and of llama.cpp write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millstream.core.errors import BadRequest
from millstream.core.request import Structured

# vLLM's names, those of its `structured_outputs` and the older ones with `guided_` before them.
FIELDS = ("json", "regex", "choice", "grammar", "json_object")
GUIDED = ("json", "regex", "choice", "grammar")
BACKENDS = ("auto", "guidance", "llguidance")

# Of `structured_outputs`: how vLLM's other back-ends are tuned. Off, as they are by default, they change nothing here.
_TUNING = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def structured_of(given: Mapping[str, Any]) -> tuple[Structured, str] | None:
    """What a request's fields ask for, and the field to name when it is wrong; None where they ask for nothing.

    `given` may have `response_format`, `structured_outputs` and `guided_*`. Raises BadRequest for values of no use, for
    more than one of them, and for a back-end that there is not.
    """
    found = [*_response_format(given.get("response_format")), *_outputs(given.get("structured_outputs"))]
    for name in GUIDED:
        if (value := given.get(f"guided_{name}")) is not None:
            found.append((_made(name, value, f"guided_{name}"), f"guided_{name}"))
    backend = given.get("guided_decoding_backend")
    if backend is not None and backend not in BACKENDS:
        raise BadRequest("guided_decoding_backend", backend, ", ".join(BACKENDS))
    if (pattern := given.get("guided_whitespace_pattern")) is not None:
        raise BadRequest("guided_whitespace_pattern", pattern, "none: blanks between the parts of JSON are up to us")
    if len(found) > 1:
        raise BadRequest(found[1][1], f"{found[0][1]} as well", "one of them")
    return found[0] if found else None


def _response_format(given: Any) -> list[tuple[Structured, str]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise BadRequest("response_format", given, 'an object such as {"type": "json_object"}')
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        # llama.cpp takes a schema here.
        if (schema := given.get("schema")) is not None:
            return [(_schema(schema, False, "response_format.schema"), "response_format.schema")]
        return [(Structured.json(), "response_format")]
    if kind == "json_schema":
        inside = given.get("json_schema")
        if not isinstance(inside, Mapping):
            raise BadRequest("response_format.json_schema", inside, 'an object such as {"name": "x", "schema": {...}}')
        strict = inside.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise BadRequest("response_format.json_schema.strict", strict, "true or false")
        where = "response_format.json_schema.schema"
        if inside.get("schema") is None:
            raise BadRequest(where, None, "a JSON Schema")
        return [(_schema(inside["schema"], bool(strict), where), where)]
    raise BadRequest("response_format.type", kind, "text, json_object, json_schema")


def _outputs(given: Any) -> list[tuple[Structured, str]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise BadRequest("structured_outputs", given, f"an object with one of {', '.join(FIELDS)}")
    found = []
    for name, value in given.items():
        where = f"structured_outputs.{name}"
        if value is None or (name in (*_TUNING, "json_object") and value is False):
            continue
        if name == "backend" and value in BACKENDS:
            continue
        if name == "backend":
            raise BadRequest(where, value, ", ".join(BACKENDS))
        if name not in FIELDS:
            raise BadRequest(where, value, f"one of {', '.join(FIELDS)}")
        found.append((_made(name, value, where), where))
    if not found:
        raise BadRequest("structured_outputs", dict(given), f"one of {', '.join(FIELDS)}")
    return found


def _made(name: str, value: Any, where: str) -> Structured:
    if name == "json_object":
        if value is not True:
            raise BadRequest(where, value, "true")
        return Structured.json()
    if name == "json":
        return _schema(value, True, where)
    if name == "choice":
        if isinstance(value, str | Mapping) or not isinstance(value, list | tuple):
            raise BadRequest(where, value, "a list of strings")
        return _named(lambda: Structured.choice(value), where)
    if not isinstance(value, str):
        raise BadRequest(where, value, "a string")
    return _named(lambda: Structured(name, value), where)


def _schema(value: Any, strict: bool, where: str) -> Structured:
    # A schema may be given as the text of one.
    if not isinstance(value, Mapping | str | bool):
        raise BadRequest(where, value, "a JSON Schema: an object")
    if isinstance(value, bool):
        value = "true" if value else "false"
    return _named(lambda: Structured.json(value, strict), where)


def _named(make: Any, where: str) -> Structured:
    try:
        made: Structured = make()
        return made
    except BadRequest as error:
        raise BadRequest(where, error.got, error.allowed) from None
