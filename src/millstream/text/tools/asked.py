"""Tools as clients ask for them, in the shape of OpenAI's API, made into a Toolbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millstream.core.errors import BadRequest
from millstream.text.tools.protocol import MAX_TOOLS, Tool, Toolbox


def toolbox_of(tools: Any, choice: Any = None, parallel: Any = True) -> Toolbox | None:
    """`tools`, `tool_choice` and `parallel_tool_calls` of a request; None where there are no tools to speak of.

    A tool is `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ..., "strict": ...}}`,
    or these fields beside the type. A choice is "auto", "none", "required", or a function by its name. Raises
    BadRequest naming the field.
    """
    if parallel is None:
        parallel = True
    if not isinstance(parallel, bool):
        raise BadRequest("parallel_tool_calls", parallel, "true or false")
    if tools is None:
        tools = []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise BadRequest("tools", tools, "a list of functions")
    if len(tools) > MAX_TOOLS:
        raise BadRequest("tools", f"{len(tools)} tools", f"at most {MAX_TOOLS}")
    made = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    mode, only = _choice(choice, bool(made))
    box = Toolbox(made, mode, only, parallel)
    return box if made else None


def _tool(given: Any, where: str) -> Tool:
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        kind = given.get("type") if isinstance(given, Mapping) else given
        raise BadRequest(f"{where}.type", kind, "'function'")
    inside = given.get("function", given)
    where = f"{where}.function" if "function" in given else where
    if not isinstance(inside, Mapping):
        raise BadRequest(where, inside, "an object with the function's name and parameters")
    strict, description = inside.get("strict"), inside.get("description")
    if strict is not None and not isinstance(strict, bool):
        raise BadRequest(f"{where}.strict", strict, "true or false")
    parameters = inside.get("parameters")
    try:
        return Tool(
            inside.get("name"),  # type: ignore[arg-type]
            "" if description is None else description,
            {} if parameters is None else parameters,
            bool(strict),
        )
    except BadRequest as error:
        raise BadRequest(f"{where}.{error.param}", error.got, error.allowed) from None


def _choice(given: Any, tools: bool) -> tuple[str, str | None]:
    if given is None:
        return ("auto" if tools else "none"), None
    if isinstance(given, str):
        return given, None
    if isinstance(given, Mapping) and given.get("type") == "function":
        inside = given.get("function", given)
        name = inside.get("name") if isinstance(inside, Mapping) else None
        if isinstance(name, str):
            return "required", name
    raise BadRequest("tool_choice", given, 'auto, none, required, or {"type": "function", "function": {"name": "..."}}')
