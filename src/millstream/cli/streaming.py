"""One request whose text is shown as it comes, and whose whole output is kept."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.core.request import SamplingParams
    from millstream.engine.llm import LLM
    from millstream.engine.outputs import RequestOutput


@dataclass(slots=True)
class Streamed:
    """`output` so far; seconds on the perf_counter clock when it was asked and when its first token came."""

    output: RequestOutput
    asked_s: float
    first_token_s: float | None = None
    interrupted: bool = False


def stream(
    llm: LLM,
    text: str | None,
    ids: Sequence[int],
    params: SamplingParams,
    show: Callable[[int, str], None],
    keep_interrupted: bool = False,
) -> Streamed:
    """Runs one request and calls `show(index, piece)` for text as it becomes certain.

    With `keep_interrupted` Ctrl-C ends the answer alone, and what came so far is returned. Raises BadRequest, and
    RequestFault when an output failed.
    """
    from millstream.core.client import Chunk
    from millstream.core.errors import RequestFault
    from millstream.engine.outputs import OutputBuilder

    request = llm.request(ids, llm.checked(params))
    count = llm.assembled.engine.num_outputs(request)
    builder = OutputBuilder(request.id, text, ids, params, count, llm.tokenizer)
    chunks: queue.SimpleQueue[tuple[float, Chunk]] = queue.SimpleQueue()
    streamed = Streamed(builder.output, time.perf_counter())

    def take(chunk: Any) -> None:
        chunks.put((time.perf_counter(), chunk))

    llm.thread.submit(request, take)
    try:
        while not builder.output.finished:
            now, chunk = chunks.get()
            if chunk.tokens and streamed.first_token_s is None:
                streamed.first_token_s = now
            if piece := builder.add(chunk):
                show(chunk.index, piece)
            if chunk.error is not None:
                raise RequestFault(chunk.error)
    except KeyboardInterrupt:
        if not keep_interrupted:
            raise
        streamed.interrupted = True
    finally:
        if not builder.output.finished:
            llm.thread.abort(request.id)
    return streamed
