"""An answer as the Responses API tells it: typed events with numbers, and the response that they come to.

The response is changed by the same steps that make the events, so the object of a stream's last event and the answer
without a stream cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from millstream.serve.files import new_id
from millstream.serve.responses.shapes import Ask, Item
from millstream.text.tools.protocol import CallStart, CallText, Content, Piece, Reasoning

Event = dict[str, Any]


def new_response(ask: Ask, created_at: float) -> dict[str, Any]:
    """A response at its beginning. Of its `program` it tells the id."""
    tools = [{"strict": None, "parameters": None, "description": None, **tool} for tool in ask.tools or ()]
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(created_at),
        "status": "queued" if ask.background else "in_progress",
        "background": bool(ask.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": ask.instructions,
        "max_output_tokens": ask.max_output_tokens,
        "max_tool_calls": ask.max_tool_calls,
        "model": ask.model,
        "output": [],
        "parallel_tool_calls": ask.parallel_tool_calls is not False,
        "previous_response_id": ask.previous_response_id,
        "program": None,
        "prompt_cache_key": ask.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **(ask.reasoning or {})},
        "safety_identifier": ask.safety_identifier,
        "service_tier": ask.service_tier or "default",
        "store": ask.store is not False,
        "temperature": ask.temperature,
        "text": {"format": {"type": "text"}, **(ask.text or {})},
        "tool_choice": ask.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": ask.top_logprobs or 0,
        "top_p": ask.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": ask.user,
        "metadata": ask.metadata or {},
    }


class ResponseEvents:
    """One answer, from its beginning to its end. Every method gives the events that it makes.

    Items are told one after another: one is done when the next begins. `clock` gives wall-clock seconds.
    """

    def __init__(self, response: dict[str, Any], clock: Callable[[], float] = time.time) -> None:
        self.response = response
        self._clock = clock
        self._number = 0
        self._item: Item | None = None
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @property
    def ended(self) -> bool:
        return self.response["status"] not in ("queued", "in_progress")

    def start(self) -> list[Event]:
        out = [self._event("response.created", response=self._snapshot())]
        if self.response["status"] == "queued":
            out.append(self._event("response.queued", response=self._snapshot()))
            self.response["status"] = "in_progress"
        return [*out, self._event("response.in_progress", response=self._snapshot())]

    def add(self, pieces: Sequence[Piece], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """More of the answer; `logprobs` are of its tokens, as a chat has them."""
        out: list[Event] = []
        left = list(logprobs)
        for piece in pieces:
            if isinstance(piece, CallStart):
                out += self._done()
                values = {"call_id": new_id("call_"), "name": piece.name, "arguments": ""}
                out += self._begin({"id": new_id("fc_"), "type": "function_call", "status": "in_progress", **values})
            elif isinstance(piece, CallText):
                self._text.append(piece.text)
                out.append(self._at("response.function_call_arguments.delta", delta=piece.text))
            elif isinstance(piece, Reasoning):
                if self._item is None or self._item["type"] != "reasoning":
                    out += self._done()
                    out += self._begin({"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []})
                    part = {"type": "reasoning_text", "text": ""}
                    out.append(self._at("response.content_part.added", content_index=0, part=part))
                self._text.append(piece.text)
                out.append(self._at("response.reasoning_text.delta", content_index=0, delta=piece.text))
            elif isinstance(piece, Content) and piece.text:
                if self._item is None or self._item["type"] != "message":
                    out += self._done()
                    out += self._message()
                self._text.append(piece.text)
                self._logprobs += left
                event = self._at(
                    "response.output_text.delta", content_index=0, delta=piece.text, logprobs=_with_tops(left)
                )
                left = []
                out.append(event)
        return out

    def finish(
        self, reason: str, prompt_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int = 0
    ) -> list[Event]:
        """`reason` is the finish reason of a chat."""
        response = self.response
        cut = reason in ("length", "timeout")
        out: list[Event] = []
        if not response["output"] and self._item is None:
            # An answer without a word is still an answer.
            out += self._message()
        out += self._done("incomplete" if cut else "completed")
        response["usage"] = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": prompt_tokens + output_tokens,
        }
        if cut:
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens" if reason == "length" else reason}
        else:
            response["status"], response["completed_at"] = "completed", int(self._clock())
        return [*out, self._event(f"response.{response['status']}", response=self._snapshot())]

    def fail(self, message: str, code: str = "server_error") -> list[Event]:
        """It cannot go on; what was said stays."""
        out = self._done("incomplete")
        self.response["status"], self.response["error"] = "failed", {"code": code, "message": message}
        return [*out, self._event("response.failed", response=self._snapshot())]

    def cancel(self) -> list[Event]:
        """The client wants no more of it; what was said stays. The protocol has no event that says so."""
        out = self._done("incomplete")
        self.response["status"] = "cancelled"
        return out

    # -- items

    def _message(self) -> list[Event]:
        item = {"id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        out = self._begin(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [*out, self._at("response.content_part.added", content_index=0, part=part)]

    def _begin(self, item: Item) -> list[Event]:
        self._item, self._text, self._logprobs = item, [], []
        index = len(self.response["output"])
        return [self._event("response.output_item.added", output_index=index, item=dict(item))]

    def _done(self, status: str = "completed") -> list[Event]:
        """Closes the item that is open, with the events that say what it came to."""
        item = self._item
        if item is None:
            return []
        text = "".join(self._text)
        out: list[Event] = []
        part: Item
        if item["type"] == "function_call":
            out.append(self._at("response.function_call_arguments.done", arguments=text, name=item["name"]))
            item |= {"arguments": text, "status": status}
        elif item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            out.append(self._at("response.reasoning_text.done", content_index=0, text=text))
            out.append(self._at("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
        else:
            logprobs = _with_tops(self._logprobs)
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
            out.append(self._at("response.output_text.done", content_index=0, text=text, logprobs=logprobs))
            out.append(self._at("response.content_part.done", content_index=0, part=part))
            item |= {"content": [part], "status": status}
        index = len(self.response["output"])
        self.response["output"].append(item)
        self._item = None
        return [*out, self._event("response.output_item.done", output_index=index, item=dict(item))]

    def _at(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self.response["output"]), **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}


def _with_tops(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"bytes": [], "top_logprobs": [], **entry} for entry in logprobs]
