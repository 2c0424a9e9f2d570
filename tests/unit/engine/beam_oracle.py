"""Beam search written out plainly: whole token lists, the whole vocabulary ranked at every step, no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from millstream.core.plan import SampleAsk
from millstream.core.request import SamplingParams
from millstream.runner.null_runner import candidates, prefix_hash

GREEDY = SamplingParams(temperature=0.0)


def ranked(tokens: Sequence[int], vocab: int) -> list[tuple[float, int]]:
    """(logprob, token) of every continuation as the null runner tells them, the likeliest first."""
    ask = SampleAsk(GREEDY, 0, 0, len(tokens), 0)
    return [(-0.5 * rank, token) for rank, token in enumerate(candidates(ask, prefix_hash(tokens), vocab), start=1)]


def search(
    prompt: Sequence[int],
    width: int,
    max_tokens: int,
    vocab: int,
    stop: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    min_tokens: int = 0,
    ranked: Callable[[Sequence[int], int], list[tuple[float, int]]] = ranked,
) -> list[tuple[float, list[int]]]:
    """The `width` best outputs with their summed logprobs, best first."""

    def norm(score: float, length: int) -> float:
        return score / length**length_penalty

    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, float, list[int]]] = []
    for length in range(1, max_tokens + 1):
        grown = [
            (score + logprob, beam, token)
            for beam, (score, output) in enumerate(live)
            for logprob, token in ranked([*prompt, *output], vocab)
        ]
        grown.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        going: list[tuple[float, list[int]]] = []
        for score, beam, token in grown:
            output = [*live[beam][1], token]
            if token not in stop:
                going.append((score, output))
            elif length > min_tokens:
                ended.append((norm(score, length), score, output))
            if len(going) == width:
                break
        live = going
        if length == max_tokens:
            ended += [(norm(score, length), score, output) for score, output in live]
            break
        if len(ended) >= width:
            worst = sorted((entry[0] for entry in ended), reverse=True)[width - 1]
            if early_stopping or norm(live[0][0], length) <= worst:
                break
    ended.sort(key=lambda entry: -entry[0])
    return [(score, output) for _, score, output in ended[:width]]
