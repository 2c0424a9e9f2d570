"""What other dialects of chat stand on: one chat, asked as OpenAI's chat API asks it, answered in pieces.

The Messages and Responses APIs turn what they are asked into the body of a chat completion, and the pieces of its
answer into their own events. So every check, limit and sampling field is that of `/v1/chat/completions`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from millstream.text.tools.protocol import Piece


@dataclass(frozen=True, slots=True)
class Said:
    """A step of an answer: what became certain, with the logprobs of its tokens as a chat has them where asked for.

    Counts are of tokens so far. On the last step `finish` is the finish reason of a chat (stop, length, tool_calls,
    timeout), and `stop` the client's stop string where one ended the answer.
    """

    pieces: Sequence[Piece] = ()
    logprobs: Sequence[dict[str, Any]] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    finish: str | None = None
    stop: str | None = None


class Chats(Protocol):
    def answer(self, request: Request, body: Mapping[str, Any], operation: str) -> AsyncIterator[Said]:
        """The answer to the body of a chat completion with one output, in the name of who sent `request`.

        Raises errors of the tree before the first step where the request cannot be taken, and after it where it was
        lost on the way. Leaving early ends the request.
        """
        ...

    async def count(self, request: Request, body: Mapping[str, Any]) -> int:
        """The tokens of the prompt that the body comes to. Raises what `answer` raises for it."""
        ...
