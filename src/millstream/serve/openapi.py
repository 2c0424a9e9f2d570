"""The description of the API in OpenAPI 3.1, made of the table of policies and the types of bodies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

import millstream
from millstream.serve.files import PURPOSES
from millstream.serve.openai.shapes import MAX_PROGRAM, PROGRAM_HEADER
from millstream.serve.policy import Access, Body, Entry, anthropic_errors

_PLACE = "#/components/schemas/{name}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
_UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"enum": list(PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer"},
    },
}
_QUERY: dict[str, dict[str, Any]] = {
    "after": {"type": "string"},
    "include_logprobs": {"type": "boolean"},
    "limit": {"type": "integer", "minimum": 1},
    "order": {"enum": ["asc", "desc"]},
    "purpose": {"enum": [*PURPOSES, "batch_output"]},
    "since": {"type": "integer", "minimum": 0},
    "starting_after": {"type": "integer", "minimum": 0},
    "stream": {"type": "boolean"},
}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    PROGRAM_HEADER: (
        "The id of the program that the request is a call of: the same as the body's `program`",
        {"type": "string", "minLength": 1, "maxLength": MAX_PROGRAM},
    ),
    "X-Request-Timeout": ("Seconds: the same as the body's `deadline_s`, which comes first", {"type": "number"}),
}
# What any route may say, and what it means here.
_REFUSALS = {
    "400": "A value is wrong: `param` names it",
    "401": "No API key, or one that does not exist",
    "403": "The key, or the page that asks, may not do this",
    "404": "There is nothing of that name",
    "408": "The body did not come in time",
    "413": "The body or a text is too large",
    "415": "The body is of a form that is not taken",
    "429": "There is no room now: Retry-After says when to ask again",
    "503": "The server drains, or its engine is away: Retry-After says when to ask again",
    "504": "The deadline passed before the first token",
    "507": "The disk takes nothing",
}


def describe(entries: Iterable[Entry], has_keys: bool, root_path: str = "") -> bytes:
    """The document, as JSON."""
    entries = list(entries)
    types = [one for entry in entries for one in (entry.policy.asks, entry.policy.answers) if one is not None]
    found, components = msgspec.json.schema_components(types, ref_template=_PLACE)
    schemas = iter(found)
    paths: dict[str, dict[str, Any]] = {}
    for entry in entries:
        asks = next(schemas) if entry.policy.asks is not None else None
        answers = next(schemas) if entry.policy.answers is not None else None
        operation = _operation(entry, asks, answers, has_keys)
        paths.setdefault(_path(entry.pattern), {})[entry.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Millstream",
            "version": millstream.__version__,
            "description": "Language models over the APIs of OpenAI and Anthropic, and what vLLM adds to them.",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    return msgspec.json.encode(document)


def _operation(entry: Entry, asks: Any, answers: Any, has_keys: bool) -> dict[str, Any]:
    policy = entry.policy
    content: dict[str, Any] = {policy.media: {"schema": answers} if policy.media == "application/json" else {}}
    if policy.streams:
        content["text/event-stream"] = {}
    error = "AnthropicError" if policy.errors is anthropic_errors else "Error"
    refusal = {"application/json": {"schema": {"$ref": _PLACE.format(name=error)}}}
    responses: dict[str, Any] = {"200": {"description": policy.summary, "content": content}}
    responses |= {status: {"description": text, "content": refusal} for status, text in _REFUSALS.items()}
    responses |= {
        status: {"description": text, "content": {"application/json": {"schema": answers}}}
        for status, text in policy.others.items()
    }
    operation: dict[str, Any] = {
        "operationId": f"{entry.method.lower()}{entry.pattern.replace('{', '').replace('}', '').replace('/', '_')}",
        "summary": policy.summary,
        "responses": responses,
    }
    parameters = [
        {"name": name.partition(":")[0], "in": "path", "required": True, "schema": {"type": "string"}}
        for name in (part.partition("}")[0] for part in entry.pattern.split("{")[1:])
    ]
    parameters += [{"name": name, "in": "query", "schema": _QUERY[name]} for name in policy.query]
    parameters += [
        {"name": name, "in": "header", "description": text, "schema": schema}
        for name, (text, schema) in ((name, _HEADERS[name]) for name in policy.headers)
    ]
    if parameters:
        operation["parameters"] = parameters
    if asks is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": asks}}}
    elif policy.body is Body.UPLOAD:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    if has_keys and policy.access is not Access.OPEN:
        operation["security"] = [{"bearer": []}, {"header": []}]
    return operation


def _path(pattern: str) -> str:
    return pattern.replace(":path}", "}")
