"""What the Responses API takes, and the same as a chat, which the server understands.

A conversation is a list of items: messages, calls of functions, their results, reasoning. What a text model cannot take
and tools that run at OpenAI are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from millstream.core.errors import BadRequest
from millstream.serve.files import new_id
from millstream.serve.openai.shapes import ProgramAsk

Item = dict[str, Any]

MAX_ITEMS = 10_000
MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"

# Fields that OpenAI's API does not have and chats here do: passed on as they are.
EXTENSIONS = (
    "seed",
    "top_k",
    "min_p",
    "min_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "chat_template_kwargs",
    "priority",
    "slo",
    "cache_salt",
    "program",
    "deadline_s",
    "structured_outputs",
)


class StreamOptions(msgspec.Struct, kw_only=True):
    # Accepted: deltas here are never padded.
    include_obfuscation: bool | None = None


class Ask(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/responses`, with the fields of EXTENSIONS."""

    model: str
    input: str | list[Item] = ""
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: Item | None = None
    reasoning: Item | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    conversation: Any = None
    prompt: Any = None
    seed: Any = None
    top_k: Any = None
    min_p: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    chat_template_kwargs: Any = None
    priority: Any = None
    slo: Any = None
    cache_salt: Any = None
    program: str | ProgramAsk | None = None
    deadline_s: Any = None
    structured_outputs: Any = None

    def check(self) -> None:
        """Raises BadRequest for what this server does not do."""
        if self.conversation is not None:
            raise BadRequest("conversation", self.conversation, "none: go on from a response with previous_response_id")
        if self.prompt is not None:
            raise BadRequest("prompt", self.prompt, "none: there are no stored prompts; use instructions and input")
        if self.truncation == "auto":
            raise BadRequest("truncation", "auto", "disabled: no part of a conversation is left out unasked")
        if self.background and self.store is False:
            raise BadRequest("store", False, "true with background: the answer has to be kept until it is fetched")
        for key, value in (self.metadata or {}).items():
            if len(key) > 64 or len(value) > 512 or len(self.metadata or {}) > MAX_METADATA:
                allowed = f"at most {MAX_METADATA} keys of 64 characters, with values of 512"
                raise BadRequest("metadata", key, allowed)


def own_items(ask: Ask) -> list[Item]:
    """The items that a request brings, each with an id. Raises BadRequest."""
    given = [{"role": "user", "content": ask.input}] if isinstance(ask.input, str) else ask.input
    if isinstance(ask.input, str) and not ask.input and ask.previous_response_id is None:
        raise BadRequest("input", ask.input, "a text, or a list of items")
    if len(given) > MAX_ITEMS:
        raise BadRequest("input", f"{len(given)} items", f"at most {MAX_ITEMS}")
    return [_item(item, f"input[{place}]") for place, item in enumerate(given) if item.get("content") != ""]


def _item(item: Item, param: str) -> Item:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        parts = _parts(item, param)
        return {
            "id": _id(item, "msg_"),
            "type": "message",
            "role": _role(item, param),
            "status": "completed",
            "content": parts,
        }
    if kind == "function_call":
        values = {name: _string(item, name, param) for name in ("call_id", "name", "arguments")}
        return {"id": _id(item, "fc_"), "type": kind, "status": "completed", **values}
    if kind == "function_call_output":
        return {
            "id": _id(item, "fco_"),
            "type": kind,
            "status": "completed",
            "call_id": _string(item, "call_id", param),
            "output": _output(item.get("output"), f"{param}.output"),
        }
    if kind == "reasoning":
        return {
            "id": _id(item, "rs_"),
            "type": kind,
            "summary": _texts(item.get("summary"), "summary_text", f"{param}.summary"),
            "content": _texts(item.get("content"), "reasoning_text", f"{param}.content"),
        }
    raise BadRequest(f"{param}.type", kind, "message, function_call, function_call_output or reasoning")


def _id(item: Item, prefix: str) -> str:
    given = item.get("id")
    return given[:128] if isinstance(given, str) and given else new_id(prefix)


def _role(item: Item, param: str) -> str:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise BadRequest(f"{param}.role", role, "user, assistant, system or developer")
    return str(role)


def _string(item: Item, name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or (not value and name != "arguments"):
        raise BadRequest(f"{param}.{name}", value, "a text")
    return value


def _parts(item: Item, param: str) -> list[Item]:
    """Content as parts: what the user says is input_text, what the model said is output_text."""
    said = item.get("role") == "assistant"
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "output_text" if said else "input_text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{param}.content", content, "a text, or a list of parts")
    out: list[Item] = []
    for place, part in enumerate(content):
        at = f"{param}.content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise BadRequest(f"{at}.type", kind, "input_text or output_text: this model takes text alone")
        if not isinstance(text, str):
            raise BadRequest(f"{at}.text", text, "a text")
        out.append(
            {"type": "output_text", "text": text, "annotations": []} if said else {"type": "input_text", "text": text}
        )
    return out


def _texts(given: Any, kind: str, param: str) -> list[Item]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise BadRequest(param, given, f"a list of {kind} parts")
    out: list[Item] = []
    for place, part in enumerate(given):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRequest(f"{param}[{place}]", part, f"a {kind} part")
        out.append({"type": kind, "text": part["text"]})
    return out


def _output(given: Any, param: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise BadRequest(param, given, "a text, or a list of input_text parts")
    texts = []
    for place, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text") or not isinstance(part.get("text"), str):
            raise BadRequest(f"{param}[{place}].type", kind, "input_text: this model takes text alone")
        texts.append(part["text"])
    return "\n".join(texts)


def to_chat(ask: Ask, items: Sequence[Item]) -> dict[str, Any]:
    """The body of a chat completion over `items`, the whole conversation. Raises BadRequest."""
    chat: dict[str, Any] = {"model": ask.model, "messages": _messages(ask.instructions, items)}
    if ask.max_output_tokens is not None:
        chat["max_completion_tokens"] = ask.max_output_tokens
    _choose_tools(ask, chat)
    if form := _response_format(ask.text):
        chat["response_format"] = form
    if LOGPROBS in (ask.include or ()) or ask.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": ask.top_logprobs or 0}
    if ask.reasoning and ask.reasoning.get("effort") is not None:
        chat["reasoning_effort"] = ask.reasoning["effort"]
    for name in ("temperature", "top_p", "service_tier", "user", "prompt_cache_key", *EXTENSIONS):
        if getattr(ask, name) is not None:
            chat[name] = getattr(ask, name)
    return chat


def _messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if instructions:
        out.append({"role": "system", "content": instructions})
    # What the model thought, said and called in one turn is one message.
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        if kind == "reasoning" or kind == "function_call" or item.get("role") == "assistant":
            if turn is None or (kind != "function_call" and ("tool_calls" in turn or turn.get("content") is not None)):
                turn = {"role": "assistant", "content": None}
                out.append(turn)
            _add(turn, item)
            continue
        turn = None
        if kind == "function_call_output":
            out.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            out.append({"role": item["role"], "content": _text(item)})
    # Thinking that led to nothing says nothing to the model.
    out = [one for one in out if one["role"] != "assistant" or one["content"] is not None or "tool_calls" in one]
    if not out:
        raise BadRequest("input", "nothing", "at least one message")
    return out


def _add(turn: dict[str, Any], item: Item) -> None:
    if item["type"] == "reasoning":
        texts = [part["text"] for part in item.get("content") or item.get("summary") or ()]
        turn["reasoning_content"] = "\n".join([*filter(None, [turn.get("reasoning_content")]), *texts])
    elif item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    else:
        turn["content"] = _text(item)


def _text(item: Item) -> str:
    return "\n".join(part["text"] for part in item["content"])


def _choose_tools(ask: Ask, chat: dict[str, Any]) -> None:
    choice = ask.tool_choice
    tools = ask.tools or []
    for place, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise BadRequest(f"tools[{place}].type", tool.get("type"), "function: tools that the client runs")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        names = [tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)]
        tools = [tool for tool in tools if tool.get("name") in names]
        choice = choice.get("mode", "auto")
    elif isinstance(choice, dict):
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise BadRequest("tool_choice", choice.get("type"), "auto, none, required, or a function with its name")
        choice = {"type": "function", "function": {"name": choice["name"]}}
    if tools:
        kept = ("name", "description", "parameters", "strict")
        chat["tools"] = [
            {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
            for tool in tools
        ]
        if ask.parallel_tool_calls is not None:
            chat["parallel_tool_calls"] = ask.parallel_tool_calls
    if choice is not None and (tools or choice not in ("auto", "none")):
        chat["tool_choice"] = choice


def _response_format(text: Item | None) -> dict[str, Any] | None:
    form = (text or {}).get("format")
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind == "json_schema" and isinstance(form.get("schema"), dict):
        kept = {name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None}
        return {"type": "json_schema", "json_schema": kept}
    raise BadRequest("text.format", kind, "text, json_object, or json_schema with a schema")
