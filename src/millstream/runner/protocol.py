"""What a runner promises: plans in, results out, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from millstream.core.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a runner can hold. `plans`: how many may be launched before the first is collected (1 or 2).

    `blocks` and `host_blocks` count the KV blocks by cache group.
    """

    plans: int
    block_size: int
    blocks: Mapping[str, int]
    host_blocks: Mapping[str, int]


class Ticket(Protocol):
    """Stands for a launched plan. Only the runner that gave it knows what is inside."""


class Runner(Protocol):
    """Carries plans out strictly in launch order: a later plan may reuse blocks that an earlier one still reads.

    `launch` returns at once where it can; `collect` waits. An exception inside one row becomes that row's `fault`; an
    exception out of `collect` means that the runner is unusable.
    """

    def capacity(self) -> Capacity: ...

    def launch(self, plan: StepPlan) -> Ticket: ...

    def collect(self, ticket: Ticket) -> StepResult: ...

    def close(self) -> None: ...
