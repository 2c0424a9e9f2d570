"""The process in which grammars of clients are compiled: started with pipes, killed when one takes too long.

It ends by itself when its pipe is closed, when a compile outlives twice its time, and when memory runs out.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import threading
from dataclasses import replace
from typing import Any

import msgspec

from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.text.grammar.build import BadGrammar, build, make_tokenizer, raise_error
from millstream.text.grammar.check import Refused, checked, without_patterns
from millstream.text.grammar.wire import Ask, Tokens, Verdict, frame, read_frame
from millstream.text.vocabulary import Vocabulary

# Smaller than the stacks on which the engine builds and steps matchers: what fits here fits there.
STACK_BYTES = 2 << 20


def main(time_s: float, memory_bytes: int) -> None:
    """Serves until stdin ends. `memory_bytes` is what compiling may take beyond what the process has at its start."""
    with contextlib.suppress(OSError):
        os.nice(10)
    # Nothing of a client's text may end up in a log or a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inlet, outlet = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(inlet.read)
    if first is None:
        return
    known = msgspec.msgpack.decode(first, type=Tokens)
    tokenizer = make_tokenizer(Vocabulary.from_bytes(known.tokens, known.special_ids), known.size, known.stop_ids)
    _bound_memory(memory_bytes)
    outlet.write(frame(Verdict()))  # ready
    outlet.flush()
    while (data := read_frame(inlet.read)) is not None:
        ask = msgspec.msgpack.decode(data, type=Ask)
        # Should the parent be gone, nobody else would end an endless compile.
        signal.setitimer(signal.ITIMER_REAL, 2 * time_s)
        verdict = _on_small_stack(tokenizer, ask)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outlet.write(frame(verdict))
        outlet.flush()


def judge(tokenizer: Any, ask: Ask) -> Verdict:
    """Compiles a grammar as the engine will, up to the first mask."""
    try:
        structured = checked(Structured(ask.kind, ask.text, ask.strict, ask.lead))
        try:
            return _taken(tokenizer, structured)
        except BadGrammar as error:
            if structured.kind != "json_schema" or structured.strict or not _LOOKS_AROUND.search(str(error)):
                raise
            # Patterns were not asked to be kept to the letter, and these no automaton can.
            verdict = _taken(tokenizer, replace(structured, text=without_patterns(structured.text)))
            return msgspec.structs.replace(verdict, warnings=("pattern is not enforced", *verdict.warnings[:7]))
    except Refused as error:
        return Verdict(got=error.got, allowed=error.allowed)
    except BadRequest as error:
        return Verdict(got=str(error.got)[:200], allowed=error.allowed)
    except BadGrammar as error:
        return Verdict(got=_named(str(error)) if ask.kind == "json_schema" else str(error), allowed=_ALLOWED[ask.kind])
    except (MemoryError, RecursionError):
        return Verdict(got=f"a {ask.kind} that takes too much memory", allowed="a simpler one")


_LOOKS_AROUND = re.compile(r"look-?around|look-?ahead|look-?behind|backreference", re.IGNORECASE)


def _taken(tokenizer: Any, structured: Structured) -> Verdict:
    matcher = build(tokenizer, structured)
    matcher.compute_bitmask()
    raise_error(matcher)
    if structured.kind == "json_object":
        return Verdict(structured.text)
    return Verdict(structured.text, tuple(warning[:200] for warning in matcher.get_grammar_warnings()[:8]))


# How llguidance's errors begin that do not say which keyword they are about.
_KEYWORDS = (
    ("Pointer ", "$ref"),
    ("Invalid type", "type"),
    ("regex parse error", "pattern"),
    ("lookarounds", "pattern"),
    ("Unknown format", "format"),
)


def _named(error: str) -> str:
    if error.startswith("Resource "):
        return "$ref: a reference outside of the schema; none is fetched"
    return next((f"{keyword}: {error}" for start, keyword in _KEYWORDS if error.startswith(start)), error)


_ALLOWED = {
    "json_object": "a JSON object",
    "json_schema": "a JSON Schema whose keywords can be enforced and that some output fulfils",
    "regex": "a regular expression (Rust's syntax: no look-around, no back-references)",
    "choice": "a list of strings",
    "grammar": "a grammar in Lark or GBNF that has a start rule and that some output fulfils",
}


def _on_small_stack(tokenizer: Any, ask: Ask) -> Verdict:
    found: list[Verdict] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(judge(tokenizer, ask)))
    thread.start()
    thread.join()
    if not found:
        os._exit(3)  # what it raised is none of our errors, and the state of the process unknown
    return found[0]


def _bound_memory(extra: int) -> None:
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[0])
    except (OSError, ValueError):
        return  # no such file on this system; the time limit holds
    limit = pages * resource.getpagesize() + extra
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
