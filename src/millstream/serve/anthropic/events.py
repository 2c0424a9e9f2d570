"""An answer as Anthropic's API tells it: events of a stream, and the message that they come to.

The whole message is folded from the same events that a stream sends, so that the two cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from millstream.serve.files import new_id
from millstream.text.tools.protocol import CallStart, CallText, Content, Piece, Reasoning

Event = dict[str, Any]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """One answer, from its first token to its end. Every method gives the events that it makes.

    A block is closed when another begins, so blocks never overlap, as the protocol wants it.
    """

    def __init__(self, model: str) -> None:
        self.id = new_id("msg_")
        self._model = model
        self._index = -1
        self._open: str | None = None
        self._calls = 0

    def start(self, prompt_tokens: int, cached_tokens: int) -> list[Event]:
        message: dict[str, Any] = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_input(prompt_tokens, cached_tokens), "output_tokens": 0},
        }
        return [{"type": "message_start", "message": message}]

    def add(self, pieces: Sequence[Piece]) -> list[Event]:
        out: list[Event] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                out += self._begin("tool_use", {"id": new_id("toolu_"), "name": piece.name, "input": {}})
                self._calls += 1
            elif isinstance(piece, CallText):
                out.append(self._delta({"type": "input_json_delta", "partial_json": piece.text}))
            elif isinstance(piece, Reasoning):
                if self._open != "thinking":
                    out += self._begin("thinking", {"thinking": "", "signature": ""})
                out.append(self._delta({"type": "thinking_delta", "thinking": piece.text}))
            elif isinstance(piece, Content) and piece.text:
                if self._open != "text":
                    out += self._begin("text", {"text": ""})
                out.append(self._delta({"type": "text_delta", "text": piece.text}))
        return out

    def finish(self, reason: str, stop: str | None, prompt: int, cached: int, output: int) -> list[Event]:
        """`reason` is a finish reason of a chat; `stop` the client's sequence that ended it; the rest are tokens."""
        out = self._end()
        said = "tool_use" if self._calls and reason in ("stop", "tool_calls") else _REASONS.get(reason, reason)
        if stop is not None and said == "end_turn":
            said = "stop_sequence"
        delta = {"stop_reason": said, "stop_sequence": stop}
        usage = {**_input(prompt, cached), "output_tokens": output}
        return [*out, {"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def _begin(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        out = self._end()
        self._index += 1
        self._open = kind
        block = {"type": kind, **fields}
        return [*out, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]


class WholeMessage:
    """Folds events into the message that is the answer without a stream."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self._json = ""

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            kind = event["type"]
            if kind == "message_start":
                self.message = {**event["message"], "content": []}
            elif kind == "content_block_start":
                self.message["content"].append(dict(event["content_block"]))
                self._json = ""
            elif kind == "content_block_delta":
                self._take(event["delta"])
            elif kind == "content_block_stop":
                self._close()
            elif kind == "message_delta":
                self.message |= {**event["delta"], "usage": self.message["usage"] | event["usage"]}

    def _take(self, delta: dict[str, Any]) -> None:
        block = self.message["content"][-1]
        if delta["type"] == "input_json_delta":
            self._json += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]

    def _close(self) -> None:
        block = self.message["content"][-1]
        if block["type"] != "tool_use":
            return
        try:
            found = json.loads(self._json or "{}")
        except (ValueError, RecursionError):
            found = None
        # Arguments that were cut off by max_tokens are no object: they are told as they are.
        block["input"] = found if isinstance(found, dict) else {"partial_json": self._json}


def error_body(kind: str, message: str, request_id: str | None = None) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_kind(status: int) -> str:
    """The `type` of an error with this status."""
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")


def _input(prompt_tokens: int, cached_tokens: int) -> dict[str, int]:
    """Anthropic counts tokens from the cache apart from the others."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
    }
