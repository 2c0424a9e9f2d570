"""What is known of a request to the API when it has ended: metrics, logs and traces are made of it, and nothing else.

There is exactly one record a request, whether it was answered, refused, shed, left by its client or failed. It holds no
text: neither prompts nor answers can leak from it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from millstream.core.request import Slo

_log = logging.getLogger("millstream.serve.requests")


@dataclass(frozen=True, slots=True)
class Record:
    """One request that has ended. Durations in seconds from its arrival, by the clock of the API process.

    `id` is ours and `label` what the client called it; `program` and `stage` are the workflow that it is part of and
    the step of that, as it said. `operation` is the kind of call ("chat", "text_completion", "embeddings", ...),
    `finish` why each output ended, `error` the code of an error, `shed` why it was turned away ("queue_full",
    "draining", ...) where it was. `started_ns` is the wall clock, for logs and traces only.
    """

    id: str
    operation: str
    route: str
    status: int
    total_s: float
    label: str = ""
    tenant: str = ""
    program: str = ""
    stage: str = ""
    model: str = ""
    stream: bool = False
    finish: tuple[str, ...] = ()
    error: str = ""
    shed: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    longest_output: int = 0
    n: int = 1
    max_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    preemptions: int = 0
    slo: Slo = Slo()
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    traceparent: str = ""
    started_ns: int = field(default_factory=time.time_ns)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens of its longest output; None with fewer than two."""
        if self.ttft_s is None or self.longest_output < 2:
            return None
        return max(0.0, self.total_s - self.ttft_s) / (self.longest_output - 1)

    @property
    def generated(self) -> bool:
        """Whether it was for an engine at all, and taken: a listing of models or a refusal is not."""
        return bool(self.finish)


Listener = Callable[[Record], None]


def log_line(record: Record) -> dict[str, Any]:
    """The completion line of a request, as it is logged: labels, counts and times."""
    line: dict[str, Any] = {
        "event": "request",
        "id": record.id,
        "label": record.label,
        "tenant": record.tenant,
        "program": record.program,
        "stage": record.stage,
        "model": record.model,
        "route": record.route,
        "status": record.status,
        "finish": _reasons(record.finish),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "reasoning_tokens": record.reasoning_tokens,
        "output_tokens": record.output_tokens,
        "queue_s": _rounded(record.queue_s),
        "ttft_s": _rounded(record.ttft_s),
        "tpot_s": _rounded(record.tpot_s),
        "total_s": _rounded(record.total_s),
        "stream": record.stream,
        "preemptions": record.preemptions,
        "error": record.error,
        "shed": record.shed,
    }
    return {name: value for name, value in line.items() if value not in (None, "", 0, False) or name in _ALWAYS}


_ALWAYS = frozenset(
    {"id", "tenant", "model", "status", "finish", "prompt_tokens", "cached_tokens", "output_tokens", "ttft_s", "tpot_s"}
)


def log(record: Record) -> None:
    """Writes the completion line. `core/logs.py` has it as fields or as one JSON object."""
    _log.info("%s %s", record.route, record.status, extra={"fields": log_line(record)})


def _reasons(finish: tuple[str, ...]) -> str:
    """Each, or of the thousands of an embedding's request how many of each."""
    return ",".join(finish if len(finish) <= 8 else (f"{count}*{name}" for name, count in Counter(finish).items()))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
