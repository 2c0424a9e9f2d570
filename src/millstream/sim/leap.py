"""Several equal decode steps at once, where nothing can come between them.

Where every sequence decodes, none ends, none waits and no policy has a say in the size of a step, the next plan is the
last one with each position one further. Then times, tokens, blocks and what the prefix index remembers can be written
down without planning each step; a run with leaps has the fingerprint of one without, which tests hold it to.
"""

from __future__ import annotations

import math

from millstream.core.events import Computed, Emitted, Stepped
from millstream.core.request import Kind
from millstream.core.sequence import Sequence, State
from millstream.core.shape import StepShape, shape_of
from millstream.sched.protocol import Budget
from millstream.sim.replica import Replica

# Fewer are not worth the look.
LEAST = 2


def leap(replica: Replica, now: float, until: float) -> list[float]:
    """Makes the steps that end before `until`, and gives the times at which they end; none where it cannot be told."""
    rows = _rows(replica)
    if not rows:
        return []
    most = min(min(seq.seed - seq.num_output, seq.max_len - len(seq.tokens)) for seq in rows) - 1
    ledger = replica.engine.scheduler.ledger
    size = ledger.block_size
    starts = [seq.computed for seq in rows]
    while most >= LEAST:
        need = sum((start + most - 1) // size - (start - 1) // size for start in starts)
        if need <= ledger.free():
            break
        most //= 2
    if most < LEAST or replica.engine.scheduler.view(now).budget != Budget():
        return []
    times = _times(replica, now, until, sum(start + 1 for start in starts), len(rows), most)
    if len(times) < LEAST:
        return []
    _write(replica, rows, starts, now, times)
    return times


def earliest_end(replica: Replica, now: float) -> float:
    """A time before which nothing that is inside can end: each token but the next takes a step of one row at least."""
    live, runner = replica.engine.scheduler.live, replica.runner
    if not live:
        return math.inf
    if not replica.busy:
        return now
    done_at = runner.launched[0].done_at if runner.launched else runner.free_at
    fewest = min(seq.seed - seq.num_output for seq in live.values())
    least_s = runner.cost.seconds(StepShape(0, 0, 0, 1, 1, 0, 1)) * runner.slowdown
    # Sums are rounded.
    return done_at + max(0, fewest - 1) * least_s * (1 - 1e-6)


def _rows(replica: Replica) -> list[Sequence]:
    """The rows of the last plan in its order, where they are all there is and all decode; else none."""
    scheduler, plan = replica.engine.scheduler, replica.runner.last
    if plan is None or len(plan.extends) != len(scheduler.live) or plan.moves:
        return []
    rows = []
    for extend in plan.extends:
        seq = scheduler.live.get(extend.seq)
        if (
            seq is None
            or len(extend.tokens) != 1
            or extend.sample is None
            or seq.state is not State.RUNNING
            or seq.left != 1
            or seq.gates
            or seq.guides
            or seq.request.background
            or seq.request.kind is not Kind.GENERATE
            or seq.request.slo.deadline_s is not None
        ):
            return []
        rows.append(seq)
    return rows


def _times(replica: Replica, now: float, until: float, keys: int, rows: int, most: int) -> list[float]:
    runner, times, at = replica.runner, [], now
    busy_s = runner.busy_s
    # What rows share lies before what they decode, and stays as it is.
    assert runner.last is not None
    shared = shape_of(runner.last, replica.engine.scheduler.ledger.block_size).shared_keys
    for _ in range(most):
        seconds = runner.cost.seconds(StepShape(0, 0, 0, rows, keys, shared, rows)) * runner.slowdown
        if at + seconds >= until:
            break
        at += seconds
        keys += rows
        times.append(at)
        busy_s += seconds
    if len(times) >= LEAST:
        runner.busy_s = busy_s
    return times


def _write(replica: Replica, rows: list[Sequence], starts: list[int], now: float, times: list[float]) -> None:
    engine, runner = replica.engine, replica.runner
    ledger, size, count = engine.scheduler.ledger, engine.scheduler.ledger.block_size, len(rows)
    lengths = [len(seq.tokens) for seq in rows]
    serial = runner.serial

    def reach(place: int, step: int) -> None:
        """Row `place` has the tokens of so many steps."""
        seq = rows[place]
        done = len(seq.tokens) - lengths[place]
        seq.tokens += [serial + one * count + place + 1 for one in range(done, step)]

    # Blocks are taken and remembered in the order and at the times in which the steps would have done it.
    taken: dict[int, list[int]] = {}
    filled: dict[int, list[int]] = {}
    for place, start in enumerate(starts):
        for step in range(-start % size + 1, len(times) + 1, size):
            taken.setdefault(step, []).append(place)
        for step in range(-start % size or size, len(times) + 1, size):
            filled.setdefault(step, []).append(place)
    for step in sorted({*taken, *filled}):
        for place in taken.get(step, ()):
            reach(place, step - 1)
            rows[place].computed = starts[place] + step - 1
            ledger.grow(rows[place], 1, times[step - 2] if step > 1 else now)
        for place in filled.get(step, ()):
            seq = rows[place]
            reach(place, step)
            seq.computed = starts[place] + step - 1
            ledger.grow(seq, 1, times[step - 1])
            seq.computed += 1
            ledger.settle(seq, times[step - 1])
    last = times[-1]
    for place, seq in enumerate(rows):
        reach(place, len(times))
        seq.computed = starts[place] + len(times)
        if seq.computed % size:
            # A block that is full is remembered already, and not written any more.
            seq.computed -= 1
            ledger.grow(seq, 1, last)
            seq.computed += 1
        seq.stamps.last_token = last
        engine.tell(Computed(last, seq.view, starts[place], len(times)))
        engine.tell(Emitted(last, seq.view, len(times)))
    # Policies count what steps took; who listens to steps is told their number otherwise.
    free, tokens = ledger.free(), count * len(times)
    steps = Stepped(last, -1, last - now, count, tokens, 0, 0, count, free, steps=len(times))
    engine.scheduler.policy.observe(steps)
    runner.serial += len(times) * count
    engine.num_steps += len(times)
