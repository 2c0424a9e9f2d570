"""What happened to one request, step by step, and what the last steps were made of.

Both are folds of the engine's events. A timeline is kept under the id that the API gave out, with its owner, so that a
client can ask why a request took as long as it did. What is kept is bounded by count and by bytes; the request that
nobody asked about for longest goes first.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from millstream.core.events import Admitted, Event, Finished, Preempted, Prefilled, Stepped, Submitted
from millstream.serve.records import Record

MAX_REQUESTS = 4096
MAX_BYTES = 16 << 20
MAX_ENTRIES = 512
# An estimate, measured over entries of every kind: a dict of five small values and its place in a list.
ENTRY_BYTES = 480
REQUEST_BYTES = 1400
MAX_STEPS = 512
RATE_WINDOW_S = 2.0


@dataclass(slots=True)
class Timeline:
    """One request. `entries` are dicts of `what`, `at_s` (from `start`, in the engine's clock) and their own fields.

    Tokens that follow one another, one a step, are one entry that grows. After `MAX_ENTRIES` only `dropped` counts.
    """

    id: str
    owner: str
    label: str = ""
    model: str = ""
    start: float | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    engine_ids: tuple[int, ...] = ()
    ended: dict[str, Any] | None = None
    # The last entry of every output, so that a run of decoding finds where it belongs.
    last: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return REQUEST_BYTES + len(self.label) + ENTRY_BYTES * len(self.entries)

    def as_dict(self) -> dict[str, Any]:
        """What the API answers."""
        return {
            "object": "request.timeline",
            "id": self.id,
            "label": self.label,
            "model": self.model,
            "status": "running" if self.ended is None else "ended",
            "entries": self._in_order(),
            "dropped_entries": self.dropped,
            **({} if self.ended is None else {"summary": self.ended}),
        }

    def _in_order(self) -> list[dict[str, Any]]:
        """What the engine and what the API tell comes on two ways, and by two clocks that differ a little."""
        until: dict[int, float] = {}
        for entry in self.entries:
            if entry["what"] == "decode":
                until[entry["index"]] = max(until.get(entry["index"], 0.0), entry["until_s"])
        placed = [
            {**entry, "at_s": max(entry["at_s"], until.get(entry["index"], 0.0))}
            if entry["what"] == "finished"
            else entry
            for entry in self.entries
        ]
        known = [entry["at_s"] for entry in placed if entry["at_s"] is not None]
        end = max(known, default=0.0)
        return sorted(placed, key=lambda entry: end if entry["at_s"] is None else entry["at_s"])


class Timelines:
    """The timelines of the last requests, as an LRU of at most `max_requests` and `max_bytes`."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self._kept: OrderedDict[str, Timeline] = OrderedDict()
        self._by_engine_id: dict[int, Timeline] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """An estimate of what is kept."""
        return self._bytes

    def open(self, request_id: str, owner: str, engine_ids: Iterable[int], label: str = "", model: str = "") -> None:
        """Begins the timeline of a request, before the engine hears of `engine_ids`, the requests it is made of.

        A request that is opened again, because it is made of one more part, keeps what it has.
        """
        timeline = self._kept.get(request_id)
        if timeline is None:
            timeline = self._kept[request_id] = Timeline(request_id, owner, label[:256], model)
            self._bytes += timeline.bytes
        ids = tuple(engine_ids)
        timeline.engine_ids += ids
        for engine_id in ids:
            self._by_engine_id[engine_id] = timeline
        self._bound()

    def get(self, request_id: str, owner: str | None = None) -> Timeline | None:
        """The timeline of a request, or None. With `owner`, only if it is theirs."""
        timeline = self._kept.get(request_id)
        if timeline is None or (owner is not None and timeline.owner != owner):
            return None
        self._kept.move_to_end(request_id)
        return timeline

    def ended(self, record: Record) -> None:
        """What the client of a request saw of it. News of the engine about its end may still come."""
        timeline = self._kept.get(record.id)
        if timeline is None:
            return
        timeline.ended = {
            "status": record.status,
            "finish": list(record.finish),
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "queue_s": record.queue_s,
            "ttft_s": record.ttft_s,
            "tpot_s": record.tpot_s,
            "total_s": record.total_s,
            "preemptions": record.preemptions,
        }

    def restarted(self) -> None:
        """The engine begins again: who was inside has that in their timeline."""
        inside = {timeline.id: timeline for timeline in self._by_engine_id.values() if timeline.ended is None}
        for timeline in inside.values():
            self._add(timeline, {"what": "engine_restarted", "at_s": None})

    def hear(self, event: Event) -> None:
        """Takes the next event of the engine."""
        if isinstance(event, Stepped):
            return
        timeline = self._by_engine_id.get(event.seq.request_id)
        if timeline is None:
            return
        if timeline.start is None:
            timeline.start = event.seq.arrival
        at = round(event.now - timeline.start, 6)
        entry: dict[str, Any]
        match event:
            case Submitted(_, seq):
                entry = {"what": "queued", "prompt_tokens": seq.num_prompt}
            case Admitted(_, seq, cached):
                entry = {"what": "admitted", "cached_tokens": cached}
            case Prefilled(_, seq, start, tokens):
                entry = {"what": "prefill", "start": start, "tokens": tokens}
            case Preempted(_, seq, how):
                entry = {"what": "preempted", "how": how}
            case Finished(_, seq, reason):
                entry = {"what": "finished", "reason": reason.value}
            case _:
                return
        entry = {"what": entry.pop("what"), "at_s": at, "index": seq.index, **entry}
        key = (seq.request_id, seq.index)
        before = timeline.last.get(key)
        # What ends a run of decoding begins after it; news of what came before it may only be late.
        if entry["what"] != "finished" and (before is None or before.get("until_s", at - 1.0) < at):
            timeline.last[key] = entry
        self._add(timeline, entry)

    def decoded(self, engine_id: int, index: int, at_s: float, tokens: int) -> None:
        """Tokens of an output have come, `at_s` after the request's arrival by the clock of the API process."""
        timeline = self._by_engine_id.get(engine_id)
        if timeline is None:
            return
        at = round(at_s, 6)
        last = timeline.last.get((engine_id, index))
        if last is not None and last["what"] == "decode":
            last["tokens"] += tokens
            last["longest_gap_s"] = max(last["longest_gap_s"], round(at - last["until_s"], 6))
            last["until_s"] = at
            return
        entry = {"what": "decode", "at_s": at, "index": index, "tokens": tokens, "until_s": at, "longest_gap_s": 0.0}
        timeline.last[(engine_id, index)] = entry
        self._add(timeline, entry)

    def _add(self, timeline: Timeline, entry: dict[str, Any]) -> None:
        if len(timeline.entries) >= MAX_ENTRIES and entry["what"] != "finished":
            timeline.dropped += 1
            return
        timeline.entries.append(entry)
        if timeline.id in self._kept:
            self._bytes += ENTRY_BYTES
            self._bound()

    def _bound(self) -> None:
        while self._kept and (len(self._kept) > self.max_requests or self._bytes > self.max_bytes):
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.bytes
            for engine_id in gone.engine_ids:
                self._by_engine_id.pop(engine_id, None)


class Steps:
    """The composition of the last steps: tokens of prompts, rows of outputs, and what shared the step."""

    def __init__(self, keep: int = MAX_STEPS, now: Callable[[], float] = time.monotonic) -> None:
        self._steps: deque[dict[str, Any]] = deque(maxlen=keep)
        self._heard: deque[float] = deque(maxlen=keep)  # by our own clock: the engine's is another process's
        self._now = now
        self.last = 0

    def hear(self, event: Event) -> None:
        """Takes the next event of the engine."""
        if not isinstance(event, Stepped):
            return
        self.last += 1
        self._heard.append(self._now())
        # An output that is sampled is one token a row; the rest of the rows are chunks of prompts.
        decode = event.tokens - event.prompt_tokens
        self._steps.append(
            {
                "n": self.last,
                "seconds": round(event.seconds, 6),
                "planning_s": round(event.planning_s, 6),
                "rows": event.rows,
                "prefill_tokens": event.prompt_tokens,
                "prefill_rows": max(0, event.rows - decode),
                "decode_tokens": decode,
                "waiting": event.waiting,
                "running": event.running,
                "free_blocks": event.free_blocks,
            }
        )

    def since(self, number: int, most: int = MAX_STEPS) -> list[dict[str, Any]]:
        """The steps after the one called `number`, oldest first, the last `most` of them."""
        return [step for step in self._steps if step["n"] > number][-most:]

    def rates(self, window_s: float = RATE_WINDOW_S) -> tuple[float, float]:
        """Tokens of prompts and of outputs a second, over the last moments."""
        now = self._now()
        recent = [step for step, heard in zip(self._steps, self._heard, strict=True) if now - heard <= window_s]
        if not recent:
            return 0.0, 0.0
        first = self._heard[-len(recent)]
        span = max(now - first + recent[0]["seconds"], 1e-3)
        prompt = sum(step["prefill_tokens"] for step in recent)
        return prompt / span, sum(step["decode_tokens"] for step in recent) / span
