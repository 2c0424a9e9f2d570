"""What tools mean for one model: the format of its calls, the prompt, the grammar, the reader of its output."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from millstream.core import registry
from millstream.core.errors import BadRequest
from millstream.core.request import MAX_STRUCTURED_CHARS, Structured
from millstream.text import reasoning
from millstream.text.chat import check_messages
from millstream.text.grammar.build import WHITESPACE
from millstream.text.grammar.compiler import Compiled, GrammarCompiler
from millstream.text.reasoning import Tags, Thinking
from millstream.text.tokenizer import Tokenizer
from millstream.text.tools import lark
from millstream.text.tools.output import OutputReader
from millstream.text.tools.prompt import in_words
from millstream.text.tools.protocol import Shape, Toolbox, ToolFormat

AUTO = "auto"
NONE = "none"
PLAIN = "plain"

_KNOWS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model writes calls and thinking. `native`: its template knows tools; else they are told in words."""

    name: str
    format: ToolFormat
    native: bool
    template: str
    tags: Tags | None

    def marks(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that are part of calls or of thinking: the text of an output has to show them."""
        spelled = [*self.format.marks, *((self.tags.open, self.tags.close) if self.tags is not None else ())]
        return frozenset(special.id for text in spelled if (special := tokenizer.facts.specials.get(text)) is not None)


def dialect_of(tokenizer: Tokenizer, calls: str = AUTO, thinking: str = AUTO, template: str | None = None) -> Dialect:
    """The dialect of a model, from its chat template. `calls` and `thinking` name another than "auto" finds.

    Raises UnknownName for a format that does not exist and BadRequest for tags that do not.
    """
    source = tokenizer.chat_template or "" if template is None else template
    if thinking not in (AUTO, NONE, *reasoning.KNOWN):
        raise BadRequest("reasoning_parser", thinking, ", ".join((AUTO, NONE, *reasoning.KNOWN)))
    tags = reasoning.tags_of(source) if thinking == AUTO else reasoning.KNOWN.get(thinking)
    return _dialect(source, calls, tags)


@functools.lru_cache(maxsize=64)
def _dialect(source: str, calls: str, tags: Tags | None) -> Dialect:
    knows = _KNOWS_TOOLS.search(source) is not None
    if calls != AUTO:
        return Dialect(calls, _format(calls), knows, source, tags)
    for name in registry.names("tools"):
        found = _format(name)
        if found.matches(source):
            return Dialect(name, found, knows, source, tags)
    return Dialect(PLAIN, _format(PLAIN), knows, source, tags)


def _format(name: str) -> ToolFormat:
    return cast(ToolFormat, registry.get("tools", name)())


# -- the prompt


def prepared(
    dialect: Dialect, messages: Sequence[Mapping[str, Any]], toolbox: Toolbox | None
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as the model's template is to get them. Tools that may not be called are not told."""
    tools = [tool.told() for tool in toolbox.tools] if toolbox is not None and toolbox.mode != NONE else []
    if tools or isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        check_messages(messages)
    if dialect.native:
        return [_with_ids(dialect.format, message) for message in messages], tools or None
    return in_words(messages, toolbox if tools else None), None


def _with_ids(form: ToolFormat, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with ids of calls as the template takes them."""
    changed: dict[str, Any] = {}
    if isinstance(id := message.get("tool_call_id"), str):
        changed["tool_call_id"] = form.call_id(id)
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str | bytes):
        changed["tool_calls"] = [
            {**call, "id": form.call_id(call["id"])} if isinstance(call, Mapping) and isinstance(call.get("id"), str)
            else call
            for call in calls
        ]  # fmt: skip
    return {**message, **changed} if changed else message


# -- the grammar


def schemas_of(toolbox: Toolbox) -> list[tuple[str, Structured]]:
    """The schemas of the tools that may be called, to be checked, and the parameter of the request that each is."""
    asked = []
    for i, tool in enumerate(toolbox.tools):
        if tool in toolbox.callable:
            param = f"tools[{i}].function.parameters"
            try:
                asked.append((param, Structured.json(closed(tool.schema), tool.strict)))
            except BadRequest as error:
                raise BadRequest(param, error.got, error.allowed) from None
    return asked


# Beside these, what an object may have is not all said by its properties.
_OPEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames",
                   "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not"})  # fmt: skip


def closed(schema: Any, depth: int = 0) -> Any:
    """A schema of arguments whose objects have the properties that it names, and no others where it does not say.

    A small model that may make arguments up does so without end.
    """
    if depth > 64:
        return schema
    if isinstance(schema, list):
        return [closed(item, depth + 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            out[key] = {name: closed(item, depth + 1) for name, item in value.items()}
        elif key in ("enum", "const", "default", "examples"):
            out[key] = value
        else:
            out[key] = closed(value, depth + 1)
    if isinstance(schema.get("properties"), Mapping) and not _OPEN & schema.keys():
        out["additionalProperties"] = False
    return out


def shape_of(
    dialect: Dialect,
    tokenizer: Tokenizer,
    toolbox: Toolbox | None,
    schemas: Sequence[Structured],
    structured: Structured | None,
    opened: bool,
    guided: bool = True,
) -> Structured | None:
    """The grammar of a whole output: calls of `toolbox`, what the client asked for, thinking before either.

    `schemas` are those of the callable tools (`schemas_of`), as a compiler has taken them.
    `opened`: the prompt has begun the thinking. Without `guided` calls are free unless one is required. None: nothing
    is to be enforced. Raises BadRequest for a grammar beside tools.
    """
    body = structured
    tools = toolbox.callable if toolbox is not None else ()
    if toolbox is not None and tools and (guided or toolbox.must):
        content = None if structured is None else content_rule(structured)
        shape = Shape(
            [
                (tool.name, lark.schema_text(json.loads(schema.text), schema.strict))
                for tool, schema in zip(tools, schemas, strict=True)
            ],
            toolbox.must,
            toolbox.many,
            content,
            _marker(tokenizer),
            lambda text: text in tokenizer.facts.specials,
        )
        text = dialect.format.grammar(shape, dialect.template)
        if len(text) > MAX_STRUCTURED_CHARS:
            raise BadRequest("tools", f"{len(text)} characters as a grammar", f"at most {MAX_STRUCTURED_CHARS}")
        body = Structured("grammar", text)
    if body is None or dialect.tags is None:
        return body
    return replace(body, lead=lead_of(dialect.tags, tokenizer, opened))


def content_rule(structured: Structured) -> str:
    """The body of a Lark rule for what a client asked of the content."""
    if structured.kind == "json_object":
        return "%json " + lark.schema_text({"type": "object"}, True)
    if structured.kind == "json_schema":
        schema = json.loads(structured.text)
        return "%json " + lark.schema_text(schema if isinstance(schema, dict) else {}, structured.strict)
    if structured.kind == "choice":
        return " | ".join(lark.literal(option) for option in json.loads(structured.text))
    raise BadRequest(f"structured.{structured.kind}", "beside tools", "JSON or a choice where there are tools as well")


def lead_of(tags: Tags, tokenizer: Tokenizer, opened: bool) -> str:
    """Lark of what may come before the answer of a model that thinks: its thinking, with blanks behind it."""
    mark, specials = _marker(tokenizer), tokenizer.facts.specials
    closing = f"TEXT {mark(tags.close)}" if tags.close in specials else "closing"
    blanks = f"/{WHITESPACE}/"
    start = f"{closing} {blanks}" if opened else f'({mark(tags.open)} {closing} {blanks} | "")'
    lazy = "" if tags.close in specials else f"closing[lazy]: TEXT {lark.literal(tags.close)}\n"
    return f"{start}\n{lazy}TEXT: {lark.ANY}"


def _marker(tokenizer: Tokenizer) -> Callable[[str], str]:
    def mark(text: str) -> str:
        special = tokenizer.facts.specials.get(text)
        return lark.literal(text) if special is None else f"<[{special.id}]>"

    return mark


@dataclass(frozen=True, slots=True)
class Guided:
    """What an output is held to (None: nothing), whether its calls are certain to be whole, and what is passed over."""

    structured: Structured | None
    certain: bool
    warnings: tuple[str, ...] = ()


def guide(compiler: GrammarCompiler, ask: Ask) -> Guided:
    """Has everything that an output is to be held to checked. Raises BadRequest, naming the part that is wrong."""
    steps = _steps(ask)
    answer: Compiled | BadRequest | None = None
    while True:
        try:
            structured, param = steps.send(answer)
        except StopIteration as done:
            return cast(Guided, done.value)
        try:
            answer = compiler.check(structured, param)
        except BadRequest as error:
            answer = error


async def guide_async(compiler: GrammarCompiler, ask: Ask) -> Guided:
    """The same, for an event loop."""
    steps = _steps(ask)
    answer: Compiled | BadRequest | None = None
    while True:
        try:
            structured, param = steps.send(answer)
        except StopIteration as done:
            return cast(Guided, done.value)
        try:
            answer = await compiler.check_async(structured, param)
        except BadRequest as error:
            answer = error


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of one output. `param` is the request's field that `structured` came from.

    `opened`: the prompt has begun the thinking. Without `guided` calls are free unless one must be made.
    """

    dialect: Dialect
    tokenizer: Tokenizer
    toolbox: Toolbox | None = None
    structured: Structured | None = None
    opened: bool = False
    guided: bool = True
    param: str = "structured"


def _steps(ask: Ask) -> Generator[tuple[Structured, str], Compiled | BadRequest | None, Guided]:
    warnings: list[str] = []
    taken: dict[str, Structured] = {}
    toolbox = ask.toolbox
    calls = toolbox is not None and bool(toolbox.callable)
    guided = calls and (ask.guided or (toolbox is not None and toolbox.must))
    asked = [(ask.structured, ask.param)] if ask.structured is not None else []
    if toolbox is not None and guided:
        asked += [(schema, param) for param, schema in schemas_of(toolbox)]
    for one, param in asked:
        answer = yield one, param
        if not isinstance(answer, Compiled):
            raise answer or BadRequest(param, one.kind, "a grammar")
        taken[param] = answer.structured
        warnings += (f"{param}: {warning}" for warning in answer.warnings)
    content = taken.pop(ask.param, None) if ask.structured is not None else None
    shape = shape_of(ask.dialect, ask.tokenizer, toolbox, list(taken.values()), content, ask.opened, ask.guided)
    if shape is None or shape == content:
        return Guided(shape, False, tuple(warnings))
    answer = yield shape, "tools" if guided else ask.param
    if isinstance(answer, Compiled):
        return Guided(answer.structured, guided, tuple(warnings))
    if toolbox is None or toolbox.must or content is not None or any(tool.strict for tool in toolbox.callable):
        raise answer or BadRequest("tools", "a grammar", "one")
    # Too much to be enforced, and nobody asked that it be: calls are read as they come.
    return Guided(None, False, (*warnings, "tools: calls are not enforced, their grammar is too large"))


# -- the reader


def reader_of(
    dialect: Dialect, toolbox: Toolbox | None, opened: bool, certain: bool, thinks: bool = True
) -> OutputReader:
    """What reads an output. `certain`: a grammar holds it to calls that are whole; `thinks`: thinking is told apart."""
    thinking = Thinking(dialect.tags, opened) if dialect.tags is not None and thinks else None
    tools = toolbox.callable if toolbox is not None else ()
    calls = None
    if toolbox is not None and tools:
        calls = dialect.format.reader(frozenset(tool.name for tool in tools), certain, toolbox.many)
    return OutputReader(thinking, calls)
