"""Reads the prompt: a small encoder and two heads that were trained on answers of the model that is served.

`millstream train-ranker` makes the file. A prompt gets a score (who ends sooner; LLM Scheduling by Learning to
Rank, Fu et al., NeurIPS 2024) and the upper edge of the bucket that its output will end in (S3, Jin et al., NeurIPS
2023). What came in since the last step is read in one batch. With `retrain` the heads are fitted anew on what they were
trained on and what was answered since, the newest in place of the oldest: when nothing is under way, as S3 does in idle
time, or when four times as much has gathered.
When to want it: outputs of unlike lengths that their prompts tell, and policies that go by them (ltr, s3).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.core.errors import ConfigError
from millstream.core.events import Event, Finished
from millstream.core.registry import Card
from millstream.core.request import Hints, Request
from millstream.core.sequence import Finish
from millstream.sched.protocol import LengthPredictor

# By name: the deciding stack imports no torch until somebody chooses this.
MODEL, TRAINING = "millstream.models.lengths", "millstream.train.lengths"


@dataclass(frozen=True, slots=True)
class Config:
    """`file` of `millstream train-ranker`. `sure`: with what probability an output should end in its bucket or below
    (0: the most probable bucket). `retrain`: outputs after which heads are fitted anew (0: never), on the last `keep`.
    """

    file: str = ""
    sure: float = 0.0
    retrain: int = 0
    keep: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.sure < 1 or self.retrain < 0 or self.keep < 2:
            raise ValueError("sure is from 0 to under 1, retrain 0 or more, keep at least 2")


class Ranker(LengthPredictor):
    def __init__(self, config: Config, text: Callable[[Seq[int]], str] | None) -> None:
        if not config.file:
            raise ConfigError("length 'ranker' needs its option 'file', which millstream train-ranker writes")
        if text is None:
            raise ConfigError("length 'ranker' reads texts, and here are none; 'history' needs none")
        self.config = config
        self._text = text
        self._torch: Any = importlib.import_module("torch")
        self.model = importlib.import_module(MODEL).load(Path(config.file).expanduser())
        self._trunk = importlib.import_module(MODEL).Trunk(self.model.trunk, self.model.changed)
        self.heads = self.model.heads
        self._open: dict[int, Any] = {}  # of requests under way: the vector
        self._new: list[tuple[Any, int]] = []
        self.retrained = 0

    def guess(self, requests: Seq[Request]) -> list[Hints]:
        vectors = self._trunk.vectors([self.model.bare(self._text(request.prompt_ids)) for request in requests])
        scores = self.heads.scores(vectors).tolist()
        lengths = self.heads.lengths(vectors, self.config.sure)
        if self.config.retrain:
            self._open.update(zip((request.id for request in requests), vectors, strict=True))
        return [Hints(expected_output_len=length, score=score) for length, score in zip(lengths, scores, strict=True)]

    def observe(self, event: Event) -> None:
        if not self.config.retrain or not isinstance(event, Finished):
            return
        vector = self._open.pop(event.seq.request_id, None)
        # What was broken off tells nothing of how long it would have been.
        if vector is not None and event.reason in (Finish.STOP, Finish.LENGTH):
            self._new.append((vector, event.seq.num_output))
        if len(self._new) >= self.config.retrain * (4 if self._open else 1):
            self._retrain()

    def _retrain(self) -> None:
        torch, seen = self._torch, self.model.seen
        seen.vectors = torch.cat([seen.vectors, torch.stack([vector for vector, _ in self._new])])[-self.config.keep :]
        seen.lengths = torch.cat([seen.lengths, torch.tensor([length for _, length in self._new])])[-self.config.keep :]
        self._new = []
        cap = max(self.heads.cap, int(seen.lengths.max()))
        self.heads = importlib.import_module(TRAINING).fit(seen.vectors, seen.lengths, cap)
        self.retrained += 1


CARD = Card("ranker", "a small encoder reads the prompt; trained by train-ranker", paper=61)
PLUGIN = Ranker
