"""What the decoding room promises: how tokens become true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from millstream.core.plan import SampleAsk, Settled, TokenLogprobs
from millstream.core.record import record
from millstream.core.request import Request
from millstream.core.sequence import Finish, Sequence

# Why a row ends whose logits hold a NaN, an infinity, or nothing to choose from.
NOT_FINITE = "the model gave logits that are not finite"


@record
class Accepted:
    """What a settled row adds to its sequence."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class Hands(Protocol):
    """What a decode method may do to the sequences of one request, beyond adding tokens."""

    def siblings(self, seq: Sequence) -> Seq[Sequence]:
        """All sequences of the same request, by index, finished ones too."""
        ...

    def permute(self, assign: Seq[tuple[Sequence, Sequence, int]]) -> None:
        """For each (sequence, parent, token): it becomes a fork of the parent, followed by the token."""
        ...

    def finish(
        self, seq: Sequence, reason: Finish, stop_reason: int | str | None = None, output: Seq[int] | None = None
    ) -> None:
        """Ends a sequence; `output` replaces what it made so far."""
        ...


class DecodeMethod(Protocol):
    """Host half: how many tokens a sequence wants computed, what is asked of the last one, what the answer means.

    `resumes`: an output can be taken up from its tokens alone, without its siblings and whatever else was known.
    """

    resumes: bool

    def num_sequences(self, request: Request) -> int:
        """Sequences that one request fans out into; they share its prompt."""
        ...

    def num_outputs(self, request: Request) -> int:
        """Outputs that the client sees."""
        ...

    def want(self, seq: Sequence) -> int: ...

    def ask(self, seq: Sequence, stop: int) -> SampleAsk | None:
        """What to sample after position `stop` - 1, the last known token. None: nothing."""
        ...

    def accept(self, seq: Sequence, settled: Settled, hands: Hands) -> Accepted: ...

    def lost(self, seq: Sequence, hands: Hands) -> None:
        """A sequence just ended by a fault. Siblings that waited for it must not wait on."""
        ...


class LogitRule(Protocol):
    """Device half of a rule: changes the logits of the rows that ask for it, in place, before a token is chosen.

    Rules run by rising `order`, those of one order by name: what adds (100), as in vLLM, before what scales by history
    (200), and what forbids (300) last, so that nothing makes a forbidden token likelier again. One with `only_forbids`
    takes out the tokens that the ask does not allow (`SampleAsk.may`), and changes nothing else.
    """

    order: int
    only_forbids: bool

    def applies(self, ask: SampleAsk) -> bool: ...


@dataclass(frozen=True, slots=True)
class Halt:
    """An observer ends the output: with this reason, as the client sees it (None: it is simply complete)."""

    stop_reason: int | str | None


class Observer(Protocol):
    """Watches the tokens of one output as they become true; may end it."""

    def see(self, tokens: Seq[int]) -> Halt | None: ...


class Guide(Observer, Protocol):
    """Says which tokens may come next in one output, out of those that came before: host work, between two steps.

    A sequence with a guide waits for each of its tokens before the next one is launched. What `see` and `allowed` raise
    ends the output, and no other.
    """

    def ready(self) -> bool:
        """False while what it needs is still being made elsewhere; the sequence waits at a gate until then.

        What an output had come to before (core/request.py: Prior) is told to `see` all the same.
        """
        ...

    def allowed(self) -> bytes:
        """A bit for each token that may come next (core/plan.py: SampleAsk.allowed)."""
        ...


class GuideMaker(Protocol):
    """Host half of a rule over logits: made once an engine, it makes the guides of its requests.

    `PLUGIN(vocabulary, vocab_size, stop_ids)`: `vocab_size` are the model's logits, which may be more than its
    vocabulary has tokens.
    """

    def guide(self, request: Request, wake: Callable[[], None]) -> Callable[[], Guide] | None:
        """Makes the guides of a request's outputs, None for a request that asks for none.

        `wake` is called, from any thread, when a guide that was not ready has become so. Raises BadRequest.
        """
        ...

    def counters(self) -> Mapping[str, float]: ...

    def close(self) -> None: ...
