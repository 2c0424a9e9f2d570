"""What users get: outputs in words, built from chunks of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millstream.core.client import Chunk, RequestMetrics
from millstream.core.plan import TokenLogprobs
from millstream.core.request import SamplingParams
from millstream.text.stream import StreamText
from millstream.text.tokenizer import Tokenizer
from millstream.text.tools.protocol import Call


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`rank` 1 is the likeliest token of the vocabulary."""

    logprob: float
    rank: int
    decoded_token: str


# One position: token id -> its logprob. The chosen token is always among them.
PositionLogprobs = Mapping[int, TokenLogprob]


@dataclass(slots=True)
class CompletionOutput:
    """One generated text. `finish_reason` is stop, length, timeout, abort or error; None while it goes on.

    Where a chat was given tools, `text` is the answer alone: `tool_calls` and `reasoning` are told apart from it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    reasoning: str = ""
    tool_calls: list[Call] = field(default_factory=list)


@dataclass(slots=True)
class OutputMetrics:
    """Seconds from arrival; tokens of the prompt that the prefix cache held."""

    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A request and its outputs, by index. `prompt_logprobs[0]` is None: nothing comes before the first token."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    metrics: OutputMetrics = field(default_factory=OutputMetrics)


@dataclass(slots=True)
class ScoreOutput:
    """How likely a text is to the model. `logprob` sums over the tokens after the first; `perplexity` is per token."""

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None]
    logprob: float
    num_scored: int
    perplexity: float


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of one text."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: list[float]


@dataclass(slots=True)
class RankedDocument:
    """A document's place among those that were given, and how well it fits."""

    index: int
    score: float
    document: str


class OutputBuilder:
    """Folds the chunks of one request into its RequestOutput, text included, with the spelling of `shown` tokens."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        count: int,
        tokenizer: Tokenizer,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.output = RequestOutput(request_id, prompt, list(ids), [CompletionOutput(i) for i in range(count)])
        self._params, self._tokenizer, self._shown = params, tokenizer, shown
        self._texts = [self._stream() for _ in range(count)]
        self._unfinished = count

    def add(self, chunk: Chunk) -> str:
        """Takes one chunk; returns the text that became certain with it."""
        out = self.output.outputs[chunk.index]
        tokens = list(chunk.tokens)
        if chunk.replaced is not None:
            out.token_ids, tokens = [], list(chunk.replaced)
            self._texts[chunk.index] = self._stream()
        out.token_ids += tokens
        if chunk.logprobs:
            out.logprobs = [*(out.logprobs or []), *(self._position(entry) for entry in chunk.logprobs)]
        if chunk.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else self._position(entry) for entry in chunk.prompt_logprobs
            ]
        shown = tokens
        if chunk.stop_token and not self._params.include_stop_str_in_output:
            shown = tokens[:-1]
        stream = self._texts[chunk.index]
        new = stream.push(shown)
        if chunk.finish is not None:
            new += stream.finish()
            self._finish(out, chunk)
        out.text += new
        return new

    def _finish(self, out: CompletionOutput, chunk: Chunk) -> None:
        assert chunk.finish is not None
        out.finish_reason, out.stop_reason, out.error = chunk.finish.value, chunk.stop_reason, chunk.error
        if out.logprobs is not None or chunk.replaced is not None:
            out.cumulative_logprob = chunk.cumulative_logprob
        self._unfinished -= 1
        self.output.finished = self._unfinished == 0
        metrics, known = chunk.metrics or RequestMetrics(None, None, None), self.output.metrics
        known.queue_s = _least(known.queue_s, metrics.queue_s)
        known.ttft_s = _least(known.ttft_s, metrics.ttft_s)
        known.total_s = max(known.total_s or 0.0, metrics.total_s or 0.0)
        known.preemptions += metrics.preemptions
        if chunk.usage is not None and chunk.index == 0:
            known.cached_tokens = chunk.usage.cached_tokens

    def _stream(self) -> StreamText:
        params = self._params
        return StreamText(
            self._tokenizer,
            tuple(params.stop),
            skip_special=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            shown=self._shown,
        )

    def _position(self, entry: TokenLogprobs) -> PositionLogprobs:
        ranked = [entry.chosen, *entry.top]
        return {
            found.token: TokenLogprob(
                found.logprob, found.rank, self._tokenizer.decode([found.token], False, continuation=True)
            )
            for found in reversed(ranked)
        }


def _least(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
