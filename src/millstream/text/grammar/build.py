"""A `Structured` made into a matcher over a model's vocabulary, by llguidance.

The worker process and the engine build the same thing from the same text, so what the one got through, the other does.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol, cast

from millstream.core.errors import MillstreamError
from millstream.core.request import Structured
from millstream.text.vocabulary import Vocabulary

# Between the parts of JSON; without a bound a small model may go on with blanks for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"

# What one mask may cost at most, here about 15 ms, and what the automata of one output may keep, some 20 MB.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 16_000,
    "max_grammar_size": 500_000,
}

MISSING = "structured output needs llguidance: pip install 'millstream[serve]'"


class BadGrammar(MillstreamError):
    """A grammar that cannot be built, or that no output can fulfil. The message says why in one line."""


class Matcher(Protocol):
    """What we use of llguidance's matcher. Not thread-safe; the heavy calls release the GIL."""

    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...
    def get_grammar_warnings(self) -> list[str]: ...
    def is_accepting(self) -> bool: ...
    def is_stopped(self) -> bool: ...
    def stop_reason(self) -> str: ...
    def consume_token(self, sampled_token: int) -> bool: ...
    def compute_bitmask(self) -> bytes: ...
    def deep_copy(self) -> Matcher: ...


def installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def make_tokenizer(vocabulary: Vocabulary, size: int, stop_ids: Iterable[int]) -> Any:
    """llguidance's view of ids 0 to `size` - 1 (0.1 s for 49,152 of them).

    Control tokens match no text of a grammar; a stop id is allowed where the grammar may end. Where only one text can
    follow, its tokens are those that the model's own tokenizer would cut it into.
    """
    import llguidance
    from llguidance._tokenizer import TokenizerWrapper

    # One more id than there are, for a model without an end token: such an output ends when its grammar is complete.
    ends = sorted(token for token in stop_ids if 0 <= token < size) or [size]
    wrapped = TokenizerWrapper(_Source(vocabulary, size, ends[0]))
    return llguidance.LLTokenizer(wrapped, n_vocab=max(size, ends[0] + 1), eos_token=ends)


class _Source:
    """What `TokenizerWrapper` asks for."""

    def __init__(self, vocabulary: Vocabulary, size: int, eos: int) -> None:
        known = vocabulary.all_bytes()[:size]
        self.tokens = [*known, *([b""] * (max(size, eos + 1) - len(known)))]
        if eos == size:
            self.tokens[eos] = b"<eos>"
        self.special_token_ids = sorted({*(t for t in vocabulary.special_ids if t < size), eos})
        self.eos_token_id = eos
        self.bos_token_id: int | None = None
        self._cut = vocabulary.cut

    def __call__(self, text: str) -> list[int]:
        # Whether it takes bytes is found out by a call with some.
        if not isinstance(text, str):
            raise TypeError("a str is wanted")
        return self._cut(text)


def build(tokenizer: Any, structured: Structured) -> Matcher:
    """A matcher at its start. Raises BadGrammar."""
    import llguidance

    try:
        source = _source(structured)
    except (ValueError, RecursionError) as error:
        raise BadGrammar(_line(str(error))) from None
    limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)
    matcher = cast(Matcher, llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits))
    raise_error(matcher)
    return matcher


def raise_error(matcher: Matcher) -> None:
    """Raises BadGrammar when the matcher has gone into its error state."""
    if matcher.is_error():
        text = matcher.get_error()
        told = _line(text)
        # Its name for: no byte could follow, and the end is not reached either.
        raise BadGrammar("no output can fulfil it" if told in ("", "NoExtensionBias", "NoExtension") else told)


def _source(structured: Structured) -> str:
    body = _body(structured)
    if not structured.lead:
        return body
    # Lark it leaves as it is.
    grammars = json.loads(body)["grammars"] if body.startswith("{") else [{"lark_grammar": body}]
    whole = {"lark_grammar": f"%llguidance {{}}\nstart: lead @body\nlead: {structured.lead}\n"}
    return json.dumps({"grammars": [whole, {**grammars[0], "name": "body"}, *grammars[1:]]})


def _body(structured: Structured) -> str:
    from llguidance import LLMatcher

    kind, text = structured.kind, structured.text
    if kind in ("json_object", "json_schema"):
        options = {
            "whitespace_flexible": True,
            "whitespace_pattern": WHITESPACE,
            "lenient": not structured.strict,
            "coerce_one_of": not structured.strict,
        }
        schema = text if kind == "json_schema" else '{"type": "object"}'
        if schema.strip() == "true":
            schema = "{}"
        return LLMatcher.grammar_from_json_schema(schema, overrides=cast(Any, options))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        options_text = "|".join(_literal(option) for option in json.loads(text))
        return LLMatcher.grammar_from_regex(f"({options_text})")
    return LLMatcher.grammar_from_lark(text)


_META = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def _literal(text: str) -> str:
    """`text` as a regular expression of Rust that matches it and nothing else."""
    return _META.sub(lambda found: "\\" + found[0], text)


def _line(error: str) -> str:
    """An error of llguidance in one line: of a drawing of the place, what it says of it."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and line.strip() != "<non-verbose/>"]
    told = next((line for line in lines if line.startswith("error: ")), None)
    first = lines[0] if lines else ""
    text = f"{first.rstrip(':')}: {told.removeprefix('error: ')}" if told else first
    return text if len(text) <= 300 else text[:297] + "..."
