"""Ends an output when its text comes to one of the request's stop strings, wherever tokens are cut."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from millstream.core.registry import Card
from millstream.core.request import Request
from millstream.decode.protocol import Halt
from millstream.text.stop import StopMatcher
from millstream.text.vocabulary import Vocabulary


class StopStrings:
    """Works on the bytes of tokens, so that a stop string may begin inside one token and end inside another."""

    @staticmethod
    def wanted(request: Request) -> bool:
        return bool(request.params.stop)

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._skip = vocabulary.special_ids if request.params.skip_special_tokens else frozenset()
        self._matcher = StopMatcher(request.params.stop)

    def see(self, tokens: Seq[int]) -> Halt | None:
        for token in tokens:
            if token in self._skip:
                continue
            match = self._matcher.push(self._vocabulary.token_bytes(token))
            if match is not None:
                return Halt(match.stop if isinstance(match.stop, str) else match.stop.decode(errors="replace"))
        return None


CARD = Card("stop-strings", "ends an output at a stop string")
PLUGIN = StopStrings
