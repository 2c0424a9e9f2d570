"""What a format of tool calls promises, and the nouns: tools, the choice among them, the pieces of an output.

A format is read by a machine that takes text in any pieces: what it says of a text, put together, does not depend on
where the text was cut, and it never raises. What is not a whole and valid call stays content, word for word.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from millstream.core.errors import BadRequest

MAX_TOOLS = 128
MAX_DESCRIPTION = 8192
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. `parameters` is a JSON Schema of its arguments.

    With `strict` a schema that cannot be enforced is refused; without it, what cannot be is passed over. Raises
    BadRequest for a name that no format can write.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise BadRequest(
                "name", self.name, "1 to 128 letters, digits and _ . : / - that begin with none of . : / -"
            )
        if not isinstance(self.description, str) or len(self.description) > MAX_DESCRIPTION:
            raise BadRequest("description", self.description, f"at most {MAX_DESCRIPTION} characters")
        if not isinstance(self.parameters, Mapping):
            raise BadRequest("parameters", self.parameters, "a JSON Schema: an object")

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of its arguments, which are an object whatever it says."""
        return {"type": "object", **self.parameters} if self.parameters else {"type": "object", "properties": {}}

    def told(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.schema}}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request and what is asked for: `mode` is auto, required or none; `only` names the one to call.

    Without `many` an output has one call at most. Raises BadRequest for doubled names, too many tools, and a choice
    that cannot be made.
    """

    tools: tuple[Tool, ...]
    mode: str = "auto"
    only: str | None = None
    many: bool = True

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise BadRequest("tools", f"{len(self.tools)} tools", f"at most {MAX_TOOLS}")
        names = [tool.name for tool in self.tools]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise BadRequest(f"tools[{i}].function.name", name, "each name once")
        if self.mode not in ("auto", "required", "none"):
            raise BadRequest("tool_choice", self.mode, "auto, required, none, or a function by its name")
        if self.only is not None and self.only not in names:
            raise BadRequest("tool_choice", self.only, f"one of tools: {', '.join(names) or 'there are none'}")
        if self.mode == "required" and not names:
            raise BadRequest("tool_choice", "required" if self.only is None else self.only, "none: tools has none")

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.only in (None, tool.name))

    @property
    def must(self) -> bool:
        return self.mode == "required"


# -- pieces of an output


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The `index`-th call of the output begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments of a call: all of them, joined, are JSON (unless the output was cut)."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallText


class Reader(Protocol):
    """Reads one output. The pieces of all `push` and of `finish`, merged, are the same however the text is cut."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What a grammar of calls is made of. `tools` are (name, schema as JSON text).

    `must`: there is a call; else `content` may come instead (the body of a Lark rule; None: any text, also before a
    call). `mark` writes a mark of the format, which may be a control token, as Lark.
    """

    tools: Sequence[tuple[str, str]]
    must: bool
    many: bool
    content: str | None
    mark: Callable[[str], str]
    is_token: Callable[[str], bool]


class ToolFormat(Protocol):
    """How a family of models writes calls. `marks` are the spellings that may be control tokens of the model.

    `native` is false for the one that is asked for in words, where a model's template knows no tools.
    """

    marks: tuple[str, ...]

    def matches(self, template: str) -> bool:
        """Whether a chat template writes its calls this way."""
        ...

    def reader(self, names: frozenset[str], certain: bool, many: bool) -> Reader:
        """`names` may be called. `certain`: a grammar holds the model to the format, so that the arguments of a call
        are told as they come; without one a call is told when it is whole, because only then it is known to be one.
        """
        ...

    def grammar(self, shape: Shape, template: str) -> str:
        """Lark whose sentences `reader` reads without loss."""
        ...

    def call_id(self, id: str) -> str:
        """An id of a call as this family's templates take it."""
        ...


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind made one; empty ones left out."""
    if len(pieces) < 2:
        # Nearly always: a stream's token is one piece, or none.
        return [piece for piece in pieces if isinstance(piece, CallStart) or piece.text]
    out: list[Piece] = []
    for kind, group in itertools.groupby(pieces, key=_kind):
        if kind[0] is CallStart:
            out += group
        elif text := "".join(piece.text for piece in group if not isinstance(piece, CallStart)):
            out.append(_MADE[kind[0]](text) if kind[0] is not CallText else CallText(kind[1], text))
    return out


_MADE: Mapping[type, Callable[[str], Piece]] = {Content: Content, Reasoning: Reasoning}


def _kind(piece: Piece) -> tuple[type, int]:
    return type(piece), piece.index if isinstance(piece, CallText | CallStart) else 0


@dataclass(slots=True)
class Call:
    """A whole call: `arguments` is JSON text."""

    name: str
    arguments: str = ""

    @property
    def valid(self) -> bool:
        """Whether the arguments are a JSON object: always, unless the output was cut."""
        try:
            return isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            return False


@dataclass(slots=True)
class Whole:
    """An output put together from its pieces."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Content):
                self.content += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning += piece.text
            elif isinstance(piece, CallStart):
                self.calls.append(Call(piece.name))
            else:
                self.calls[piece.index].arguments += piece.text
