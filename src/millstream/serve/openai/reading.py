"""One output on its way to a client: chunks of tokens become text, and logprobs as OpenAI's API tells them."""

from __future__ import annotations

from typing import Any

from millstream.core.client import Chunk
from millstream.core.plan import TokenLogprobs
from millstream.core.request import SamplingParams
from millstream.core.sequence import Finish
from millstream.text.stream import StreamText
from millstream.text.tokenizer import Tokenizer

SERVER_FINISHES = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.TIMEOUT: "timeout", Finish.ABORT: "abort"}


class Reading:
    """The text of one output. `push` gives what became certain with a chunk; the rest comes with the last one."""

    __slots__ = ("_params", "_shown", "_stream", "_tokenizer", "finish", "output_tokens", "stop_reason", "token_ids")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._params, self._shown = tokenizer, params, shown
        self._stream = self._new_stream()
        self.token_ids: list[int] = []
        self.output_tokens = 0
        self.finish: str | None = None
        self.stop_reason: int | str | None = None

    def push(self, chunk: Chunk) -> str:
        tokens = chunk.tokens
        if chunk.replaced is not None:
            tokens = chunk.replaced
            self.token_ids.clear()
            self._stream = self._new_stream()
        self.token_ids += tokens
        self.output_tokens = len(self.token_ids)
        text = self._stream.push(tokens[:-1] if self._hides_last(chunk) else tokens)
        if chunk.finish is not None:
            text += self._stream.finish()
            self.finish = SERVER_FINISHES.get(chunk.finish, chunk.finish.value)
            self.stop_reason = chunk.stop_reason
        return text

    def logprobs(self, chunk: Chunk) -> tuple[TokenLogprobs, ...]:
        """Those of the tokens that the text has."""
        return chunk.logprobs[:-1] if chunk.logprobs and self._hides_last(chunk) else chunk.logprobs

    def _hides_last(self, chunk: Chunk) -> bool:
        return chunk.stop_token and not self._params.include_stop_str_in_output

    def _new_stream(self) -> StreamText:
        params = self._params
        return StreamText(
            self._tokenizer,
            tuple(params.stop),
            skip_special=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            shown=self._shown,
        )


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; half a character is U+FFFD."""
    return tokenizer.decode([token], False, continuation=True)


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprobs, top: int) -> dict[str, Any]:
    """As `choices[].logprobs.content[]` of a chat completion has it."""
    out = _token(tokenizer, entry.chosen.token, entry.chosen.logprob)
    ranked = sorted({one.token: one for one in (*entry.top, entry.chosen)}.values(), key=lambda one: one.rank)
    out["top_logprobs"] = [_token(tokenizer, one.token, one.logprob) for one in ranked[:top]]
    return out


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spelled(tokenizer, token),
        "logprob": max(logprob, -9999.0),
        "bytes": list(tokenizer.token_bytes(token)),
    }


class TextLogprobs:
    """`logprobs` of a text completion: four lists that grow together. Offsets count characters from `start`."""

    def __init__(self, tokenizer: Tokenizer, top: int, start: int = 0) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, start

    def of(self, entries: Any) -> dict[str, Any]:
        """Those of the next tokens. An entry that is None has no logprob: nothing comes before it."""
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in entries:
            text = spelled(self._tokenizer, token)
            out["tokens"].append(text)
            out["text_offset"].append(self._offset)
            self._offset += len(text)
            if entry is None:
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
                continue
            out["token_logprobs"].append(max(entry.chosen.logprob, -9999.0))
            top = {spelled(self._tokenizer, one.token): max(one.logprob, -9999.0) for one in entry.top[: self._top]}
            if self._top:
                # The chosen token is always among them.
                top.setdefault(text, max(entry.chosen.logprob, -9999.0))
            out["top_logprobs"].append(top if self._top else None)
        return out


def prompt_logprobs(tokenizer: Tokenizer, ids: Any, positions: Any) -> list[dict[str, Any] | None]:
    """As vLLM shows them: for each position of the prompt, token id -> logprob, rank and text."""
    out: list[dict[str, Any] | None] = []
    for _, entry in zip(ids, positions, strict=False):
        if entry is None:
            out.append(None)
            continue
        ranked = {one.token: one for one in (*entry.top, entry.chosen)}
        out.append(
            {
                str(one.token): {
                    "logprob": max(one.logprob, -9999.0),
                    "rank": one.rank,
                    "decoded_token": spelled(tokenizer, one.token),
                }
                for one in sorted(ranked.values(), key=lambda one: one.rank)
            }
        )
    return out


class Counts:
    """Tokens of a request so far, over all its outputs."""

    __slots__ = ("_outputs", "_prompts", "reasoning")

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._outputs: dict[tuple[int, int], int] = {}
        self.reasoning = 0

    def add(self, place: int, chunk: Chunk) -> None:
        if chunk.usage is not None:
            if place not in self._prompts:
                self._prompts[place] = (chunk.usage.prompt_tokens, chunk.usage.cached_tokens)
            self._outputs[(place, chunk.index)] = chunk.usage.output_tokens
        else:
            key = (place, chunk.index)
            self._outputs[key] = self._outputs.get(key, 0) + len(chunk.tokens)

    @property
    def prompt(self) -> int:
        return sum(count for count, _ in self._prompts.values())

    @property
    def cached(self) -> int:
        return sum(cached for _, cached in self._prompts.values())

    @property
    def output(self) -> int:
        return sum(self._outputs.values())

    def usage(self) -> dict[str, Any]:
        prompt, output = self.prompt, self.output
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
