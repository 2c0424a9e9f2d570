"""Programs made of many calls: agents, chats and tree searches, as they come to an engine.

Agents and chats are sequences: each call's prompt goes on where the last one was, and comes after a pause (a tool, a
reader). A tree search asks for several calls at once in each round and waits for all of them. Programs begin at random
times (Poisson), their mix and their lengths are drawn with a seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from millstream.core.errors import BadRequest
from millstream.sim.traces import Row
from millstream.sim.workload import Call

# Texts of programs begin so far apart, behind those of other workloads.
_TEXT, _FIRST = 1 << 20, 1 << 38


@dataclass(frozen=True, slots=True)
class Step:
    """What a program does at once: `calls` of (tokens that its prompt has more, or in all, and tokens of its output).

    `think_s` passes before it. Prompts of a sequence go on; those of a round of several share `shared` tokens.
    """

    calls: tuple[tuple[int, int], ...]
    think_s: float = 0.0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Template:
    """A program: its steps in order, and what kind it is."""

    kind: str
    steps: tuple[Step, ...]

    @property
    def tokens(self) -> int:
        return sum(output for step in self.steps for _, output in step.calls)


def recorded(rows: Sequence[Row], kind: str, scale: float = 1.0, most_think_s: float = 30.0) -> list[Template]:
    """Sessions of a trace as programs: `scale` shortens prompts and outputs; pauses are `most_think_s` at most."""
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        if row.session:
            sessions.setdefault(row.session, []).append(row)
    found = []
    for calls in sessions.values():
        steps = tuple(
            Step(
                ((max(1, round(row.num_prompt * scale)), max(1, round(row.num_output * scale))),),
                min(row.think_s, most_think_s),
            )
            for row in calls
        )
        found.append(Template(kind, steps))
    return found


def chats(
    lengths: Sequence[tuple[int, int]], count: int, seed: int, turns: float = 6.7, think_s: float = 5.0
) -> list[Template]:
    """Conversations of `turns` calls in the mean (geometric), each with a pair's lengths; prompts grow by all of it."""
    draw = random.Random(f"chats {seed}")
    found = []
    for _ in range(count):
        steps: list[Step] = []
        prompt = 0
        while True:
            question, answer = draw.choice(lengths)
            prompt += question
            steps.append(Step(((prompt, answer),), draw.expovariate(1 / think_s) if steps else 0.0))
            prompt += answer
            if draw.random() < 1 / turns:
                break
        found.append(Template("chat", tuple(steps)))
    return found


def trees(
    count: int, seed: int, rounds: int = 20, width: int = 8, prompt: int = 467, output: int = 73
) -> list[Template]:
    """Tree searches of LATS' size: rounds of `width` calls at once, outputs of random length around `output`."""
    draw = random.Random(f"trees {seed}")
    found = []
    for _ in range(count):
        steps = tuple(
            Step(
                tuple((prompt, max(1, round(draw.lognormvariate(0.0, 0.5) * output))) for _ in range(width)),
                0.0,
                round(0.8 * prompt),
            )
            for _ in range(max(1, round(draw.expovariate(1 / rounds))))
        )
        found.append(Template("tree", steps))
    return found


def calls(templates: Sequence[Template], rate: float, max_context: int, seed: int = 0, tenants: int = 1) -> list[Call]:
    """Programs that begin at `rate` a second, one after the other of `templates`; ids in order of the calls made.

    Raises BadRequest for a rate that is not above 0.
    """
    if not rate > 0:
        raise BadRequest("rate", rate, "a number above 0")
    draw, at = random.Random(f"programs {seed}"), 0.0
    ids, texts = itertools.count(1), itertools.count()
    found: list[Call] = []
    for number, template in enumerate(templates):
        at += draw.expovariate(rate)
        base = _FIRST + next(texts) * _TEXT
        tenant = f"tenant-{number % tenants}" if tenants > 1 else ""
        before: tuple[int, ...] = ()
        for step in template.steps:
            made = []
            for thread, (length, output) in enumerate(step.calls):
                output = max(1, min(output, max_context // 2))
                length = max(1, min(length, max_context - output - 1))
                if len(step.calls) == 1:
                    prompt = tuple(range(base, base + length))
                else:
                    shared, own = min(step.shared, length), _FIRST + next(texts) * _TEXT
                    prompt = (*range(base, base + shared), *range(own, own + length - shared))
                call = Call(
                    next(ids),
                    at,
                    prompt,
                    output,
                    tenant,
                    f"{template.kind}-{number}",
                    before,
                    step.think_s,
                    thread,
                    template.kind,
                )
                made.append(call)
            found += made
            before = tuple(call.id for call in made)
    return found


def remaining(found: Sequence[Call]) -> dict[int, int]:
    """By call: output tokens of its program from there on, its own included. What an oracle of programs knows."""
    left: dict[str, int] = {}
    out: dict[int, int] = {}
    for call in reversed(found):
        left[call.session] = left.get(call.session, 0) + call.num_output
        out[call.id] = left[call.session]
    return out


def thinned(templates: Sequence[Template], most_tokens: int, most_calls: int) -> list[Template]:
    """Programs cut to so many calls, and those of more tokens left out: for machines that are slow."""
    found = []
    for template in templates:
        steps, count = [], 0
        for step in template.steps:
            if count + len(step.calls) > most_calls:
                break
            steps.append(step)
            count += len(step.calls)
        cut = replace(template, steps=tuple(steps))
        if steps and cut.tokens <= most_tokens:
            found.append(cut)
    return found
