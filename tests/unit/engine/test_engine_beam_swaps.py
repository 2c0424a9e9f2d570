"""Beams that change ancestors as often as beams can: what they hold, what is copied, and what they come to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import VOCAB, Bench

from millstream.core.plan import Logprob, TokenLogprobs
from millstream.core.registry import Choice
from millstream.core.request import SamplingParams
from millstream.runner.null_runner import SampleAsk, candidates, prefix_hash

GREEDY = SamplingParams(temperature=0.0)
# The logprob of a beam's candidate, by beam, rank of the candidate (from 1) and width.
Weight = Callable[[int, int, int], float]


def swap(beam: int, rank: int, width: int) -> float:
    """The last beam becomes the first, the first the last: each goes on in one, and none is where it was."""
    return 2.0 * beam - 2.0 * width if rank == 1 else -1000.0 - rank


def fan(beam: int, rank: int, width: int) -> float:
    """All beams go on from the one that came last."""
    return -1.0 * rank if beam == width - 1 else -1000.0 - rank


def halves(beam: int, rank: int, width: int) -> float:
    """The later half goes on in two beams each, the earlier one not at all."""
    return -1.0 * (width - beam) - 0.1 * rank if 2 * beam >= width and rank < 3 else -1000.0 - rank


def naive(prompt: list[int], width: int, new: int, weight: Weight) -> list[tuple[float, list[int]]]:
    """Whole token lists, sorted anew in every step."""
    ask = SampleAsk(GREEDY, 0, 0, 0, 0)
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(new):
        grown = [
            (score + weight(beam, rank, width), beam, token)
            for beam, (score, output) in enumerate(live)
            for rank, token in enumerate(candidates(ask, prefix_hash([*prompt, *output]), VOCAB), start=1)
        ]
        best = sorted(grown, key=lambda candidate: (-candidate[0], candidate[1:]))[:width]
        live = [(score, [*live[beam][1], token]) for score, beam, token in best]
    return live


class Adversary(Bench):
    """An engine whose runner tells logprobs by `weight`; it notes what is held whenever a plan is launched."""

    def __init__(self, weight: Weight, width: int, **given) -> None:
        super().__init__(**given)
        self.weight, self.width, self.most = weight, width, 0
        self.runner._sample = self._tell  # type: ignore[method-assign]
        launch = self.runner.launch

        def noting(plan):
            self.most = max(self.most, self.ledger.total() - self.ledger._pools["full"].num_free)
            return launch(plan)

        self.runner.launch = noting  # type: ignore[method-assign]

    def _tell(self, ask: SampleAsk, chain: int) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        ranked = candidates(ask, chain, VOCAB)[: ask.top_logprobs]
        top = tuple(
            Logprob(t, self.weight(ask.index, rank, self.width), rank) for rank, t in enumerate(ranked, start=1)
        )
        return (ranked[0],), (TokenLogprobs(top[0], top),)


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize(("weight", "copies"), [(swap, 0), (halves, 4), (fan, 7)])
def test_beams_that_change_ancestors_in_every_step_come_to_the_naive_search(weight, copies, block_size, plans):
    prompt, width, new = [5, 9, 2, 7, 7, 1, 30, 4], 8, 14
    bench = Adversary(weight, width, plans=plans, block_size=block_size, num_blocks=200, prefix="none")
    request = bench.add(prompt, new, decode=Choice("beam", {"width": width}))
    before, steps = 0, 0
    while bench.engine.busy:
        assert bench.step() or not bench.engine.busy
        made = bench.ledger.stats()["copied_blocks"]
        parted = steps > len(prompt) // 8 + 2  # behind the prompt, and the step in which all beams part from one
        assert made - before <= (copies if parted else width)
        before, steps = made, steps + 1
    want = naive(prompt, width, new, weight)
    assert [bench.output(request, index) for index in range(width)] == [output for _, output in want]
    last = [bench.chunks[(request.id, index)][-1] for index in range(width)]
    assert [chunk.cumulative_logprob for chunk in last] == pytest.approx([score for score, _ in want])
    bench.clean()


@pytest.mark.parametrize("weight", [swap, halves, fan])
def test_eight_beams_hold_the_prompt_once_and_at_most_a_response_each(weight):
    prompt, width, new, size = list(range(40)), 8, 17, 4
    bench = Adversary(weight, width, block_size=size, num_blocks=200, prefix="none")
    bench.add(prompt, new, decode=Choice("beam", {"width": width}))
    bench.run()
    # The last token's keys are never computed.
    assert bench.most <= len(prompt) // size + width * (-(-(new - 1) // size))
    # What each beam for itself would hold is more than twice that.
    assert 2 * bench.most < width * (len(prompt) + new) // size
    bench.clean()


def test_beams_that_only_change_places_copy_nothing_and_those_of_one_parent_a_block_each():
    made = {}
    for weight in (swap, fan):
        bench = Adversary(weight, 8, block_size=8, num_blocks=100, prefix="none")
        bench.add(list(range(16)), 8, decode=Choice("beam", {"width": 8}))
        bench.run()
        made[weight.__name__] = bench.ledger.stats()["copied_blocks"]
    # Of swap's: the prompt's last block for each beam but one, and for the step in which they part.
    assert made["swap"] <= 2 * 7
    assert made["fan"] <= 8 * 7
    assert made["swap"] < made["fan"]
