"""Chat messages -> prompt, through the model's own template, with neither side able to harm the other.

The *template* comes with the model file, so it is a program of a stranger. It runs in jinja2's immutable sandbox, and
beyond that under limits: time, size of every value, size of the output (`Limits`). Loops and macros are made to report
each turn, operators and methods that can multiply their input are checked before they run.

The *messages* come from a user, who may write `<|im_end|>` to forge a turn. `encode_chat` breaks every control-token
spelling inside the user's strings with a noncharacter, renders, cuts the result at the spellings that are left (all the
template's own), and takes the breaks out of the text between them. That text is then encoded as plain text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from millstream.core.errors import BadRequest
from millstream.text.tokenizer import SpecialSplitter, Tokenizer, check_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
# Templates compare these with words of their own, and users do not choose them freely.
_STRUCTURAL = frozenset({"role", "type"})
_ITERATES_PARTS = re.compile(r"\bin\s+\w+(?:\.content|\[\s*['\"]content['\"]\s*\])(?!\s*(?:\.|\[|\())")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a template may use: seconds, characters of any one value and of the output, characters of its source."""

    time_s: float = 1.0
    value_chars: int = 8_000_000
    output_chars: int = 8_000_000
    source_chars: int = 131_072
    items: int = 200_000
    depth: int = 64


class ChatTemplate:
    """A chat template and the two token spellings that it may write.

    `clock` and `now` exist for tests. Nothing is compiled before the first `render`. Thread-safe.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        *,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises BadRequest when `source` is no str or longer than the limit."""
        check_text("chat_template", source)
        if len(source) > limits.source_chars:
            raise BadRequest("chat_template", f"{len(source)} characters", f"at most {limits.source_chars}")
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.limits = limits
        self.takes_parts = _ITERATES_PARTS.search(source) is not None
        self._clock, self._now = clock, now

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        environment = _Environment(self._now)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise BadRequest(
                "chat_template", f"line {error.lineno}: {error.message}", "a template that jinja2 can compile"
            ) from None
        except (Exception, RecursionError) as error:
            raise BadRequest("chat_template", _told(error), "a template that jinja2 can compile") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a chat.

        A message is a mapping of role and content: a str, None, or a list of `{"type": "text", "text": ...}` parts,
        which are joined by line breaks unless the template goes through the parts itself. A tool call's JSON
        arguments are parsed for the template. `continue_final_message` ends the prompt right after the last message's
        text, for the model to go on with it. Further keywords go to the template. Raises BadRequest, naming
        `messages[3].content` or `chat_template`, for wrong messages and for a template that fails, refuses, or breaks
        its limits.
        """
        given = self._prepare(messages, add_generation_prompt, tools, continue_final_message, kwargs)
        return self._run(given, continue_final_message, _absent(_texts(given), 1)[0])

    def _prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        for name in kwargs:
            if name in _RESERVED:
                raise BadRequest(f"chat_template_kwargs.{name}", kwargs[name], f"any name but {', '.join(_RESERVED)}")
        checked = check_messages(messages, self.limits, keep_parts=self.takes_parts)
        if continue_final_message:
            if add_generation_prompt and checked[-1]["role"] != "assistant":
                raise BadRequest("continue_final_message", True, "a last message of the role assistant")
            if not checked[-1].get("content"):
                raise BadRequest(
                    f"messages[{len(checked) - 1}].content", checked[-1].get("content"), "text to go on with"
                )
            add_generation_prompt = False
        if tools is not None:
            if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
                raise BadRequest("tools", tools, "a list of JSON objects, or None")
            for i, tool in enumerate(tools):
                if not isinstance(tool, Mapping):
                    raise BadRequest(f"tools[{i}]", tool, "a JSON object")
        given = {name: _plain(value, f"chat_template_kwargs.{name}", self.limits) for name, value in kwargs.items()}
        given["messages"] = checked
        given["tools"] = _plain(tools, "tools", self.limits) or None
        given["add_generation_prompt"] = bool(add_generation_prompt)
        return given

    def _run(self, given: dict[str, Any], continue_final_message: bool, mark: str) -> str:
        if continue_final_message:
            given = {**given, "messages": [*given["messages"][:-1], _with_mark(given["messages"][-1], mark)]}
        text = self._render(given)
        if continue_final_message:
            at = text.rfind(mark)
            if at < 0:
                raise BadRequest("continue_final_message", True, "a chat whose template writes out the last message")
            text = text[:at]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest(
                "chat_template", "a lone surrogate in its output", "a template that writes Unicode"
            ) from None
        return text

    def _render(self, given: Mapping[str, Any]) -> str:
        template = self._template
        limits = self.limits
        budget = _Budget(limits, self._clock, self._clock() + limits.time_s)
        token = _budget.set(budget)
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(**given, bos_token=self.bos_token, eos_token=self.eos_token):
                size += len(piece)
                if size > limits.output_chars:
                    raise _OverLimit(f"its output is longer than {limits.output_chars} characters")
                pieces.append(piece)
        except _Refused as error:
            raise BadRequest("messages", str(error), "what the model's chat template accepts") from None
        except (_OverLimit, SecurityError) as error:
            raise BadRequest(
                "chat_template", str(error), "a template that keeps to the sandbox and its limits"
            ) from None
        except RecursionError:
            raise BadRequest("chat_template", "endless recursion", "a template that ends") from None
        except MemoryError:
            raise BadRequest("chat_template", "too much memory", "a template that keeps to its limits") from None
        except Exception as error:
            raise BadRequest("chat_template", _told(error), "messages and a template that fit each other") from None
        finally:
            _budget.reset(token)
        return "".join(pieces)


def template_of(tokenizer: Tokenizer, name: str = "default") -> ChatTemplate:
    """The model's own chat template. Raises BadRequest, saying what to do instead, when it has none of that name."""
    source = tokenizer.chat_templates.get(name)
    if source is None:
        if not tokenizer.chat_templates:
            raise BadRequest(
                "messages",
                "a chat",
                "plain text only: this is a base model without a chat template; complete a text prompt instead, or "
                "pass a chat_template of your own",
            )
        raise BadRequest("chat_template", name, f"one of: {', '.join(sorted(tokenizer.chat_templates))}")
    bos = "" if tokenizer.bos_id is None else tokenizer.spelling_of(tokenizer.bos_id)
    eos = "" if tokenizer.eos_id is None else tokenizer.spelling_of(tokenizer.eos_id)
    return ChatTemplate(source, bos, eos)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> list[int]:
    """Ids of a chat: control ids where the template wrote them, and nowhere else.

    No BOS is added: a template writes its own. For messages that spell no control token this is
    `encode(render(...), add_bos=False, parse_special=True)`. Raises what `ChatTemplate.render` raises.
    """
    given = template._prepare(messages, add_generation_prompt, tools, continue_final_message, kwargs)
    splitter = tokenizer.splitter
    brk, mark = _absent([*_texts(given), template.source, splitter.spellings], 2)
    given = _broken(given, splitter, brk, "")
    text = template._run(given, continue_final_message, mark)
    # A template's tojson may have escaped the noncharacter.
    escaped = f"\\u{ord(brk):04x}"
    return tokenizer.encode_segments(
        segment if isinstance(segment, int) else segment.replace(brk, "").replace(escaped, "")
        for segment in splitter.split(text)
    )


def check_messages(
    messages: Sequence[Mapping[str, Any]],
    limits: Limits = Limits(),
    *,
    keep_parts: bool = False,
) -> list[dict[str, Any]]:
    """Plain copies of the messages, fit for a template. Raises BadRequest naming the part that is wrong."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise BadRequest("messages", messages, "a list of messages such as {'role': 'user', 'content': 'Hello'}")
    if not messages:
        raise BadRequest("messages", messages, "at least one message")
    return [_message(message, f"messages[{i}]", limits, keep_parts) for i, message in enumerate(messages)]


def _message(message: object, where: str, limits: Limits, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(where, message, "an object with role and content")
    checked = cast(dict[str, Any], _plain(message, where, limits))
    role = checked.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where}.role", role, f"one of: {', '.join(ROLES)}")
    content = checked.setdefault("content", None)
    if content is None and role not in ("assistant", "model"):
        raise BadRequest(f"{where}.content", None, "a str or a list of text parts (only an assistant's may be null)")
    if isinstance(content, list):
        for i, part in enumerate(content):
            place = f"{where}.content[{i}]"
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise BadRequest(f"{place}.type", kind, "'text': this model reads text only")
            if not isinstance(part.get("text"), str):
                raise BadRequest(f"{place}.text", part.get("text"), "a str")
        if not keep_parts:
            checked["content"] = "\n".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"{where}.content", content, "a str, a list of text parts, or null")
    calls = checked.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRequest(f"{where}.tool_calls", calls, "a list of objects")
        for call in calls:
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"])
                except (ValueError, RecursionError):
                    continue
    return checked


def _plain(value: object, where: str, limits: Limits, depth: int = 0) -> Any:
    """A copy of JSON-like `value`, so that a template never holds an object of ours."""
    if depth > limits.depth:
        raise BadRequest(where, "deeper nesting", f"at most {limits.depth} levels")
    if isinstance(value, str):
        return str(check_text(where, value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadRequest(where, key, "str keys")
        return {
            check_text(where, key): _plain(item, f"{where}.{key}", limits, depth + 1) for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{where}[{i}]", limits, depth + 1) for i, item in enumerate(value)]
    raise BadRequest(where, value, "JSON: a str, number, bool, null, list or object")


def _with_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + mark}
    return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]}


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _absent(texts: Iterable[str], count: int) -> list[str]:
    """Noncharacters that none of the texts holds, raw or as a JSON escape."""
    # What a text could hold that would confuse us is far rarer than text, so one pass over its rare characters does.
    present: set[str] = set()
    escaped: set[str] = set()
    for text in texts:
        present.update(char for char in set(text) if char >= "\ue000")
        if "\\u" in text or "ufd" in text.lower():
            escaped.update(found.lower() for found in re.findall(r"u([0-9a-fA-F]{4})", text))
    candidates = itertools.chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900))
    unused = (chr(c) for c in candidates if chr(c) not in present and f"{c:04x}" not in escaped)
    free = list(itertools.islice(unused, count))
    if len(free) < count:
        raise BadRequest("messages", "every private-use character there is", "text that leaves some of them unused")
    return free


def _broken(value: Any, splitter: SpecialSplitter, brk: str, name: str, content: bool = False) -> Any:
    """`value` with `brk` put into each control-token spelling that its strings hold, or could become part of."""
    if isinstance(value, str):
        if name in _STRUCTURAL and value.isidentifier():
            return value
        return _broken_text(value, splitter, brk, content)
    if isinstance(value, dict):
        return {
            _broken_text(key, splitter, brk, False): _broken(
                item, splitter, brk, key, content or key == "messages" or key in ("content", "text")
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_broken(item, splitter, brk, name, content) for item in value]
    return value


def _broken_text(text: str, splitter: SpecialSplitter, brk: str, content: bool) -> str:
    cuts = {start + 1 for start, _, _ in splitter.matches(text, overlapping=True)}
    # The template may put the string (with its white space trimmed) right beside text that completes a spelling.
    begin = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    if begin < end and splitter.longest:
        reach = splitter.longest
        if any(text[begin : begin + n] in splitter.suffixes for n in range(1, min(reach, end - begin) + 1)):
            cuts.add(begin)
        if any(text[end - n : end] in splitter.prefixes for n in range(1, min(reach, end - begin) + 1)):
            cuts.add(end)
        if content and end - begin < reach and text[begin:end] in splitter.spellings:
            cuts |= {begin, end}
    if not cuts:
        return text
    parts: list[str] = []
    done = 0
    for cut in sorted(cuts):
        parts += (text[done:cut], brk)
        done = cut
    return "".join(parts) + text[done:]


def _told(error: BaseException) -> str:
    told = f"{type(error).__name__}: {error}" if not isinstance(error, jinja2.UndefinedError) else str(error)
    return told if len(told) <= 200 else told[:197] + "..."


# ---------------------------------------------------------------------------------------------- the bounded sandbox


class _Refused(Exception):
    """The template called raise_exception."""


class _OverLimit(Exception):
    """The template went over one of its limits."""


@dataclasses.dataclass(slots=True)
class _Budget:
    limits: Limits
    clock: Callable[[], float]
    deadline: float
    static_chars: int = 0
    shown_chars: int = 0

    def charge(self, static_chars: int = 0) -> None:
        self.static_chars += static_chars
        if self.static_chars > 8 * self.limits.output_chars:
            raise _OverLimit("it writes too much text")
        if self.clock() > self.deadline:
            raise _OverLimit(f"it runs longer than {self.limits.time_s:g} s")

    def size(self, chars: int) -> None:
        if chars > self.limits.value_chars:
            raise _OverLimit(f"a value of more than {self.limits.value_chars} characters")

    def value(self, value: Any) -> Any:
        """`value` itself; refused when writing it out would take too much, also through parts that are shared."""
        if isinstance(value, str):
            self.size(len(value))
        elif isinstance(value, list | tuple | dict | Namespace):
            items = chars = 0
            stack = [value]
            while stack:
                one = stack.pop()
                items += 1
                if isinstance(one, str):
                    chars += len(one)
                elif isinstance(one, Mapping):
                    stack += one.keys()
                    stack += one.values()
                elif isinstance(one, Namespace):
                    stack += object.__getattribute__(one, "_Namespace__attrs").values()
                elif isinstance(one, list | tuple):
                    stack += one
                if items + len(stack) > self.limits.items:
                    raise _OverLimit(f"a value of more than {self.limits.items} parts")
            self.size(chars)
        return value


_budget: ContextVar[_Budget] = ContextVar("_budget")


class _Report(NodeTransformer):
    """Makes each turn of a loop and each macro call report to the budget, and checks what literals and `~` build."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            static = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            turn = nodes.Output([self._call("report", nodes.Const(static))])
            node.body = [turn, *node.body]
        elif isinstance(node, nodes.Concat):
            node = self._call("concat_values", nodes.List(node.nodes))
        elif (
            (isinstance(node, nodes.List) or (isinstance(node, nodes.Tuple) and node.ctx == "load"))
            and any(not isinstance(item, nodes.Const) for item in node.items)
        ) or (isinstance(node, nodes.Dict) and any(not isinstance(pair.value, nodes.Const) for pair in node.items)):
            node = self._call("checked", node)
        return node

    @staticmethod
    def _call(name: str, argument: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_FILTER_NAMES = """
abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby indent int
items join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort
string striptags title trim truncate unique upper wordcount
"""
_STR_METHOD_NAMES = """
capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal
isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
_STR_METHODS = frozenset(_STR_METHOD_NAMES.split())
_OTHER_METHODS: Mapping[type, frozenset[str]] = {
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
_WIDTH = re.compile(r"[0-9]{5,}|\*")
_NESTED = re.compile(r"\{[^{}]*\{")


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, whose every operation is bounded by the budget of the render that runs it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            # Constants are not folded: what is folded runs at compile time, outside of any budget.
            optimized=False,
            autoescape=False,
            finalize=_shown,
            cache_size=0,
        )
        kept = {name: self.filters[name] for name in _FILTER_NAMES.split()}
        self.filters = {name: self._bounded(name, function) for name, function in kept.items()}
        self.filters["tojson"] = self._bounded("tojson", _tojson)
        self.filters["sum"] = self._bounded("sum", _sum)
        self.globals = {
            key: self.globals[key] for key in ("range", "dict", "namespace", "cycler", "joiner") if key in self.globals
        }
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = functools.partial(_strftime, now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if tree.find(kind) is not None:
                raise jinja2.TemplateSyntaxError("a chat template is one file", 1, name, filename)
        tree = cast(nodes.Template, _Report().visit(tree))
        tree.set_environment(self)
        for node in tree.find_all(nodes.Node):
            if node.lineno is None:
                node.lineno = 1
        return tree

    def report(self, static_chars: int) -> str:
        _budget.get().charge(static_chars)
        return ""

    def checked(self, value: Any) -> Any:
        return _budget.get().value(value)

    def concat_values(self, values: list[Any]) -> str:
        budget = _budget.get()
        budget.value(values)
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.charge()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType) and owner is not None:
            if isinstance(owner, str):
                _check_str_method(budget, owner, __obj.__name__, args, kwargs)
                if __obj.__name__ == "join":
                    args = (list(args[0]),) if args else args
                    budget.size(_joined_size(owner, args[0] if args else []))
            elif __obj.__name__ not in _OTHER_METHODS.get(type(owner), frozenset()):
                raise SecurityError(f"{type(owner).__name__}.{__obj.__name__} is not allowed")
        return budget.value(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            source = str(value.__self__)
            if _WIDTH.search(source) or _NESTED.search(source):
                raise SecurityError("format with a very large or a computed width")
            budget = _budget.get()
            fields = source.count("{")

            @functools.wraps(wrapped)
            def bounded(*args: Any, **kwargs: Any) -> str:
                budget.size(len(source) + fields * _written(budget, [*args, *kwargs.values()]))
                return wrapped(*args, **kwargs)

            return bounded
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            if not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64):
                raise _OverLimit("a power with an exponent over 64")
            _check_int(left)
        elif operator == "%" and isinstance(left, str):
            if _WIDTH.search(left):
                raise SecurityError("format with a very large or a computed width")
            budget.size(len(left) + left.count("%") * _written(budget, [right]))
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            if isinstance(left, str):
                budget.size(len(left) + len(right))
            elif len(left) + len(right) > budget.limits.items:
                raise _OverLimit(f"a list of more than {budget.limits.items} items")
        result = super().call_binop(context, operator, left, right)
        return budget.value(result)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            budget = _budget.get()
            budget.charge()
            # Some filters take the context, the environment or its settings first.
            values = list(args[1:] if getattr(function, "jinja_pass_arg", None) is not None else args)
            _check_filter(budget, name, values, kwargs)
            return budget.value(function(*args, **kwargs))

        return bounded


def _check_filter(budget: _Budget, name: str, values: list[Any], kwargs: Mapping[str, Any]) -> None:
    options = [*values[1:], *kwargs.values()]
    value = values[0] if values else ""
    if name in ("batch", "center", "indent", "round", "slice", "tojson", "truncate", "int"):
        bound = 64 if name == "tojson" else 10_000
        for option in options:
            if isinstance(option, int) and abs(option) > bound:
                raise _OverLimit(f"the filter {name} with {option}")
    if name == "indent":
        widths = [len(o) if isinstance(o, str) else int(o) for o in options if isinstance(o, int | str)]
        text = str(value)
        budget.size(len(text) + (text.count("\n") + 1) * max(widths, default=4))
    elif name == "replace":
        text = str(value)
        new = str(options[1]) if len(options) > 1 else ""
        budget.size(len(text) + (text.count(str(options[0])) if options else 0) * len(new))
    elif name == "format":
        if _WIDTH.search(str(value)):
            raise SecurityError("format with a very large or a computed width")
        budget.size(len(str(value)) + str(value).count("%") * _written(budget, options))
    elif name in ("join", "string", "tojson", "escape", "e", "forceescape"):
        if isinstance(value, list | tuple | dict):
            budget.value(value)
        if name == "join" and isinstance(value, list | tuple):
            budget.size(_joined_size(str(options[0]) if options else "", value))


def _check_str_method(budget: _Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if name not in _STR_METHODS:
        raise SecurityError(f"str.{name} is not allowed")
    if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        budget.size(args[0])
    elif name == "expandtabs":
        width = next((v for v in (*args, *kwargs.values()) if isinstance(v, int)), 8)
        budget.size(len(text) + text.count("\t") * max(width, 0))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.size(len(text) + text.count(args[0]) * len(args[1]))


def _check_product(budget: _Budget, left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str) and isinstance(other, int):
            budget.size(len(one) * max(other, 0))
        elif isinstance(one, list | tuple) and isinstance(other, int) and len(one) * other > budget.limits.items:
            raise _OverLimit(f"a list of more than {budget.limits.items} items")
    _check_int(left)
    _check_int(right)


def _check_int(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > 4096:
        raise _OverLimit("a number of more than 4096 bits")


def _written(budget: _Budget, values: list[Any]) -> int:
    """An upper bound, roughly, of the characters that writing these values out takes."""
    chars = 0
    for value in values:
        budget.value(value)
        chars += len(value) if isinstance(value, str) else len(str(value))
    return chars


def _joined_size(separator: str, items: Sequence[Any]) -> int:
    return len(separator) * len(items) + sum(len(item) for item in items if isinstance(item, str))


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    """Counts what `{{ ... }}` writes, also inside of blocks that are captured in a variable."""
    budget = _budget.get()
    budget.value(value)
    text = value if isinstance(value, str) else str(value)
    budget.shown_chars += len(text)
    if budget.shown_chars > 4 * budget.limits.output_chars:
        raise _OverLimit("it writes too much text")
    return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sum(values: Iterable[Any], attribute: str | None = None, start: float = 0) -> float:
    total = start
    for value in values:
        item = value if attribute is None else value[attribute]
        if not isinstance(item, int | float):
            raise TypeError("sum takes numbers")
        total += item
    return total


def _raise_exception(message: object) -> None:
    raise _Refused(str(message)[:500])


def _strftime(now: Callable[[], datetime], form: str) -> str:
    if len(form) > 200 or re.search(r"\d{3,}", form):
        raise _OverLimit("strftime_now with a very long format")
    return now().strftime(form)
