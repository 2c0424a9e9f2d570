"""Tools told in words, for models whose chat template knows none.

The system message says which functions there are, as JSON, and that a call is an answer of JSON alone. Calls of earlier
turns are written as the model is asked to write them, and their results come from the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from millstream.text.tools.protocol import Toolbox

_OPENING = "You can call functions. Each is given as JSON with its name, what it does, and the schema of its arguments:"
_ONE = 'To call one, answer with nothing but a JSON object: {"name": "<function>", "arguments": {...}}'
_MANY = "To call several at once, answer with a JSON list of such objects."
_OTHERWISE = "When no function is needed, answer in plain words."
_MUST = "Answer with a call now."


def in_words(messages: Sequence[Mapping[str, Any]], toolbox: Toolbox | None) -> list[Mapping[str, Any]]:
    """The chat without tools, calls and results, which are told in words instead."""
    names: dict[str, str] = {}
    told = [_told(message, names) for message in messages]
    if toolbox is None:
        return told
    listed = "\n".join(json.dumps(tool.told()["function"], ensure_ascii=False) for tool in toolbox.callable)
    rules = [_ONE, *([_MANY] if toolbox.many else []), _MUST if toolbox.must else _OTHERWISE]
    system = "\n".join([_OPENING, listed, *rules])
    if told and isinstance(told[0], Mapping) and told[0].get("role") in ("system", "developer"):
        content = told[0].get("content")
        if isinstance(content, str) or content is None:
            return [{**told[0], "content": f"{content}\n\n{system}" if content else system}, *told[1:]]
        if isinstance(content, Sequence):
            return [{**told[0], "content": [*content, {"type": "text", "text": system}]}, *told[1:]]
    return [{"role": "system", "content": system}, *told]


def _told(message: Mapping[str, Any], names: dict[str, str]) -> Mapping[str, Any]:
    """A message in words; `names` are of the calls so far, by their id. What is malformed is left for the template."""
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str | bytes) and calls:
        written = []
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                return message
            names[str(call.get("id"))] = function["name"]
            written.append({"name": function["name"], "arguments": _arguments(function.get("arguments"))})
        text = json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
        said = message.get("content")
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "content": f"{said}\n{text}" if isinstance(said, str) and said else text}
    if message.get("role") in ("tool", "function"):
        name = message.get("name") or names.get(str(message.get("tool_call_id")), "")
        head = f"Result of {name}:" if isinstance(name, str) and name else "Result:"
        content = message.get("content")
        if isinstance(content, str):
            return {"role": "user", "content": f"{head}\n{content}"}
        if isinstance(content, Sequence):
            return {"role": "user", "content": [{"type": "text", "text": head}, *content]}
    return message


def _arguments(given: Any) -> Any:
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given if given is not None else {}
