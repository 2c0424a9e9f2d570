"""By a ranker's score: whoever is expected to end with fewer tokens goes first, and nobody waits for ever.

Efficient LLM Scheduling by Learning to Rank (Fu et al., NeurIPS 2024). A small model scores each prompt once (a higher
score ends sooner); only the order counts, so it need not know lengths. All that run and all that wait are ordered anew
in each step, and a better score may take a running sequence's place. Starvation: a sequence that was passed over in
`threshold` steps is raised above all others for the next `period` steps in which it runs. A request without a score
goes by its expected length if somebody guessed that, else as one of average score (0).
When to want it: chats of unlike lengths beyond what the machine can do at once; the mean falls, the longest wait more.
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.events import Computed, Event, Finished, Stepped, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`threshold`: steps in which a sequence had no part until it is raised (0: never). `margin`: by how much a score
    must be better to take a place (negative: never). `average`: tokens that are as a score of 0."""

    threshold: int = 200
    period: int = 10
    margin: float = 0.5
    average: float = 256.0

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.period < 1 or not self.average > 0:
            raise ValueError("threshold must be 0 or more, period at least 1, average above 0")


class _Turn:
    __slots__ = ("idle", "raised", "ran")

    def __init__(self) -> None:
        self.idle = 0  # steps without a part
        self.raised = 0  # steps that it still runs above all others
        self.ran = False


class Ltr(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.preemptive = config.margin >= 0
        self._turns: dict[int, _Turn] = {}

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        turn = self._turns.get(seq.id)
        raised = turn is not None and turn.raised > 0
        return (0.0 if raised else 1.0, -self._score(seq), seq.arrival)

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        mine, its = self.rank(seq, view), self.rank(other, view)
        return mine[0] < its[0] or (mine[0] == its[0] and its[1] - mine[1] > self.config.margin)

    def observe(self, event: Event) -> None:
        if isinstance(event, Computed):
            if (turn := self._turns.get(event.seq.id)) is not None:
                turn.ran = True
        elif isinstance(event, Stepped):
            self._stepped(event.steps)
        elif isinstance(event, Submitted):
            self._turns[event.seq.id] = _Turn()
        elif isinstance(event, Finished):
            self._turns.pop(event.seq.id, None)

    def _stepped(self, steps: int) -> None:
        threshold = self.config.threshold
        for turn in self._turns.values():
            if turn.ran:
                turn.ran, turn.idle = False, 0
                turn.raised = max(0, turn.raised - steps)
            else:
                turn.idle += steps
                if threshold and turn.idle >= threshold and not turn.raised:
                    turn.raised, turn.idle = self.config.period, 0

    def _score(self, seq: SeqView) -> float:
        hints = seq.hints
        if hints.score is not None:
            return hints.score
        if hints.expected_output_len is not None:
            return 1.0 - hints.expected_output_len / self.config.average
        return 0.0


CARD = Card("ltr", "shortest expected output first, by a learned score", paper=61)
PLUGIN = Ltr
