"""The one mutable record: how far a sequence has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Any, Final

from millstream.core.plan import Holding, TokenLogprobs
from millstream.core.prefix import names
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request

# Tokens of a block by which prompts are compared where nobody may see them.
PREFIX_BLOCK = 64


class State(enum.Enum):
    """WAITING holds nothing on the device; RUNNING holds blocks; SWAPPED holds blocks on the host; FINISHED nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


# To look up a member of an enum takes longer than to compare with it.
_FINISHED = State.FINISHED


class Finish(enum.Enum):
    """Why a sequence ended. TIMEOUT: its request's deadline passed; what it had said until then stands."""

    STOP = "stop"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class Stamps:
    """Times in the engine's clock, in seconds; None until it happened."""

    arrival: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens. Work left is known - computed - in_flight: there is no prefill phase and no decode phase.

    `tokens` are the prompt and all output that the host knows; `pending` more will be sampled by plans in flight;
    `computed` have their KV in the cache; `in_flight` are being computed. `gates` names what it waits for.
    `max_len` is the most tokens it can come to, output included (for a prompt that is only scored: one more than it).
    `guides` say which tokens may come next (decode/protocol.py: Guide); with one, no token is launched ahead.
    `epoch` counts how often its holdings were given up: a result of an earlier epoch says nothing about the cache.
    `hints` are its request's, and what a length predictor has added to them. `cold`: it is computed again from its
    first token, past every cache, because what it gave was not finite; the rows of the next `void` plans to come back
    were launched before that, and say nothing at all.
    """

    id: int
    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    max_len: int
    seed: int
    stop_ids: frozenset[int]
    decode: Choice
    method: Any  # the host half of `decode`, made for this request (decode/protocol.py: DecodeMethod)
    stamps: Stamps
    guides: tuple[Any, ...] = ()
    computed: int = 0
    in_flight: int = 0
    pending: int = 0
    drafts: tuple[int, ...] = ()
    holdings: dict[str, Holding] = field(default_factory=dict)
    gates: set[str] = field(default_factory=set)
    state: State = State.WAITING
    finish: Finish | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    epoch: int = 0
    plans_in_flight: int = 0
    cached: int = 0
    preemptions: int = 0
    scored: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    vector: bytes | None = None  # float32, little-endian: what a request for an embedding gets
    cumulative_logprob: float = 0.0
    cold: bool = False
    void: int = 0
    _prefix: tuple[int, ...] | None = field(init=False, repr=False, default=None)
    hints: Hints = field(init=False, repr=False)
    view: SeqView = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.hints = self.request.hints
        self.view = SeqView(self)

    @property
    def known(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def left(self) -> int:
        """Tokens that are known and neither computed nor being computed. The last one of all never needs computing."""
        known, most = len(self.tokens) + self.pending, self.max_len - 1
        return (known if known < most else most) - self.computed - self.in_flight

    @property
    def next_start(self) -> int:
        """The position of the next token to launch."""
        return self.computed + self.in_flight

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def prefix(self) -> tuple[int, ...]:
        """See SeqView."""
        if self._prefix is None:
            salt = f"{self.request.cache_salt}\0{self.request.adapter}".strip("\0")
            self._prefix = names(self.tokens[: self.num_prompt], PREFIX_BLOCK, salt)
        return self._prefix

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def finished(self) -> bool:
        return self.state is _FINISHED


@dataclass(slots=True)
class Snapshot:
    """What a view can see of a sequence, as it was at one moment."""

    id: int
    request: Request
    index: int
    num_prompt: int
    num_output: int
    max_len: int
    known: int
    computed: int
    next_start: int
    left: int
    cached: int
    preemptions: int
    state: State
    gates: tuple[str, ...]
    stamps: Stamps
    hints: Hints


class SeqView:
    """What policies and meters may see of a sequence: no token ids, and a true length only from an oracle."""

    # What never changes lies here: an order reads it of everybody in every step, and from here with one look instead of
    # four, each of which may have to come from memory.
    __slots__ = (
        *("_seq", "adapter", "arrival", "id", "index", "kind", "num_prompt"),
        *("priority", "program", "request_id", "slo", "tenant"),
    )

    def __init__(self, seq: Sequence | Snapshot) -> None:
        request = seq.request
        self._seq = seq
        self.id: Final = seq.id
        self.index: Final = seq.index
        self.num_prompt: Final = seq.num_prompt
        self.arrival: Final = seq.stamps.arrival
        self.request_id: Final = request.id
        self.kind: Final = request.kind
        self.tenant: Final = request.tenant
        self.program: Final = request.program
        self.slo: Final = request.slo
        self.priority: Final = request.priority
        self.adapter: Final = request.adapter

    def snapshot(self) -> Snapshot:
        """The same as it is now; `SeqView(snapshot)` shows it when the sequence has gone on."""
        seq = self._seq
        return Snapshot(
            seq.id,
            seq.request,
            seq.index,
            seq.num_prompt,
            seq.num_output,
            seq.max_len,
            seq.known,
            seq.computed,
            seq.next_start,
            seq.left,
            seq.cached,
            seq.preemptions,
            seq.state,
            tuple(seq.gates),
            replace(seq.stamps),
            seq.hints,
        )

    @property
    def admitted(self) -> float | None:
        return self._seq.stamps.admitted

    @property
    def first_token(self) -> float | None:
        return self._seq.stamps.first_token

    @property
    def state(self) -> State:
        return self._seq.state

    @property
    def num_output(self) -> int:
        return self._seq.num_output

    @property
    def max_len(self) -> int:
        """The most tokens it can come to: prompt and max_tokens, cut to the context."""
        return self._seq.max_len

    @property
    def known(self) -> int:
        return self._seq.known

    @property
    def computed(self) -> int:
        return self._seq.computed

    @property
    def next_start(self) -> int:
        return self._seq.next_start

    @property
    def left(self) -> int:
        return self._seq.left

    @property
    def cached(self) -> int:
        """Prompt tokens that a prefix cache held when it was last admitted."""
        return self._seq.cached

    @property
    def prefix(self) -> tuple[int, ...]:
        """Names of the prompt's blocks of PREFIX_BLOCK tokens (core/prefix.py): as far as those of two sequences are
        equal they begin alike. Of a snapshot there are none."""
        return () if isinstance(self._seq, Snapshot) else self._seq.prefix

    @property
    def preemptions(self) -> int:
        return self._seq.preemptions

    @property
    def gated(self) -> bool:
        return bool(self._seq.gates)

    @property
    def hints(self) -> Hints:
        """Of the request, or of a length predictor where the request says nothing."""
        return self._seq.hints
