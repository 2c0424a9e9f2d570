"""What a runner is told to do in one step. A plan is complete: a runner needs nothing else to carry it out."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from millstream.core.record import record
from millstream.core.request import SamplingParams

# Stands in `Extend.tokens` for the token that the plan before this one samples for the same sequence.
FROM_PREVIOUS = -1


class Tier(enum.Enum):
    """Where blocks lie: beside the compute, or in host memory set aside for what was put off."""

    DEVICE = "device"
    HOST = "host"


@record
class Holding:
    """The blocks of one sequence in one cache group.

    `blocks[i]` holds the tokens [i * block_size, (i + 1) * block_size) of the sequence; NO_BLOCK where the group no
    longer keeps them (behind a sliding window). `length` is how many tokens of the sequence have a slot.
    """

    group: str
    blocks: tuple[int, ...]
    length: int
    tier: Tier = Tier.DEVICE


NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What a prefix index found: the first `length` tokens of a prompt are held.

    `blocks` gives, by group, the blocks that cover them in order (NO_BLOCK behind a sliding window). When `length` is
    not a multiple of the block size the last block is filled in part and must be copied before it is appended to.
    """

    length: int
    blocks: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy one block's bytes (all layers of a group) before the step's forward pass."""

    group: str
    source: int
    target: int
    source_tier: Tier = Tier.DEVICE
    target_tier: Tier = Tier.DEVICE


@dataclass(slots=True)
class Bulk:
    """Moves of one group between the same tiers, of which none needs another to be done first."""

    group: str
    source_tier: Tier
    target_tier: Tier
    sources: list[int]
    targets: list[int]


def in_bulk(moves: Iterable[Move]) -> list[Bulk]:
    """The moves together, as many at once as give what they give one after the other."""
    found: list[Bulk] = []
    last: dict[str, tuple[Bulk, set[tuple[Tier, int]]]] = {}
    for move in moves:
        source, target = (move.source_tier, move.source), (move.target_tier, move.target)
        bulk, written = last.get(move.group, (None, set()))
        if (
            bulk is None
            or (bulk.source_tier, bulk.target_tier) != (move.source_tier, move.target_tier)
            or source in written
            or target in written
        ):
            bulk, written = Bulk(move.group, move.source_tier, move.target_tier, [], []), set()
            last[move.group] = bulk, written
            found.append(bulk)
        bulk.sources.append(move.source)
        bulk.targets.append(move.target)
        written.add(target)
    return found


@record
class SampleAsk:
    """Asks for one token after the last of an Extend.

    `position` is that of the sampled token; random numbers are keyed by (seed, index, position). `history` are all
    tokens before it when a rule reads them (FROM_PREVIOUS may stand last), else empty. `banned` may not be sampled.
    `allowed`, where it is given, has a bit for each token that may be (bit `token % 8` of byte `token // 8`).
    """

    params: SamplingParams
    seed: int
    index: int
    position: int
    num_prompt: int
    history: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    top_logprobs: int | None = None
    allowed: bytes | None = None

    def may(self, token: int) -> bool:
        """Whether the token is neither banned nor left out of `allowed`."""
        if token in self.banned:
            return False
        if self.allowed is None:
            return True
        byte = token >> 3
        return byte < len(self.allowed) and bool(self.allowed[byte] >> (token & 7) & 1)


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """Asks for the logprobs of `targets[i]`, the token after `Extend.tokens[i]`, with `top` alternatives each."""

    targets: tuple[int, ...]
    top: int


@record
class Extend:
    """Compute `tokens` of a sequence at positions `start`, `start` + 1, ... over everything it holds before them."""

    seq: int
    start: int
    tokens: tuple[int, ...]
    holdings: tuple[Holding, ...]
    parents: tuple[int, ...] | None = None
    sample: SampleAsk | None = None
    score: ScoreAsk | None = None
    adapter: str = ""
    decode: str = ""

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """A side job of a step: an encoder run, a training window. `kind` names its handler."""

    id: int
    kind: str
    payload: Any


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: moves first, then all extends as one ragged batch. `forgotten` sequences will not come back."""

    id: int
    extends: tuple[Extend, ...]
    moves: tuple[Move, ...] = ()
    jobs: tuple[Job, ...] = ()
    forgotten: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(extend.tokens) for extend in self.extends)


@dataclass(frozen=True, slots=True)
class Logprob:
    """The logprob of one token and its rank among all (1: the likeliest)."""

    token: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's logprob, and the likeliest alternatives, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


@record
class Settled:
    """What became of one Extend.

    `kept` of its tokens stay in the cache (fewer than given when drafts were rejected); `tokens` are new tokens.
    `fault` says why the row failed; the others of the step are unharmed.
    """

    seq: int
    kept: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    drafts: tuple[int, ...] = ()
    vector: bytes | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one plan. `settled` is in the order of the plan's extends. `seconds` is the forward pass."""

    plan: int
    seconds: float
    settled: tuple[Settled, ...]
    jobs: Mapping[int, Any] = field(default_factory=dict)
