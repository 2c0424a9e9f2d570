"""What is measured, in which order, and what comes of it.

decode B        B requests of `input_len` prompt tokens: what `output_len` tokens each take beyond the first ones, from
                the difference of two runs, one of them of one output token: B * (output_len - 1) / (T_n - T_1) tokens/s
prefill N x B   B prompts of N tokens and one output token: N * B / T_1 tokens/s
total B         prompts and outputs of the whole run: B * (input_len + output_len) / T_n tokens/s
start           seconds from the start of the process to its first token; and the same after its imports

One round asks every engine for every task, task after task, and each task of all engines in turn, so that a machine
that becomes slower does so for all. The first round warms up and is not counted. Prompts are windows of a real text,
the same for all engines and others in every round. Greedy, without end tokens, without prefix caches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peers.protocol import WorkerFailed

Say = Callable[[str], None]


class Asked(Protocol):
    """A `protocol.Worker`, or what stands for one."""

    def ask(self, limit_s: float = ..., **what: Any) -> dict[str, Any]: ...

    def cpu_s(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Task:
    """`batch` prompts of `input_len` tokens at once; with `output_len` 1 it is prefill alone."""

    batch: int
    input_len: int
    output_len: int

    def rates(self, first_s: float, whole_s: float) -> dict[str, float]:
        """Tokens a second by name, from the seconds of a run of one output token and of the whole run."""
        found = {f"prefill {self.input_len} x {self.batch}": self.batch * self.input_len / first_s}
        if self.output_len > 1:
            # A difference of two runs that is not positive is noise: no rate comes of it.
            if whole_s > first_s:
                found[f"decode {self.batch}"] = self.batch * (self.output_len - 1) / (whole_s - first_s)
            found[f"total {self.batch}"] = self.batch * (self.input_len + self.output_len) / whole_s
        return found


@dataclass(slots=True)
class Results:
    """Of every engine: rates by measure, a value a round; starts; what it said of itself; why it is not there."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    starts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    # First output tokens that were those of the first engine, and how many were compared.
    agreed: dict[str, list[int]] = field(default_factory=dict)
    # Processor seconds that an engine took while others were asked, of how many seconds.
    idle: dict[str, list[float]] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    perplexity_tokens: int = 0


def tasks(batches: Sequence[int], input_len: int, output_len: int, prefills: Sequence[tuple[int, int]]) -> list[Task]:
    """Those of a run. `prefills` are (prompt tokens, prompts at once)."""
    alone = [Task(count, length, 1) for length, count in prefills if not (length == input_len and count in batches)]
    return [*alone, *(Task(batch, input_len, output_len) for batch in batches)]


def windows(pool: Sequence[int], count: int, length: int, source: random.Random) -> list[list[int]]:
    """`count` pieces of a tokenized text. Raises ValueError when the text is too short."""
    if length >= len(pool):
        raise ValueError(f"a text of {len(pool)} tokens has no window of {length}")
    starts = [source.randrange(len(pool) - length) for _ in range(count)]
    return [list(pool[start : start + length]) for start in starts]


def run_rounds(
    workers: dict[str, Asked],
    todo: Sequence[Task],
    pool: Sequence[int],
    repeats: int,
    results: Results,
    seed: int = 0,
    say: Say = lambda text: None,
) -> None:
    """Fills `results`. A worker that fails is closed, taken out of `workers`, and its reason kept."""
    source = random.Random(seed)
    order = list(workers)
    for turn in range(repeats + 1):
        for place, task in enumerate(todo):
            lead = (turn + place) % len(order) if order else 0
            first_prompts = windows(pool, task.batch, task.input_len, source)
            whole_prompts = windows(pool, task.batch, task.input_len, source)
            begun: dict[str, list[int]] = {}
            for name in order[lead:] + order[:lead]:
                if name not in workers:
                    continue
                try:
                    rates, begun[name] = _one(name, workers, task, first_prompts, whole_prompts, results, bool(turn))
                except WorkerFailed as error:
                    results.absent[name] = f"failed in round {turn}: {error}"
                    say(f"{name}: {error}")
                    workers.pop(name).close()
                    continue
                if turn:
                    held = results.values.setdefault(name, {})
                    for measure, rate in rates.items():
                        held.setdefault(measure, []).append(rate)
                told = ", ".join(f"{measure}: {rate:.1f}" for measure, rate in rates.items())
                say(f"{f'round {turn}' if turn else 'warm-up'}: {name}: {told} tokens/s")
            _compare(begun, order, results)
        order = [name for name in order if name in workers]


def _one(
    name: str,
    workers: Mapping[str, Asked],
    task: Task,
    first_prompts: list[list[int]],
    whole_prompts: list[list[int]],
    results: Results,
    counted: bool,
) -> tuple[dict[str, float], list[int]]:
    others = {other: worker.cpu_s() for other, worker in workers.items() if other != name}
    start = time.monotonic()
    first = _ask(workers[name], first_prompts, 1)
    whole_s = 0.0
    if task.output_len > 1:
        whole_s = _ask(workers[name], whole_prompts, task.output_len)["seconds"]
    if counted:
        passed = time.monotonic() - start
        for other, before in others.items():
            spent = results.idle.setdefault(other, [0.0, 0.0])
            spent[0] += workers[other].cpu_s() - before
            spent[1] += passed
    return task.rates(first["seconds"], whole_s), [ids[0] for ids in first["outputs"]]


def _ask(worker: Asked, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    answer = worker.ask(do="generate", prompts=prompts, output_len=output_len)
    lengths = {len(ids) for ids in answer["outputs"]}
    if len(answer["outputs"]) != len(prompts) or lengths != {output_len}:
        raise WorkerFailed(f"asked for {len(prompts)} outputs of {output_len} tokens, got lengths {sorted(lengths)}")
    return answer


def _compare(begun: Mapping[str, list[int]], order: Sequence[str], results: Results) -> None:
    reference = begun.get(order[0]) if order else None
    if reference is None:
        return
    for name, tokens in begun.items():
        if name != order[0]:
            agreed = results.agreed.setdefault(name, [0, 0])
            agreed[0] += sum(a == b for a, b in zip(tokens, reference, strict=True))
            agreed[1] += len(tokens)
