"""What Anthropic's Messages API takes, and the same as a chat of OpenAI's API, which the server understands.

What a text model cannot take (images, documents that are not text, tools that run at Anthropic) is refused by name.
What only concerns Anthropic's own service (`cache_control`, `metadata`, `service_tier`) is accepted and means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from millstream.core.errors import BadRequest
from millstream.serve.openai.shapes import ProgramAsk

# Fields that Anthropic's API does not have and chats here do: passed on as they are.
EXTENSIONS = (
    "seed",
    "min_p",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "chat_template_kwargs",
    "priority",
    "slo",
    "cache_salt",
    "program",
    "deadline_s",
    "structured_outputs",
)


class Block(msgspec.Struct, kw_only=True):
    """A block of content; which fields it has depends on its type."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    source: dict[str, Any] | None = None
    title: str | None = None


class Message(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, kw_only=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    effort: str | None = None
    format: dict[str, Any] | None = None


class Counted(msgspec.Struct, kw_only=True):
    """What a prompt is made of: all that `/v1/messages/count_tokens` takes."""

    messages: list[Message]
    model: str
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Ask(Counted, kw_only=True):
    """The body of `/v1/messages`, with the fields of EXTENSIONS."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    seed: Any = None
    min_p: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    stop_token_ids: Any = None
    priority: Any = None
    slo: Any = None
    cache_salt: Any = None
    program: str | ProgramAsk | None = None
    deadline_s: Any = None
    structured_outputs: Any = None


def to_chat(ask: Counted) -> dict[str, Any]:
    """The body of a chat completion that asks the same. Raises BadRequest for what cannot be asked."""
    chat: dict[str, Any] = {"model": ask.model, "messages": _messages(ask)}
    _choose_tools(ask, chat)
    if ask.thinking is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": ask.thinking.type != "disabled"}
    if ask.chat_template_kwargs is not None:
        chat["chat_template_kwargs"] = chat.get("chat_template_kwargs", {}) | ask.chat_template_kwargs
    if ask.output_config is not None and ask.output_config.format is not None:
        chat["response_format"] = _response_format(ask.output_config.format)
    if chat["messages"][-1]["role"] == "assistant":
        # The last turn is the model's own: it goes on with it.
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(ask, Ask):
        chat["max_completion_tokens"] = ask.max_tokens
        if ask.stop_sequences:
            # White space alone is refused there; the model's own end is none of a client's sequences.
            chat["stop"] = ask.stop_sequences
        for name in ("temperature", "top_p", "top_k", *EXTENSIONS):
            if name != "chat_template_kwargs" and getattr(ask, name) is not None:
                chat[name] = getattr(ask, name)
    return chat


def _messages(ask: Counted) -> list[dict[str, Any]]:
    if not ask.messages:
        raise BadRequest("messages", "none", "at least one message")
    out: list[dict[str, Any]] = []
    if ask.system is not None:
        system = ask.system if isinstance(ask.system, str) else _joined(ask.system, "system")
        if system:
            out.append({"role": "system", "content": system})
    for place, message in enumerate(ask.messages):
        param = f"messages[{place}].content"
        if message.role == "assistant":
            out.append(_assistant(message, param))
        elif message.role == "system":
            out.append({"role": "system", "content": _text(message, param)})
        else:
            out += _user(message, param)
    return out


def _text(message: Message, param: str) -> str:
    return message.content if isinstance(message.content, str) else _joined(message.content, param)


def _joined(blocks: Sequence[Block], param: str) -> str:
    """Text blocks as one text."""
    return "\n".join(_text_of(block, f"{param}[{place}]") for place, block in enumerate(blocks))


def _text_of(block: Block, param: str) -> str:
    if block.type == "text":
        if block.text is None:
            raise BadRequest(f"{param}.text", None, "a text")
        return block.text
    if block.type == "document":
        source = block.source or {}
        if source.get("type") == "text" and isinstance(source.get("data"), str):
            title = f"{block.title}\n" if block.title else ""
            return title + str(source["data"])
        raise BadRequest(f"{param}.source", source.get("type"), "a source of the type text")
    if block.type == "image":
        raise BadRequest(param, "an image", "text: this model takes no images")
    raise BadRequest(f"{param}.type", block.type, "text")


def _assistant(message: Message, param: str) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    texts, thoughts, calls = [], [], []
    for place, block in enumerate(message.content):
        at = f"{param}[{place}]"
        if block.type == "tool_use":
            if not block.id or not block.name or block.input is None:
                raise BadRequest(at, "a tool_use without id, name or input", "all three of them")
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(_text_of(block, at))
    out: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
    if thoughts:
        out["reasoning_content"] = "\n".join(thoughts)
    if calls:
        out["tool_calls"] = calls
    return out


def _user(message: Message, param: str) -> list[dict[str, Any]]:
    """Results of tools come first, each as a message of its own; then what the user says."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results, texts = [], []
    for place, block in enumerate(message.content):
        at = f"{param}[{place}]"
        if block.type == "tool_result":
            if not block.tool_use_id:
                raise BadRequest(f"{at}.tool_use_id", block.tool_use_id, "the id of a tool_use block")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block, at)})
        else:
            texts.append(_text_of(block, at))
    if not texts and not results:
        raise BadRequest(param, [], "at least one block")
    return [*results, *([{"role": "user", "content": "\n".join(texts)}] if texts else [])]


def _result(block: Block, param: str) -> str:
    content = block.content
    if isinstance(content, list):
        try:
            content = _joined(msgspec.convert(content, list[Block]), f"{param}.content")
        except msgspec.ValidationError as error:
            raise BadRequest(f"{param}.content", str(error), "a text, or a list of text blocks") from None
    text = content or ""
    return f"Error: {text}" if block.is_error else text


def _choose_tools(ask: Counted, chat: dict[str, Any]) -> None:
    choice = ask.tool_choice
    if ask.tools:
        chat["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(ask.tools)]
    if choice is None:
        return
    if choice.type == "tool":
        if not choice.name:
            raise BadRequest("tool_choice.name", choice.name, "the name of a tool")
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.type == "any":
        chat["tool_choice"] = "required"
    elif ask.tools or choice.type == "auto":
        chat["tool_choice"] = choice.type if ask.tools else None
    if choice.disable_parallel_tool_use is not None:
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use


def _tool(tool: Tool, param: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise BadRequest(f"{param}.type", tool.type, "custom: tools that the client runs")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise BadRequest("output_config.format", form.get("type"), "json_schema, with a schema")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"], "strict": True}}
