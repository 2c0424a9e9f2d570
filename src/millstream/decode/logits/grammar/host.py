"""The grammar of each output, walked along its tokens. What a client's grammar says was tried out in another process
(text/grammar/compiler.py) before it comes here; it is built again, off the engine's thread, under the same limits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from millstream.core.errors import BadRequest, RequestFault
from millstream.core.lru import Lru
from millstream.core.request import Kind, Request, Structured
from millstream.decode.protocol import Guide, Halt
from millstream.text.grammar.build import MISSING, BadGrammar, Matcher, build, installed, make_tokenizer, raise_error
from millstream.text.vocabulary import Vocabulary

# Matchers at their start, kept for the next request of the same grammar. One is 0.4 MB, where it is large 10.
MAX_KEPT = 64
MAX_KEPT_BYTES = 4 << 20
# More than the worker process has that tried the grammar out.
STACK_BYTES = 8 << 20
# What the masks of one output may take of the engine's thread: so much at once, and so much a token. Of the schemas of
# public projects none takes more than 0.5 ms a token, and most take 0.02.
GRANT_S = 0.25
MASK_S = 0.002


class _Prototype:
    """A grammar being built, then built: or what is wrong with it."""

    def __init__(self) -> None:
        self.matcher: Matcher | None = None
        self.error: str | None = None
        self.wakes: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        return self.matcher is not None or self.error is not None


class Grammar:
    def __init__(self, vocabulary: Vocabulary, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._vocabulary, self._vocab_size, self._stop_ids = vocabulary, vocab_size, sorted(stop_ids)
        self._tokenizer: Any = None
        self._kept: Lru[Structured, _Prototype] = Lru(MAX_KEPT, MAX_KEPT_BYTES)
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[Structured, _Prototype] | None] = queue.SimpleQueue()
        self._builder: threading.Thread | None = None
        self.mask_s = 0.0
        self.masks = 0

    def guide(self, request: Request, wake: Callable[[], None]) -> Callable[[], Guide] | None:
        asked = request.params.structured
        if asked is None or request.kind is not Kind.GENERATE:
            return None
        if not installed():
            raise BadRequest("structured", asked.kind, f"nothing: {MISSING}")
        prototype = self._kept.get(asked)
        if prototype is None:
            prototype = _Prototype()
            self._kept.put(asked, prototype, 4 * len(asked.text))
            self._start()
            self._asked.put((asked, prototype))
        with self._lock:
            if not prototype.done:
                prototype.wakes.append(wake)
        return lambda: _Walk(self, prototype)

    def counters(self) -> Mapping[str, float]:
        return {
            "guide_cache_hits": self._kept.hits,
            "guide_cache_misses": self._kept.misses,
            "guide_masks": self.masks,
            "guide_mask_s": self.mask_s,
        }

    def close(self) -> None:
        self._asked.put(None)

    def _start(self) -> None:
        if self._builder is None:
            # A daemon: nobody waits for a build at the end.
            before = threading.stack_size(STACK_BYTES)
            try:
                self._builder = threading.Thread(target=self._work, name="millstream-grammar", daemon=True)
                self._builder.start()
            finally:
                threading.stack_size(before)

    def _work(self) -> None:
        while (work := self._asked.get()) is not None:
            self._build(*work)

    def _build(self, asked: Structured, prototype: _Prototype) -> None:
        matcher: Matcher | None = None
        error = "the grammar was not built"
        try:
            if self._tokenizer is None:
                self._tokenizer = make_tokenizer(self._vocabulary, self._vocab_size, self._stop_ids)
            matcher = build(self._tokenizer, asked)
        except BadGrammar as caught:
            error = str(caught)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        with self._lock:
            prototype.matcher = matcher
            prototype.error = None if matcher is not None else f"structured: {error}"
            wakes, prototype.wakes = prototype.wakes, []
        for wake in wakes:
            wake()


class _Walk:
    """One output's way through its grammar."""

    def __init__(self, owner: Grammar, prototype: _Prototype) -> None:
        self._owner, self._prototype = owner, prototype
        self._matcher: Matcher | None = None
        self._early: list[int] = []
        self._masks = 0
        self._spent = 0.0  # seconds of the engine's thread

    def ready(self) -> bool:
        return self._prototype.done

    def allowed(self) -> bytes:
        matcher, start = self._own(), time.thread_time()
        mask = matcher.compute_bitmask()
        spent = time.thread_time() - start
        self._owner.masks += 1
        self._owner.mask_s += spent
        self._masks += 1
        self._spent += spent
        _check(matcher)
        if self._spent > GRANT_S + MASK_S * self._masks:
            raise RequestFault(
                f"structured: the grammar is too slow to follow: {self._spent:.2f} s for {self._masks} tokens"
            )
        return mask

    def see(self, tokens: Seq[int]) -> Halt | None:
        if not self.ready():
            self._early += tokens
            return None
        matcher = self._own()
        for token in tokens:
            if not matcher.consume_token(token):
                _check(matcher)
                raise RequestFault(f"structured: token {token} is not in the grammar")
            if matcher.is_stopped():
                _check(matcher)
                return Halt(None)
        return None

    def _own(self) -> Matcher:
        if self._matcher is None:
            if self._prototype.matcher is None:
                raise RequestFault(self._prototype.error or "structured: the grammar is not ready")
            self._matcher = self._prototype.matcher.deep_copy()
            for token in self._early:
                self._matcher.consume_token(token)
            _check(self._matcher)
        return self._matcher


def _check(matcher: Matcher) -> None:
    try:
        raise_error(matcher)
    except BadGrammar as error:
        raise RequestFault(f"structured: the grammar cannot be followed further ({error})") from None


PLUGIN = Grammar
