"""A multi-level feedback queue: whoever has been served least is first, and nothing is known of anybody.

Requests begin at the top and sink a level when they have been served `quantum` tokens there, each level being `ratio`
times as wide as the one above; inside a level first come, first served. One that waits `aging_s` seconds for its next
token rises to the top and begins anew there. The blind baseline of Autellix and of learning to rank (FastServe's order
without its skips).
"""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.events import Computed, Event, Finished, Preempted, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView
from millstream.sched.protocol import LoadView, Policy


@dataclass(frozen=True, slots=True)
class Config:
    """`quantum` in tokens, those of a prompt counted by `prompt_weight` each."""

    quantum: float = 32.0
    ratio: float = 2.0
    levels: int = 10
    prompt_weight: float = 0.05
    aging_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.quantum > 0 or not self.ratio >= 1 or self.levels < 1:
            raise ValueError("quantum must be above 0, ratio and levels at least 1")
        if self.prompt_weight < 0 or not self.aging_s > 0:
            raise ValueError("prompt_weight must be 0 or more, aging_s above 0")


class _Job:
    __slots__ = ("level", "served", "since")

    def __init__(self, now: float) -> None:
        self.level, self.served = 0, 0.0
        self.since: float = now  # of its last token


class Mlfq(Policy):
    preemptive = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._jobs: dict[int, _Job] = {}

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        job = self._jobs.get(seq.id)
        if job is None:
            return (0.0, seq.arrival)
        return (0.0 if self._old(job, view.now) else float(job.level), seq.arrival)

    def displaces(self, seq: SeqView, other: SeqView, view: LoadView) -> bool:
        mine, its = self._jobs.get(seq.id), self._jobs.get(other.id)
        return mine is not None and its is not None and self.rank(seq, view)[0] < its.level

    def observe(self, event: Event) -> None:
        if isinstance(event, Computed):
            job = self._jobs.get(event.seq.id)
            if job is not None:
                self._served(job, event)
        elif isinstance(event, Submitted):
            self._jobs[event.seq.id] = _Job(event.now)
        elif isinstance(event, Preempted):
            if (job := self._jobs.get(event.seq.id)) is not None:
                job.since = event.now
        elif isinstance(event, Finished):
            self._jobs.pop(event.seq.id, None)

    def _old(self, job: _Job, now: float) -> bool:
        return now - job.since > self.config.aging_s

    def _served(self, job: _Job, event: Computed) -> None:
        if self._old(job, event.now):
            job.level, job.served = 0, 0.0
        job.since = event.now
        prompt = max(0, min(event.tokens, event.seq.num_prompt - 1 - event.start))
        job.served += event.tokens - prompt + self.config.prompt_weight * prompt
        while job.level < self.config.levels - 1 and job.served >= (width := self._width(job.level)):
            job.served -= width
            job.level += 1

    def _width(self, level: int) -> float:
        return self.config.quantum * self.config.ratio**level


CARD = Card("mlfq", "levels by tokens served, whoever had least first")
PLUGIN = Mlfq
