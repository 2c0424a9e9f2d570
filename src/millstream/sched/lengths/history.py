"""What outputs came to before: the mean length of a tenant's outputs for prompts of about the same length.

The simplest predictor of all, as in S3's and Clockwork's baselines: it needs no training and no text, and learns from
what ends. Prompt lengths fall into buckets that double. Where a tenant has too few of a bucket, all of its outputs
count, then everybody's; where these are too few as well, nothing is said. Means forget: each is over about the last
`memory` outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from millstream.core.events import Event, Finished
from millstream.core.registry import Card
from millstream.core.request import Hints, Kind, Request
from millstream.core.sequence import Finish
from millstream.sched.protocol import LengthPredictor


@dataclass(frozen=True, slots=True)
class Config:
    """`least`: outputs before a mean is told. `most_means`: how many are kept, the last used ones."""

    memory: int = 256
    least: int = 4
    most_means: int = 16384

    def __post_init__(self) -> None:
        for name in ("memory", "least", "most_means"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer from 1, got {value!r}")


class History(LengthPredictor):
    def __init__(self, config: Config, text: Callable[[Seq[int]], str] | None = None) -> None:
        self.config = config
        self._means: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()  # -> outputs seen, their mean
        self._all: tuple[int, float] = (0, 0.0)

    def guess(self, requests: Seq[Request]) -> list[Hints]:
        return [Hints(expected_output_len=self._expected(request)) for request in requests]

    def observe(self, event: Event) -> None:
        # What was broken off tells nothing of how long it would have been.
        if not isinstance(event, Finished) or event.reason not in (Finish.STOP, Finish.LENGTH):
            return
        seq = event.seq
        if seq.kind is not Kind.GENERATE:
            return
        for key in ((seq.tenant, _bucket(seq.num_prompt)), (seq.tenant, -1)):
            self._means[key] = self._with(self._means.pop(key, (0, 0.0)), seq.num_output)
            if len(self._means) > self.config.most_means:
                self._means.popitem(last=False)
        self._all = self._with(self._all, seq.num_output)

    def _with(self, mean: tuple[int, float], length: int) -> tuple[int, float]:
        count, value = mean
        return count + 1, value + (length - value) / min(count + 1, self.config.memory)

    def _expected(self, request: Request) -> int | None:
        own = (request.tenant, _bucket(request.num_prompt))
        for count, mean in (
            self._means.get(own, (0, 0.0)),
            self._means.get((request.tenant, -1), (0, 0.0)),
            self._all,
        ):
            if count >= self.config.least:
                return max(1, round(mean))
        return None


def _bucket(num_prompt: int) -> int:
    return num_prompt.bit_length()


CARD = Card("history", "the mean length of what a tenant got for prompts of about the same length")
PLUGIN = History
