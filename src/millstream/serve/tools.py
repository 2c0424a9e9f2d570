"""One chat with everything that holds its outputs, and its outputs as OpenAI's API tells them: deltas and messages.

A `ChatPlan` is what a chat's tools, response format and thinking come to for the model at hand. A `Turn` folds the text
of one output into deltas; the whole message is the fold of the same deltas, so the two can never differ.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.text import reasoning
from millstream.text.chat import ChatTemplate, encode_chat, template_of
from millstream.text.grammar.compiler import GrammarCompiler
from millstream.text.tokenizer import Tokenizer
from millstream.text.tools import plan
from millstream.text.tools.asked import toolbox_of
from millstream.text.tools.output import OutputReader
from millstream.text.tools.plan import AUTO, Ask, Dialect, dialect_of
from millstream.text.tools.protocol import CallStart, CallText, Content, Piece, Reasoning, Toolbox, merged

# A prompt's last tokens, to see whether they open the thinking.
_TAIL = 16


@dataclass(frozen=True, slots=True)
class Parsers:
    """How a served model writes calls and thinking: "auto" goes by its chat template.

    Without `guided` no grammar holds calls that the model makes of its own accord.
    """

    calls: str = AUTO
    reasoning: str = AUTO
    guided: bool = True


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat ready to be submitted: `ids` of its prompt, `structured` for its params, and how its outputs are read.

    `shown` are control tokens that the text of an output has to spell. `warnings` tell what is not enforced.
    """

    ids: list[int]
    structured: Structured | None
    dialect: Dialect
    toolbox: Toolbox | None
    opened: bool
    certain: bool
    shown: frozenset[int]
    thinks: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether an output's text is its content, and nothing need be read out of it."""
        return self.dialect.tags is None and (self.toolbox is None or not self.toolbox.callable)

    def turn(self) -> Turn:
        return Turn(plan.reader_of(self.dialect, self.toolbox, self.opened, self.certain, self.thinks))


async def plan_chat(
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    tool_choice: Any = None,
    parallel_tool_calls: Any = None,
    structured: tuple[Structured, str] | None = None,
    template: ChatTemplate | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    parsers: Parsers = Parsers(),
    thinks: bool = True,
    aside: Callable[..., Awaitable[list[int]]] | None = None,
) -> ChatPlan:
    """Everything about a chat that can be wrong is found here. Raises BadRequest naming the request's field.

    `structured` is what `serve/structured.py` made of the request; `thinks` false leaves thinking in the content.
    `aside` runs the writing of a long prompt elsewhere, so that an event loop goes on.
    """
    check_calls(messages)
    toolbox = toolbox_of(tools, tool_choice, parallel_tool_calls)
    source = None if template is None else template.source
    dialect = dialect_of(tokenizer, parsers.calls, parsers.reasoning, source)
    told, given = plan.prepared(dialect, messages, toolbox)
    written = template_of(tokenizer) if template is None else template
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    # A name of ours among the client's is an error of its own, and not two values for one argument.
    for name in template_kwargs or {}:
        if name in (*how, "tools", "messages", "tokenizer", "template", "tokenize"):
            raise BadRequest(f"chat_template_kwargs.{name}", name, "names that are the template's own")
    if aside is None:
        ids = encode_chat(tokenizer, written, told, tools=given, **how, **(template_kwargs or {}))
    else:
        ids = await aside(encode_chat, tokenizer, written, told, tools=given, **how, **(template_kwargs or {}))
    opened = dialect.tags is not None and reasoning.opened_by(tokenizer.decode(ids[-_TAIL:], False), dialect.tags)
    asked, param = structured or (None, "response_format")
    held = await plan.guide_async(compiler, Ask(dialect, tokenizer, toolbox, asked, opened, parsers.guided, param))
    return ChatPlan(
        ids,
        held.structured,
        dialect,
        toolbox,
        opened,
        held.certain,
        dialect.marks(tokenizer),
        thinks,
        held.warnings,
    )


def check_calls(messages: Sequence[Mapping[str, Any]]) -> None:
    """Calls and their results in a chat. Raises BadRequest naming the message's field."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        return  # told where the messages are checked
    known: set[str] = set()
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue
        for k, call in enumerate(message.get("tool_calls") or ()):
            where = f"messages[{i}].tool_calls[{k}]"
            if not isinstance(call, Mapping):
                raise BadRequest(where, call, "an object with id and function")
            function, id = call.get("function"), call.get("id")
            if not isinstance(id, str) or not id:
                raise BadRequest(f"{where}.id", id, "a string")
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise BadRequest(f"{where}.function", function, "an object with name and arguments")
            if not isinstance(function.get("arguments", ""), str | Mapping):
                raise BadRequest(f"{where}.function.arguments", function["arguments"], "a string of JSON")
            known.add(id)
        if message.get("role") == "tool":
            id = message.get("tool_call_id")
            if not isinstance(id, str) or not id:
                raise BadRequest(f"messages[{i}].tool_call_id", id, "the id of the call that it answers")
            if known and id not in known:
                raise BadRequest(f"messages[{i}].tool_call_id", id, "the id of a call in a message before it")


@dataclass(slots=True)
class Turn:
    """One output on its way to a client. `reasoning_tokens` are those of its thinking."""

    reader: OutputReader
    reasoning_tokens: int = 0
    ids: list[str] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=dict)

    def push(self, text: str, num_tokens: int) -> list[Piece]:
        """The pieces that are certain with more text, of so many more tokens."""
        before = self.reader.thinks
        pieces = self.reader.push(text)
        if before or self.reader.thinks or any(isinstance(piece, Reasoning) for piece in pieces):
            self.reasoning_tokens += num_tokens
        return self._keep(pieces)

    def finish(self) -> list[Piece]:
        """What was held back, when the output has ended."""
        return self._keep(self.reader.finish())

    def deltas(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Pieces as the `delta` of chunks: one for each, in order."""
        return [self._delta(piece) for piece in pieces]

    def finish_reason(self, reason: str) -> str:
        """`reason` as a chat says it: an output that stopped with calls did so for them."""
        return "tool_calls" if reason == "stop" and self.ids else reason

    def whole(self) -> dict[str, Any]:
        """The message of all pieces so far."""
        message: dict[str, Any] = {"role": "assistant", "content": self.message.get("content"), "refusal": None}
        if "reasoning_content" in self.message:
            message["reasoning_content"] = self.message["reasoning_content"]
        if self.ids:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": dict(function)}
                for id, function in zip(self.ids, self.message["calls"], strict=True)
            ]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        pieces = merged(pieces)
        for piece in pieces:
            if isinstance(piece, CallStart):
                self.ids.append(f"call_{secrets.token_hex(16)}")
                self.message.setdefault("calls", []).append({"name": piece.name, "arguments": ""})
            elif isinstance(piece, CallText):
                self.message["calls"][piece.index]["arguments"] += piece.text
            else:
                name = "content" if isinstance(piece, Content) else "reasoning_content"
                self.message[name] = self.message.get(name, "") + piece.text
        return pieces

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, Reasoning):
            return {"reasoning_content": piece.text}
        if isinstance(piece, CallStart):
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": self.ids[piece.index], "type": "function", "function": function}
            return {"tool_calls": [call]}
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
