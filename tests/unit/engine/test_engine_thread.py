"""An engine on its own thread: many callers, one stepper, and everybody hears how it ended."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
from harness import Bench

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest, EngineClosed
from millstream.core.plan import StepPlan, StepResult
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.engine.thread import AsyncEngine, EngineThread

WAIT_S = 20.0


def request(request_id, prompt=(1, 2, 3), max_tokens=6, **params):
    return Request(
        request_id, (Tokens(tuple(prompt)),), SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params})
    )


class Inbox:
    """Keeps the chunks of one request and tells when all of its outputs ended."""

    def __init__(self, outputs=1):
        self.chunks: list[Chunk] = []
        self._missing = outputs
        self._done = threading.Event()

    def __call__(self, chunk):
        self.chunks.append(chunk)
        self._missing -= chunk.finish is not None
        if self._missing == 0:
            self._done.set()

    def wait(self):
        assert self._done.wait(WAIT_S), "an output that never ended"
        return self.chunks

    @property
    def tokens(self):
        return [token for chunk in self.chunks for token in chunk.tokens]


class Slow:
    """Slows a runner down, so that work is surely inside when something happens to the engine."""

    def __init__(self, runner, seconds=0.002):
        self._runner, self._seconds = runner, seconds

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def collect(self, ticket: StepPlan) -> StepResult:
        time.sleep(self._seconds)
        return self._runner.collect(ticket)


class Breaks(Slow):
    """Raises out of `collect` after a few steps, as an unusable device would."""

    def collect(self, ticket: StepPlan) -> StepResult:
        if self._runner.steps >= 3:
            raise RuntimeError("the device is gone")
        return self._runner.collect(ticket)


@pytest.fixture
def bench():
    return Bench(num_blocks=64, context=256)


@pytest.fixture
def started(bench):
    threads = []

    def start(wrap=lambda runner: runner):
        bench.engine.runner = wrap(bench.engine.runner)
        threads.append(EngineThread(bench.engine))
        return threads[-1]

    yield start
    for thread in threads:
        thread.close()


def truth(bench, asked, index=0):
    return bench.truth(asked, index)


def test_callers_on_many_threads_get_their_own_tokens(bench, started):
    engine = started()
    inboxes: dict[int, tuple[Request, Inbox]] = {}

    def ask(first):
        for n in range(first, first + 5):
            inboxes[n] = (request(n, (n % 50, 1, 2), n=2), Inbox(2))
            engine.submit(*inboxes[n])

    callers = [threading.Thread(target=ask, args=(5 * k,)) for k in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for asked, inbox in inboxes.values():
        chunks = inbox.wait()
        for index in range(2):
            assert [t for c in chunks if c.index == index for t in c.tokens] == truth(bench, asked, index)
    assert len(inboxes) == 30 and engine.drain(WAIT_S)
    assert len({engine.new_id() for _ in range(10)}) == 10


def test_bad_requests_are_refused_at_once_and_harm_nobody(bench, started):
    engine = started(Slow)
    good = Inbox()
    asked = request(1)
    engine.submit(asked, good)
    with pytest.raises(BadRequest, match="prompt"):
        engine.submit(request(2, (99,)), Inbox())
    good.wait()
    assert good.tokens == truth(bench, asked)


def test_what_fails_after_submit_reaches_the_sink(started):
    engine = started(Slow)
    first, second = Inbox(), Inbox(2)
    engine.submit(request(7, max_tokens=100), first)
    engine.submit(request(7, n=2), second)
    assert [chunk.finish for chunk in second.wait()] == [Finish.ERROR] * 2
    assert "id" in second.chunks[0].error
    engine.abort(7)
    assert first.wait()[-1].finish is Finish.ABORT


def test_abort_ends_a_request_from_another_thread(started):
    engine = started(Slow)
    inbox = Inbox()
    engine.submit(request(1, max_tokens=200), inbox)
    engine.abort(1)
    engine.abort(12345)
    assert inbox.wait()[-1].finish is Finish.ABORT


def test_call_runs_between_two_steps_and_passes_errors_on(bench, started):
    engine = started(Slow)
    engine.submit(request(1, max_tokens=50), Inbox())
    assert engine.call(lambda inner: inner.limits) is bench.engine.limits
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda inner: 1 // 0)
    assert engine.error is None


def test_drain_waits_for_what_is_inside_and_gives_up_in_time(started):
    engine = started(Slow)
    assert engine.drain(1.0)
    inbox = Inbox()
    engine.submit(request(1, max_tokens=30), inbox)
    assert not engine.drain(0.001)
    assert engine.drain(WAIT_S)
    assert inbox.chunks[-1].finish is Finish.LENGTH


def test_closing_with_work_inside_ends_everybody(bench, started):
    engine = started(lambda runner: Slow(runner, 0.01))
    inboxes = [Inbox(2) for _ in range(10)]
    for n, inbox in enumerate(inboxes):
        engine.submit(request(n, max_tokens=200, n=2), inbox)
    engine.close()
    engine.close()
    for inbox in inboxes:
        ended = [chunk for chunk in inbox.wait() if chunk.finish is not None]
        assert len(ended) == 2 and all(c.finish is Finish.ERROR and "closed" in c.error for c in ended)
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(request(99), Inbox())
    with pytest.raises(EngineClosed):
        engine.abort(0)
    bench.clean()


def test_a_runner_that_breaks_ends_every_request_and_closes_the_engine(bench, started, caplog):
    caplog.set_level(logging.CRITICAL, "millstream.engine")
    engine = started(Breaks)
    inboxes = [Inbox() for _ in range(6)]
    for n, inbox in enumerate(inboxes):
        try:
            engine.submit(request(n, max_tokens=100), inbox)
        except EngineClosed:
            inbox(Chunk(n, 0, finish=Finish.ERROR, error="the device is gone"))
    for inbox in inboxes:
        chunks = inbox.wait()
        assert chunks[-1].finish is Finish.ERROR and "the device is gone" in chunks[-1].error
        assert sum(chunk.finish is not None for chunk in chunks) == 1
    assert engine.drain(WAIT_S)
    with pytest.raises(EngineClosed, match="the device is gone"):
        engine.submit(request(50), Inbox())
    bench.clean()


# -- one event loop


async def gather(client, asked):
    return [token async for chunk in client.submit(asked) for token in chunk.tokens]


def test_an_event_loop_streams_many_requests_at_once(bench, started):
    client = AsyncEngine(started())

    async def main():
        asked = [request(n, (n, 2, 3)) for n in range(12)]
        return asked, await asyncio.gather(*(gather(client, one) for one in asked))

    asked, outputs = asyncio.run(main())
    assert outputs == [truth(bench, one) for one in asked]


def test_leaving_the_iterator_aborts_the_request(bench, started):
    thread = started(Slow)
    client = AsyncEngine(thread)

    async def main():
        stream = client.submit(request(1, max_tokens=200))
        async for chunk in stream:
            assert chunk.tokens
            break
        await stream.aclose()
        return await asyncio.to_thread(thread.drain, WAIT_S)

    assert asyncio.run(main())
    assert bench.engine.num_steps < 150
    bench.clean()


def test_a_cancelled_task_aborts_its_request_and_no_other(bench, started):
    client = AsyncEngine(started(Slow))

    async def main():
        gone = asyncio.create_task(gather(client, request(1, max_tokens=200)))
        asked = request(2, (7, 8), 20)
        stays = asyncio.create_task(gather(client, asked))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return asked, await stays

    asked, output = asyncio.run(main())
    assert output == truth(bench, asked)


def test_a_loop_that_dies_takes_down_its_own_request_only(bench, started):
    thread = started(Slow)
    client = AsyncEngine(thread)
    loop = asyncio.new_event_loop()
    stream = client.submit(request(1, max_tokens=100))
    loop.run_until_complete(anext(stream))
    loop.close()
    inbox = Inbox()
    asked = request(2, (5, 5))
    thread.submit(asked, inbox)
    inbox.wait()
    assert inbox.tokens == truth(bench, asked) and thread.error is None
    thread.abort(1)


def test_draining_takes_no_more_and_waits_for_the_rest(bench, started):
    client = AsyncEngine(started(Slow))

    async def main():
        assert await client.ready()
        asked = request(1, (4,), 30)
        inside = asyncio.create_task(gather(client, asked))
        await asyncio.sleep(0.01)
        await client.drain()
        assert not await client.ready()
        with pytest.raises(EngineClosed, match="draining"):
            await gather(client, request(2))
        assert await client.adapters() == []
        load = await client.load()
        await client.close()
        return asked, await inside, load

    asked, output, load = asyncio.run(main())
    assert output == truth(bench, asked)
    assert (load.waiting, load.running, load.total_blocks) == (0, 0, 64)


def test_errors_and_bad_requests_arrive_in_the_loop(started, caplog):
    caplog.set_level(logging.CRITICAL, "millstream.engine")
    client = AsyncEngine(started(Breaks))

    async def main():
        with pytest.raises(BadRequest):
            await gather(client, request(1, ()))
        chunks = [chunk async for chunk in client.submit(request(2, max_tokens=50))]
        assert chunks[-1].finish is Finish.ERROR and "the device is gone" in chunks[-1].error
        assert not await client.ready()
        with pytest.raises(EngineClosed):
            await gather(client, request(3))

    asyncio.run(main())
