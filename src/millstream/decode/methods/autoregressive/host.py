"""Host half of plain decoding."""

from __future__ import annotations

from millstream.core.plan import FROM_PREVIOUS, SampleAsk, Settled
from millstream.core.request import Kind, Request
from millstream.core.sequence import Sequence
from millstream.decode.protocol import Accepted, Hands

# To look up a member of an enum takes longer than to compare with it.
_GENERATE = Kind.GENERATE


class Autoregressive:
    resumes = True

    def num_sequences(self, request: Request) -> int:
        return request.params.n if request.kind is _GENERATE else 1

    def num_outputs(self, request: Request) -> int:
        return self.num_sequences(request)

    def want(self, seq: Sequence) -> int:
        # What may follow a token is known only once the token is.
        return 0 if seq.guides and seq.pending else seq.left

    def ask(self, seq: Sequence, stop: int) -> SampleAsk | None:
        if seq.request.kind is not _GENERATE:
            return None
        params = seq.request.params
        history: tuple[int, ...] = ()
        if params.reads_history:
            history = (*seq.tokens, *(FROM_PREVIOUS,) * seq.pending)
        too_short = stop - seq.num_prompt < params.min_tokens
        banned = tuple(sorted(seq.stop_ids)) if too_short else ()
        allowed = _allowed(seq)
        if banned and allowed is not None and not _others(allowed, banned):
            banned = ()  # the guides say that the output is complete: it cannot grow to min_tokens
        return SampleAsk(
            params,
            seq.seed,
            seq.index,
            stop,
            seq.num_prompt,
            history,
            banned=banned,
            top_logprobs=params.logprobs,
            allowed=allowed,
        )

    def accept(self, seq: Sequence, settled: Settled, hands: Hands) -> Accepted:
        return Accepted(settled.tokens, settled.logprobs)

    def lost(self, seq: Sequence, hands: Hands) -> None:
        pass


def _allowed(seq: Sequence) -> bytes | None:
    """The tokens that every guide allows."""
    masks: list[bytes] = [guide.allowed() for guide in seq.guides]
    if len(masks) < 2:
        return masks[0] if masks else None
    both = int.from_bytes(masks[0], "little")
    for mask in masks[1:]:
        both &= int.from_bytes(mask, "little")
    return both.to_bytes(len(masks[0]), "little")


def _others(allowed: bytes, banned: tuple[int, ...]) -> bool:
    left = int.from_bytes(allowed, "little")
    for token in banned:
        left &= ~(1 << token)
    return left != 0


PLUGIN = Autoregressive
