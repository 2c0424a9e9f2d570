"""Host half of beam search. All beams of a request settle a step before any of them goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from millstream.core.errors import BadRequest
from millstream.core.plan import Logprob, SampleAsk, Settled
from millstream.core.request import Request, SamplingParams
from millstream.core.sequence import Finish, Sequence
from millstream.decode.methods.beam import Config
from millstream.decode.protocol import Accepted, Hands

GATE = "beam"

# Beams are grown from logprobs; the token that a greedy choice would make is never used.
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class _Search:
    """One request's search: what each live beam scores, what it proposes, and the hypotheses that ended."""

    scores: dict[int, float] = field(default_factory=dict)
    proposed: dict[int, tuple[Logprob, ...]] = field(default_factory=dict)
    ended: list[tuple[float, float, list[int], Finish, int | None]] = field(default_factory=list)
    steps: int = 0


class Beam:
    resumes = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self._searches: dict[int, _Search] = {}

    def num_sequences(self, request: Request) -> int:
        if request.params.structured is not None:
            raise BadRequest("structured", "a beam search", "sampling: beams are grown from the model's own logprobs")
        return self.config.width

    def num_outputs(self, request: Request) -> int:
        return self.num_sequences(request)

    def want(self, seq: Sequence) -> int:
        # Which token comes next is known only when all beams have settled, so none is computed ahead.
        return 0 if seq.pending else seq.left

    def ask(self, seq: Sequence, stop: int) -> SampleAsk | None:
        # Whatever ends, enough are left for this beam alone to fill the next step.
        most = self.config.width + len(seq.stop_ids)
        return SampleAsk(_GREEDY, seq.seed, seq.index, stop, seq.num_prompt, top_logprobs=most)

    def accept(self, seq: Sequence, settled: Settled, hands: Hands) -> Accepted:
        search = self._searches.setdefault(seq.request.id, _Search())
        if not settled.logprobs:
            return Accepted(())
        search.proposed[seq.index] = tuple(settled.logprobs[0].top)
        seq.gates.add(GATE)
        beams = [beam for beam in hands.siblings(seq) if not beam.finished]
        if all(beam.index in search.proposed for beam in beams):
            self._advance(search, beams, hands)
            search.proposed.clear()
            for beam in beams:
                beam.gates.discard(GATE)
            if all(beam.finished for beam in beams):
                del self._searches[seq.request.id]
        return Accepted(())

    def lost(self, seq: Sequence, hands: Hands) -> None:
        # Without one beam the others would be another search than the one that was asked for.
        for beam in hands.siblings(seq):
            if not beam.finished:
                beam.error = seq.error
                hands.finish(beam, Finish.ERROR)

    def _advance(self, search: _Search, beams: list[Sequence], hands: Hands) -> None:
        width, params = self.config.width, beams[0].request.params
        # Before the first token all beams are the same one.
        parents = beams if search.steps else beams[:1]
        candidates = sorted(
            (
                (search.scores.get(beam.index, 0.0) + choice.logprob, beam.index, choice.token)
                for beam in parents
                for choice in search.proposed[beam.index]
            ),
            key=lambda candidate: (-candidate[0], candidate[1:]),
        )
        by_index = {beam.index: beam for beam in beams}
        going: list[tuple[float, Sequence, int]] = []
        for score, index, token in candidates:
            parent = by_index[index]
            if token not in parent.stop_ids:
                going.append((score, parent, token))
            elif parent.num_output + 1 > params.min_tokens:
                output = [*parent.output, token]
                search.ended.append((self._norm(score, len(output)), score, output, Finish.STOP, token))
            if len(going) == width:
                break
        # A vocabulary of a few tokens may leave fewer than `width`: the rest follow the last one, never to be chosen.
        going += [(-math.inf, *going[-1][1:])] * (width - len(going)) if going else []
        search.steps += 1
        full = beams[0].num_prompt + search.steps >= beams[0].max_len
        if full or not going or self._settled(search, going):
            for score, parent, token in going if full else ():
                if score == -math.inf:
                    continue
                output = [*parent.output, token]
                search.ended.append((self._norm(score, len(output)), score, output, Finish.LENGTH, None))
            self._end(search, beams, hands)
            return
        hands.permute([(beam, parent, token) for beam, (_, parent, token) in zip(beams, going, strict=True)])
        search.scores = {beam.index: score for beam, (score, _, _) in zip(beams, going, strict=True)}

    def _settled(self, search: _Search, going: list[tuple[float, Sequence, int]]) -> bool:
        if len(search.ended) < self.config.width:
            return False
        if self.config.early_stopping:
            return True
        # Whether the best live beam, at its present length, still beats the worst that would be given out. With a
        # length penalty above 0 a longer output could yet do better: the usual estimate, not a bound.
        worst = sorted((entry[0] for entry in search.ended), reverse=True)[self.config.width - 1]
        return self._norm(going[0][0], search.steps) <= worst

    def _norm(self, score: float, length: int) -> float:
        return score / float(length**self.config.length_penalty)

    def _end(self, search: _Search, beams: list[Sequence], hands: Hands) -> None:
        best = sorted(search.ended, key=lambda entry: -entry[0])
        everyone = sorted(hands.siblings(beams[0]), key=lambda beam: beam.index)
        for beam, (_, score, output, reason, token) in zip(everyone, best, strict=False):
            beam.cumulative_logprob = score
            hands.finish(beam, reason, token, output)
        for beam in everyone[len(best) :]:
            hands.finish(beam, Finish.LENGTH, None, [])


PLUGIN = Beam
