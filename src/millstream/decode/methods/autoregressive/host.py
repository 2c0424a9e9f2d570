"""Host half of plain decoding."""

from __future__ import annotations

from millstream.core.plan import FROM_PREVIOUS, SampleAsk, Settled
from millstream.core.request import Kind, Request
from millstream.core.sequence import Sequence
from millstream.decode.protocol import Accepted, Hands


class Autoregressive:
    resumes = True

    def num_sequences(self, request: Request) -> int:
        return request.params.n if request.kind is Kind.GENERATE else 1

    def num_outputs(self, request: Request) -> int:
        return self.num_sequences(request)

    def want(self, seq: Sequence) -> int:
        return seq.left

    def ask(self, seq: Sequence, stop: int) -> SampleAsk | None:
        if seq.request.kind is not Kind.GENERATE:
            return None
        params = seq.request.params
        history: tuple[int, ...] = ()
        if params.reads_history:
            history = (*seq.tokens, *(FROM_PREVIOUS,) * seq.pending)
        too_short = stop - seq.num_prompt < params.min_tokens
        return SampleAsk(
            params,
            seq.seed,
            seq.index,
            stop,
            seq.num_prompt,
            history,
            banned=tuple(sorted(seq.stop_ids)) if too_short else (),
            top_logprobs=params.logprobs,
        )

    def accept(self, seq: Sequence, settled: Settled, hands: Hands) -> Accepted:
        return Accepted(settled.tokens, settled.logprobs)

    def lost(self, seq: Sequence, hands: Hands) -> None:
        pass


PLUGIN = Autoregressive
