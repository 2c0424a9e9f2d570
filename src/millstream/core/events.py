"""What happens to requests. Metrics, traces, policies and timelines all fold these; `now` is in engine seconds."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.sequence import Finish, SeqView


@dataclass(frozen=True, slots=True)
class Submitted:
    now: float
    seq: SeqView


@dataclass(frozen=True, slots=True)
class Admitted:
    """It got its first place in a step; `cached` tokens of it were held already."""

    now: float
    seq: SeqView
    cached: int


# These three are not frozen: one or two are made for every row of every step, and frozen they would take three times
# as long. Nobody changes them all the same.


@dataclass(slots=True)
class Computed:
    """A step computed `tokens` of it, from position `start`."""

    now: float
    seq: SeqView
    start: int
    tokens: int


@dataclass(slots=True)
class Prefilled(Computed):
    """What was computed is a chunk of a prompt, or of what a preemption had it forget: not one token just sampled.

    A kind of its own, so that who follows requests by their chunks need not pay for every token of every output.
    """


@dataclass(slots=True)
class Emitted:
    now: float
    seq: SeqView
    tokens: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """It lost its place; `how` is the recovery ("recompute" or "swap")."""

    now: float
    seq: SeqView
    how: str


@dataclass(frozen=True, slots=True)
class Finished:
    now: float
    seq: SeqView
    reason: Finish


@dataclass(frozen=True, slots=True)
class Stepped:
    """A plan came back. It computed `tokens`, `prompt_tokens` of them of prompts; `seconds` is the forward pass,
    `planning_s` what the scheduler took to make the plan. `steps`: a simulation may tell several equal ones at once,
    `seconds` and `tokens` are then those of all."""

    now: float
    plan: int
    seconds: float
    rows: int
    tokens: int
    prompt_tokens: int
    waiting: int
    running: int
    free_blocks: int
    planning_s: float = 0.0
    steps: int = 1


Event = Submitted | Admitted | Computed | Prefilled | Emitted | Preempted | Finished | Stepped
