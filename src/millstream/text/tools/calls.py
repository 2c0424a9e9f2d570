"""Calls in a stream of text: the machine that all formats are made of.

It takes a character at a time, so nothing it says can depend on where the text was cut. A state is a method that takes
one. While a call may still turn out not to be one, its text is kept, and given back as content when it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from millstream.text.tools.protocol import CallStart, CallText, Content, Piece, merged
from millstream.text.tools.scan import BLANKS, JsonScanner, Step, text_of

# A call that is not told before it is whole must not grow without bound.
MAX_CALL_CHARS = 1 << 20

ARGUMENTS = ("arguments", "parameters")


class CallObject:
    """A call as a JSON object with a name and arguments, in any order and with any other keys beside them.

    `push` says what the scanner says. `name` is set once it is known; `told(text)` gets the arguments: as they come
    where `early` and the name came first, else as a whole at the end.
    """

    def __init__(self, names: frozenset[str], early: bool, open: Callable[[str], None], told: Callable[[str], None]):
        self._names, self._early, self._open, self._told = names, early, open, told
        self._state = self._brace
        self._scanner = JsonScanner()
        self._raw: list[str] = []
        self._key = ""
        self._seen: set[str] = set()
        self._arguments: str | None = None
        self.name: str | None = None
        self.opened = False

    def push(self, char: str) -> Step:
        return self._state(char)

    def _brace(self, char: str) -> Step:
        self._state = self._first_key
        return Step.MORE if char == "{" else Step.BAD

    def _first_key(self, char: str) -> Step:
        return self._end() if char == "}" else self._before_key(char)

    def _before_key(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if char != '"':
            return Step.BAD
        self._begin(char)
        self._state = self._in_key
        return Step.MORE

    def _in_key(self, char: str) -> Step:
        step = self._scan(char)
        if step is Step.DONE:
            self._key = text_of("".join(self._raw)) or ""
            kind = "arguments" if self._key in ARGUMENTS else self._key
            if kind in self._seen and kind in ("arguments", "name"):
                return Step.BAD
            self._seen.add(kind)
            self._state = self._before_colon
            return Step.MORE
        return step

    def _before_colon(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        self._state = self._before_value
        return Step.MORE if char == ":" else Step.BAD

    def _before_value(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if self._key == "name" and char != '"':
            return Step.BAD
        if self._key in ARGUMENTS and char not in '{"n':
            return Step.BAD
        self._begin("")
        self._state = self._in_value
        if self._key in ARGUMENTS and char == "{" and self._early and self.name is not None:
            self._start(self.name)
            self._state = self._in_told
        return self._state(char)

    def _in_told(self, char: str) -> Step:
        step = self._scanner.push(char)
        if step in (Step.MORE, Step.DONE):
            self._told(char)
        if step is Step.DONE:
            self._arguments = ""
            self._state = self._before_comma
            return Step.MORE
        return step

    def _in_value(self, char: str) -> Step:
        step = self._scan(char)
        if step is Step.MORE or step is Step.BAD:
            return step
        if not self._take("".join(self._raw)):
            return Step.BAD
        self._state = self._before_comma
        # A number ends before the character that ends it.
        return self._before_comma(char) if step is Step.BEFORE else Step.MORE

    def _before_comma(self, char: str) -> Step:
        if char in BLANKS:
            return Step.MORE
        if char == ",":
            self._state = self._before_key
            return Step.MORE
        return self._end() if char == "}" else Step.BAD

    def _begin(self, first: str) -> None:
        self._scanner, self._raw = JsonScanner(), []
        if first:
            self._scan(first)

    def _scan(self, char: str) -> Step:
        step = self._scanner.push(char)
        if step is not Step.BEFORE:
            self._raw.append(char)
        return step

    def _take(self, raw: str) -> bool:
        """A value is whole: whether a call may have it."""
        if self._key == "name":
            self.name = text_of(raw)
            return self.name is not None and self.name in self._names
        if self._key in ARGUMENTS:
            if raw == "null":
                raw = "{}"
            elif raw[0] == '"':
                # Some models write the object once more as a string.
                inner = text_of(raw) or ""
                try:
                    if not isinstance(json.loads(inner), dict):
                        return False
                except (ValueError, RecursionError):
                    return False
                raw = inner
            elif raw[0] != "{":
                return False
            self._arguments = raw
        return True

    def _start(self, name: str) -> None:
        self.opened = True
        self._open(name)

    def _end(self) -> Step:
        if self.name is None:
            return Step.BAD
        if not self.opened:
            self._start(self.name)
            self._told(self._arguments if self._arguments is not None else "{}")
        return Step.DONE


class CallReader:
    """The base of a format's reader: content, marks in it, and calls. A format adds its states.

    Blanks beside a call belong to neither the call nor the content. Where one call is wanted, all that follows it is
    content.
    """

    def __init__(self, names: frozenset[str], certain: bool, many: bool, mark: str = "") -> None:
        self.names, self.certain, self.many, self.mark = names, certain, many, mark
        self.calls = 0
        self._out: list[Piece] = []
        self._blanks: list[str] = []  # may yet turn out to lie beside a call
        self._after_call = False
        self._matched = 0  # of the mark, in content
        self._raw: list[str] = []  # of what may become a call
        self._object: CallObject | None = None
        self._name = ""
        self._scanner = JsonScanner()
        self._args: list[str] = []
        self._told_early = False  # the arguments that are being read
        self._after: Callable[[str], None] = self.in_content
        self.state: Callable[[str], None] = self.in_content

    # -- what formats say

    def on_mark(self) -> None:
        """The mark was read: what follows may be a call."""

    def at_end(self) -> None:
        """The output ends here."""

    # -- Reader

    def push(self, text: str) -> list[Piece]:
        for char in text:
            self.state(char)
        return self._take()

    def finish(self) -> list[Piece]:
        self.at_end()
        if self._raw:
            self.give_up()
        self.content(self.mark[: self._matched])
        self._matched = 0
        if not self._after_call:
            self._out.append(Content("".join(self._blanks)))
        self._blanks = []
        return self._take()

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return merged(out)

    # -- content

    def in_content(self, char: str) -> None:
        mark = self.mark
        if not mark or (self.calls and not self.many):
            self.content(char)
        elif char == mark[self._matched]:
            self._matched += 1
            if self._matched == len(mark):
                self._matched = 0
                self.begin(mark)
                self.on_mark()
        else:
            # The first character of a mark occurs in it once: what was matched holds no other beginning.
            matched, self._matched = self._matched, 0
            self.content(mark[:matched])
            if char == mark[0]:
                self._matched = 1
            else:
                self.content(char)

    def content(self, text: str) -> None:
        for char in text:
            if char in BLANKS:
                self._blanks.append(char)
                continue
            if self._blanks and not self._after_call:
                self._out.append(Content("".join(self._blanks)))
            self._blanks, self._after_call = [], False
            self._out.append(Content(char))

    # -- calls

    def begin(self, raw: str) -> None:
        """From here on text is kept: it may be a call."""
        self._raw = [raw]

    def keep(self, char: str) -> bool:
        """Keeps a character of what may be a call; False where it has grown too long to be one."""
        self._raw.append(char)
        return len(self._raw) <= MAX_CALL_CHARS or self.certain

    def fail(self, char: str) -> None:
        """What was kept is no call; `char`, which showed it, is read again as content."""
        self.give_up()
        self.state = self.in_content
        self.state(char)

    def give_up(self) -> None:
        """What was kept is content, except for what was told as a call already."""
        raw, self._raw = "".join(self._raw), []
        opened = self._told_early or (self._object is not None and self._object.opened)
        self._object, self._told_early = None, False
        if not opened:
            self.content(raw)

    def call_object(self, after: Callable[[str], None]) -> None:
        """The next character begins a call's JSON object; when it is whole, `after` takes what follows."""
        index = self.calls
        self._object = CallObject(self.names, self.certain, self._opened, lambda text: self._told(index, text))
        self._after = after
        self.state = self._in_object

    def call_or_list(self, char: str) -> None:
        """Blanks, then one call or a list of them."""
        if char == "{":
            self.call_object(self.after_calls)
            self.state(char)
        elif char in BLANKS:
            self.keep(char)
        elif char == "[":
            self.keep(char)
            self.state = self.list_item
        else:
            self.fail(char)

    def list_item(self, char: str) -> None:
        if char == "{":
            self.call_object(self.list_next)
            self.state(char)
        elif char in BLANKS:
            self.keep(char)
        else:
            self.fail(char)

    def list_next(self, char: str) -> None:
        if char == "]":
            self.state = self.after_calls
        elif char == "," and self.many:
            self.begin(char)
            self.state = self.list_item
        elif char not in BLANKS:
            self.fail(char)

    def after_calls(self, char: str) -> None:
        """What follows a call, or a list of them."""
        self.state = self.in_content
        self.state(char)

    def arguments(self, name: str) -> None:
        """The next character begins the JSON object that a call of `name` has for arguments."""
        self._name, self._scanner, self._args = name, JsonScanner(), list[str]()
        self._told_early = self.certain
        if self.certain:
            self._opened(name)
        self.state = self._in_arguments

    def _in_arguments(self, char: str) -> None:
        fits = self.keep(char) and (char == "{" or bool(self._args))
        step = self._scanner.push(char) if fits else Step.BAD
        if step is Step.BAD:
            self._raw.pop()
            self.fail(char)
            return
        self._args.append(char)
        if self._told_early:
            self._told(self.calls - 1, char)
        if step is Step.DONE:
            if not self._told_early:
                self.tell(self._name, "".join(self._args))
            self.done()
            self._told_early = False
            self.state = self.after_calls

    def tell(self, name: str, arguments: str) -> None:
        """A call that is whole."""
        index = self.calls
        self._opened(name)
        self._told(index, arguments)
        self.done()

    def done(self) -> None:
        """The call is whole; its text is needed no more."""
        self._raw, self._object = [], None

    def _opened(self, name: str) -> None:
        self._blanks, self._after_call = [], True
        self._out.append(CallStart(self.calls, name))
        self.calls += 1

    def _told(self, index: int, text: str) -> None:
        self._out.append(CallText(index, text))

    def _in_object(self, char: str) -> None:
        assert self._object is not None
        step = self._object.push(char) if self.keep(char) else Step.BAD
        if step is Step.DONE:
            self.done()
            self.state = self._after
        elif step is Step.BAD:
            self._raw.pop()
            self.fail(char)


class JsonReader(CallReader):
    """An output that begins with JSON may be calls; further ones follow after blanks, or a separator."""

    separators = ""

    def __init__(self, names: frozenset[str], certain: bool, many: bool, mark: str = "") -> None:
        super().__init__(names, certain, many, mark)
        self.state = self.at_start

    def at_start(self, char: str) -> None:
        if char in BLANKS:
            self.content(char)
        elif char in "{[":
            self.begin("")
            self.state = self.call_or_list
            self.state(char)
        else:
            self.state = self.in_content
            self.state(char)

    def after_calls(self, char: str) -> None:
        if char in BLANKS:
            self.content(char)
        elif self.many and (char == "{" or char in self.separators):
            self.begin(char if char != "{" else "")
            self.state = self.call_or_list
            if char == "{":
                self.state(char)
        else:
            self.state = self.in_content
            self.state(char)
