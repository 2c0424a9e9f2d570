"""An engine in another process: what its clients get, whatever happens to it, to them, or to the socket between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from engine_process import WAIT_S, EngineProcess, eventually, num_fds
from null_process import VOCABULARY, make_null

from millstream.core.client import Chunk
from millstream.core.errors import BadRequest, EngineAway, EngineClosed, MillstreamError
from millstream.core.events import Admitted, Computed, Emitted, Finished, Prefilled, Stepped, Submitted
from millstream.core.registry import Choice
from millstream.core.request import Hints, Request, SamplingParams, Slo, Tokens
from millstream.core.sequence import Finish
from millstream.engine import wire
from millstream.engine.exits import Exit
from millstream.engine.remote import RemoteEngine

PROMPT = (7, 7, 3, 1, 9, 2, 8)


@pytest.fixture
def engine(tmp_path_factory):
    """Starts engine processes; none is left when the test ends."""
    started: list[EngineProcess] = []

    def start(*arguments: str, **options: Any) -> EngineProcess:
        # A short path: that of a socket is bounded.
        process = EngineProcess(tmp_path_factory.mktemp("e"), **options)
        started.append(process)
        return process.start(*arguments)

    yield start
    for process in started:
        process.end()


@contextlib.asynccontextmanager
async def client(process: EngineProcess, **options: Any) -> AsyncIterator[RemoteEngine]:
    remote = RemoteEngine(process.socket, **options)
    await remote.start()
    try:
        await until(remote.ready, "the engine")
        yield remote
    finally:
        await remote.close()


def asked(remote: RemoteEngine, max_tokens: int = 20, prompt: tuple[int, ...] = PROMPT, **given: Any) -> Request:
    own = {name: given.pop(name) for name in ("slo", "decode", "tenant", "arrival") if name in given}
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **given})
    return Request(remote.new_id(), (Tokens(prompt),), params, **own)


class Heard:
    """What one request's iterator gave."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None

    def tokens(self, index: int = 0) -> list[int]:
        replaced = [c.replaced for c in self.chunks if c.index == index and c.replaced is not None]
        return list(replaced[-1]) if replaced else [t for c in self.chunks if c.index == index for t in c.tokens]

    def ends(self) -> dict[int, tuple[Finish | None, Any]]:
        return {c.index: (c.finish, c.stop_reason) for c in self.chunks if c.finish is not None}

    def logprobs(self, index: int = 0) -> list[Any]:
        return [entry for c in self.chunks if c.index == index for entry in c.logprobs]


async def hear(remote: RemoteEngine, request: Request, until: int | None = None) -> Heard:
    """All of a request's chunks, or those up to `until` tokens."""
    heard = Heard()
    try:
        async with contextlib.aclosing(remote.submit(request)) as chunks:
            async for chunk in chunks:
                heard.chunks.append(chunk)
                if until is not None and sum(len(c.tokens) for c in heard.chunks) >= until:
                    break
    except MillstreamError as error:
        heard.error = error
    return heard


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 60))


async def until(check: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < end, f"not within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.01)


async def at_rest(remote: RemoteEngine) -> None:
    """Waits until nothing is inside, and holds it to having left nothing behind."""

    async def rests() -> bool:
        load = await remote.load()
        return load.running + load.waiting == 0 and load.counters["holders"] == 0

    await until(rests, "nothing inside")
    await remote.call("reset_prefix_cache")
    stats = await remote.call("stats")
    assert stats["free_blocks"] == stats["total_blocks"] and stats["holders"] == 0


# -- ordinary days

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5},
    "three outputs": {"temperature": 1.0, "seed": 6, "n": 3},
    "stop strings": {"temperature": 1.0, "seed": 8, "n": 3, "stop": ("1 2", "3 4", "4 1"), "max_tokens": 60},
    "logprobs": {"temperature": 1.0, "seed": 9, "n": 2, "logprobs": 2},
    "prompt logprobs": {"prompt_logprobs": 1, "n": 2, "temperature": 1.0, "seed": 2},
    "beams": {"decode": Choice("beam", {"width": 3}), "max_tokens": 12},
    "no seed": {"temperature": 1.0},
}


def here(case: str, seed: int | None = None) -> list[Chunk]:
    """The chunks of the same request from an engine in this process."""
    bench_engine, _ = make_null({"step_s": 0.0})
    chunks: list[Chunk] = []
    given = dict(CASES[case])
    decode = given.pop("decode", None)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "seed": seed, **given})
    bench_engine.submit(Request(1, (Tokens(PROMPT),), params, decode=decode), chunks.append)
    while bench_engine.busy:
        bench_engine.step()
    return chunks


def same(heard: Heard, truth: list[Chunk]) -> None:
    want = Heard()
    want.chunks = truth
    assert heard.error is None and heard.ends() == want.ends()
    for index in want.ends():
        assert heard.tokens(index) == want.tokens(index)
        assert heard.logprobs(index) == want.logprobs(index)
        first = [c.prompt_logprobs for c in truth if c.index == index and c.prompt_logprobs is not None]
        got = [c.prompt_logprobs for c in heard.chunks if c.index == index and c.prompt_logprobs is not None]
        assert got == first
        last = next(c for c in truth if c.index == index and c.finish is not None)
        mine = next(c for c in heard.chunks if c.index == index and c.finish is not None)
        assert mine.cumulative_logprob == pytest.approx(last.cumulative_logprob)
        assert (mine.usage.prompt_tokens, mine.usage.output_tokens) == (
            last.usage.prompt_tokens,
            last.usage.output_tokens,
        )
        assert 0 <= mine.metrics.queue_s <= mine.metrics.ttft_s <= mine.metrics.total_s


def test_every_kind_of_request_gets_what_an_engine_in_this_process_would_give(engine):
    process = engine(step_s=0.0)

    async def main():
        async with client(process) as remote:
            requests = {case: asked(remote, **CASES[case]) for case in CASES}
            found = await asyncio.gather(*(hear(remote, request) for request in requests.values()))
            for (case, request), heard in zip(requests.items(), found, strict=True):
                assert all(chunk.request_id == request.id for chunk in heard.chunks)
                if case != "no seed":
                    same(heard, here(case))
            await at_rest(remote)
            facts = await remote.facts()
            assert facts.model == "null" and facts.limits.vocab_size == 50
            assert await remote.adapters() == []

    run(main)


def test_requests_of_any_id_are_told_apart_and_one_id_is_inside_once(engine):
    process = engine()

    async def main():
        async with client(process) as remote:
            ids = [2**100, 5, 2**40 + 1, 0, 2**39]
            requests = [Request(i, (Tokens((n, 2)),), SamplingParams(max_tokens=9)) for n, i in enumerate(ids)]
            found = await asyncio.gather(*(hear(remote, request) for request in requests))
            for request, heard in zip(requests, found, strict=True):
                assert {chunk.request_id for chunk in heard.chunks} == {request.id} and len(heard.tokens()) == 9
            first = asyncio.ensure_future(hear(remote, requests[0]))
            await asyncio.sleep(0)
            again = await hear(remote, requests[0])
            assert isinstance(again.error, BadRequest) and again.error.param == "id"
            assert len((await first).tokens()) == 9

    run(main)


def test_bad_requests_are_refused_here_and_by_the_engine(engine):
    process = engine()

    async def main():
        async with client(process) as remote:
            for request, param in (
                (asked(remote, prompt=(99,)), "prompt"),
                (asked(remote, max_tokens=10_000), "max_tokens"),
                (asked(remote, decode=Choice("beam", {"width": 2}), n=1, prompt=()), "prompt"),
            ):
                heard = await hear(remote, request)
                assert isinstance(heard.error, BadRequest) and heard.error.param == param
            with pytest.raises(MillstreamError, match="nearest is 'beam'"):
                await anext(remote.submit(asked(remote, decode=Choice("beem"))))
            # What only the engine can find out reaches the iterator too.
            limits = remote._facts.limits
            remote._facts = replace(remote._facts, limits=replace(limits, vocab_size=10_000))
            heard = await hear(remote, asked(remote, prompt=(99,)))
            assert isinstance(heard.error, BadRequest) and "prompt: got 99" in str(heard.error)
            assert len((await hear(remote, asked(remote, prompt=(1,)))).tokens()) == 20

    run(main)


@pytest.mark.parametrize("what", [{"tenant": "half a \ud800 pair"}, {"hints": Hints(2**70)}])
def test_what_cannot_be_said_over_a_socket_is_a_bad_request(engine, what):
    process = engine()

    async def main():
        async with client(process) as remote:
            heard = await hear(remote, replace(asked(remote), **what))
            assert isinstance(heard.error, BadRequest) and "MessagePack" in str(heard.error)
            assert len((await hear(remote, asked(remote))).tokens()) == 20 and remote.losses == 0

    run(main)


def test_calls_answer_and_pass_errors_on(engine):
    process = engine()

    async def main():
        async with client(process) as remote:
            await hear(remote, asked(remote))
            stats = await remote.call("stats")
            assert stats["steps"] > 10 and stats["max_running"] == 1
            freed = await remote.call("reset_prefix_cache")
            assert freed["freed_blocks"] >= 6 and freed["free_blocks"] == stats["total_blocks"]
            with pytest.raises(MillstreamError, match="there is no call 'stat'; the nearest is 'stats'"):
                await remote.call("stat")
            with pytest.raises(MillstreamError, match="TypeError"):
                await remote.call("stats", depth=3)

    run(main)


def test_events_tell_the_story_of_each_request(engine):
    process = engine(budget=4)

    async def main():
        async with client(process) as remote:
            heard: list[Any] = []
            ends: list[Any] = []

            async def listen(into, *kinds):
                async for event in remote.events(*kinds):
                    into.append(event)

            tasks = [asyncio.create_task(listen(heard)), asyncio.create_task(listen(ends, Finished))]
            await asyncio.sleep(0)
            request = asked(remote, 5, tenant="mill")
            await hear(remote, request)
            await until(lambda: ends and any(isinstance(e, Stepped) and e.running == 0 for e in heard), "all events")
            own = [event for event in heard if not isinstance(event, Stepped)]
            assert [type(event) for event in own[:3]] == [Submitted, Admitted, Prefilled]
            assert all(e.seq.request_id == request.id and e.seq.tenant == "mill" for e in own)
            assert [e.seq.computed for e in own if isinstance(e, Computed)][:2] == [4, 7]
            assert sum(e.tokens for e in own if isinstance(e, Emitted)) == 5
            (end,) = ends
            assert end.reason is Finish.LENGTH and end.seq.num_output == 5 and end.seq.first_token is not None
            assert own[0].now <= own[-1].now == end.now
            # An end that comes after its reader has left still finds its request.
            await hear(remote, asked(remote, 200, tenant="left"), until=3)
            await until(lambda: len(ends) == 2, "the aborted one's end")
            assert ends[1].reason is Finish.ABORT and ends[1].seq.tenant == "left"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


def test_it_is_the_same_on_uvloop(engine):
    uvloop = pytest.importorskip("uvloop")
    process = engine(step_s=0.002)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            await asyncio.sleep(0.02)
            process.kill()
            await asyncio.to_thread(process.wait)
            process.start()
            same(await task, here("seeded"))
            assert (await hear(remote, asked(remote, 200), until=3)).tokens()
            await at_rest(remote)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 60))


# -- aborts


@pytest.mark.parametrize("plans", [1, 2])
def test_leaving_at_any_moment_leaves_nothing_behind(engine, plans):
    process = engine(step_s=0.0005, budget=4, blocks=40, plans=plans)

    async def main():
        async with client(process) as remote:
            truth = await hear(remote, asked(remote, 30))
            fds = num_fds(process.pid)

            async def stay():
                for _ in range(3):
                    assert (await hear(remote, asked(remote, 30))).tokens() == truth.tokens()

            async def leave(k):
                request = asked(remote, 60, prompt=(k % 50, *PROMPT), n=1 + k % 3, temperature=1.0, seed=k)
                task = asyncio.ensure_future(hear(remote, request))
                await asyncio.sleep(0.0007 * k)
                if k % 3 == 0:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                elif k % 3 == 1:
                    await remote.abort(request.id)
                    await remote.abort(request.id)
                    heard = await task
                    assert {end for end, _ in heard.ends().values()} <= {Finish.ABORT, Finish.LENGTH}
                    assert len(heard.ends()) == request.params.n
                    await remote.abort(request.id)
                else:
                    heard = await hear(remote, asked(remote, 60, prompt=(k % 50, *PROMPT)), until=k)
                    await task

            await remote.abort(12345)
            await asyncio.gather(stay(), *(leave(k) for k in range(30)))
            await at_rest(remote)
            assert not remote._streams and not remote._by_request
            assert num_fds(process.pid) == fds
            load = await remote.load()
            assert load.counters["bad_frames"] == load.counters["dropped_requests"] == 0

    run(main)


# -- deadlines


def test_a_deadline_ends_a_request_with_what_it_has_said(engine):
    process = engine(step_s=0.01)

    async def main():
        async with client(process) as remote:
            whole = await hear(remote, asked(remote, 60))
            cut = await hear(remote, asked(remote, 400, slo=Slo(deadline_s=0.3)))
            assert cut.ends() == {0: (Finish.TIMEOUT, None)}
            assert 3 < len(cut.tokens()) < 60 and cut.tokens() == whole.tokens()[: len(cut.tokens())]
            assert cut.chunks[-1].metrics.total_s == pytest.approx(0.3, abs=0.1)
            none = await hear(remote, asked(remote, 60, slo=Slo(deadline_s=0.001)))
            assert none.ends() == {0: (Finish.TIMEOUT, None)} and none.tokens() == []
            # It counts from the arrival that the caller tells, in its own monotonic clock.
            late = asked(remote, 60, slo=Slo(deadline_s=5.0), arrival=time.monotonic() - 5.0)
            assert (await hear(remote, late)).ends() == {0: (Finish.TIMEOUT, None)}
            await at_rest(remote)
            assert (await remote.call("stats"))["timeouts"] == 3

    run(main)


def test_a_deadline_holds_while_the_engine_is_away_or_does_nothing(engine):
    process = engine(step_s=0.01)

    async def main():
        async with client(process) as remote:
            gone = asyncio.ensure_future(hear(remote, asked(remote, 400, slo=Slo(deadline_s=0.5))))
            await asyncio.sleep(0.15)
            process.kill(signal.SIGSTOP)
            start = time.monotonic()
            heard = await gone
            assert heard.ends() == {0: (Finish.TIMEOUT, None)} and 0 < len(heard.tokens()) < 50
            assert time.monotonic() - start < 2.0
            process.kill(signal.SIGCONT)
            await at_rest(remote)
            gone = asyncio.ensure_future(hear(remote, asked(remote, 400, slo=Slo(deadline_s=0.5))))
            await asyncio.sleep(0.15)
            process.kill()
            assert (await gone).ends() == {0: (Finish.TIMEOUT, None)}

    run(main)


# -- the engine is lost


@pytest.mark.parametrize("seed", range(4))
def test_after_kill_9_at_a_random_step_every_text_is_what_it_would_have_been(engine, seed):
    process = engine(step_s=0.003, blocks=400)
    chance = random.Random(seed)

    async def main():
        async with client(process) as remote:
            fds = len(os.listdir("/proc/self/fd"))
            kept = [case for case in CASES if case != "no seed"]
            tasks = {case: asyncio.ensure_future(hear(remote, asked(remote, **CASES[case]))) for case in kept}
            seedless = asyncio.ensure_future(hear(remote, asked(remote, 80, **CASES["no seed"])))
            for _ in range(2):
                await asyncio.sleep(chance.uniform(0.005, 0.12))
                process.kill()
                died = time.monotonic()
                await until(lambda: not_ready(remote), "it is known")
                assert time.monotonic() - died < 1.0
                with pytest.raises(EngineAway, match="started again"):
                    await anext(remote.submit(asked(remote)))
                await asyncio.to_thread(process.wait)
                process.start()
                await until(remote.ready, "a new engine")
            for case in kept:
                same(await tasks[case], here(case))
            heard = await seedless
            assert heard.ends() == {0: (Finish.LENGTH, None)} and len(heard.tokens()) == 80
            assert remote.losses == 2 and remote.resumed >= 1
            await at_rest(remote)
            assert len(os.listdir("/proc/self/fd")) <= fds

    run(main)


async def not_ready(remote: RemoteEngine) -> bool:
    return not await remote.ready()


def test_a_request_that_is_inside_each_time_the_engine_dies_is_not_sent_again(engine):
    process = engine(step_s=0.002, die_at=3)

    async def main():
        async with client(process) as remote:
            begun = asyncio.ensure_future(hear(remote, asked(remote, 40, prompt=(1,))))
            for _ in range(3):
                assert await asyncio.to_thread(process.wait) == 9
                await until(lambda: not_ready(remote), "the loss")
                process.start()
                await until(remote.ready, "a new engine")
            heard = await begun
            # It had said something, so its end says why; what was said stands.
            assert heard.error is None and heard.chunks[-1].finish is Finish.ERROR
            assert "lost 3 times" in heard.chunks[-1].error and len(heard.tokens()) > 0
            assert await remote.ready()

    run(main)


def test_one_that_had_said_nothing_can_be_asked_again(engine):
    process = engine(step_s=0.002, die_at=0)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote)))
            for _ in range(3):
                assert await asyncio.to_thread(process.wait) == 9
                process.start()
            heard = await task
            assert isinstance(heard.error, EngineAway) and not heard.chunks

    run(main)


def test_patience_has_an_end(engine):
    process = engine(step_s=0.01)

    async def main():
        async with client(process, patience_s=0.3) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, 400)))
            await asyncio.sleep(0.1)
            process.kill()
            heard = await task
            assert (
                heard.chunks[-1].finish is Finish.ERROR and "did not come back within 0.3 s" in heard.chunks[-1].error
            )
            with pytest.raises(EngineAway):
                await remote.call("stats")

    run(main)


def test_an_abort_while_the_engine_is_away_ends_the_request(engine):
    process = engine(step_s=0.01)

    async def main():
        async with client(process) as remote:
            request = asked(remote, 400)
            task = asyncio.ensure_future(hear(remote, request))
            await asyncio.sleep(0.1)
            process.kill()
            await until(lambda: not_ready(remote), "the loss")
            await remote.abort(request.id)
            heard = await task
            assert heard.ends() == {0: (Finish.ABORT, None)} and heard.tokens()
            process.wait()
            process.start()
            await until(remote.ready, "a new engine")
            assert remote.resumed == 0
            await at_rest(remote)

    run(main)


def test_an_engine_whose_runner_fails_leaves_with_its_code_and_its_requests_go_on(engine):
    process = engine(step_s=0.002, break_at=8)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            assert await asyncio.to_thread(process.wait) == Exit.ENGINE
            assert "the device is gone" in process.told()
            process.start(break_at=None)
            same(await task, here("seeded"))

    run(main)


def test_a_stopped_engine_is_not_ready_and_one_that_goes_on_is(engine):
    process = engine(step_s=0.002)

    async def main():
        async with client(process, quiet_s=0.6) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            await asyncio.sleep(0.02)
            process.kill(signal.SIGSTOP)
            await until(lambda: not_ready(remote), "silence")
            process.kill(signal.SIGCONT)
            await until(remote.ready, "it goes on")
            same(await task, here("seeded"))

    run(main)


def test_an_engine_that_hangs_in_a_step_beats_on_and_is_not_ready(engine):
    process = engine(step_s=0.002, hang_at=5)

    async def main():
        async with client(process, stall_s=0.5) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, 40)))
            await until(lambda: not_ready(remote), "the hang")
            assert remote._beat.busy and time.monotonic() - remote._beat_at < 1.0
            # It can be left all the same.
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main)


# -- clients are lost


def test_a_client_that_is_gone_takes_its_requests_along_and_the_next_one_attaches(engine):
    process = engine(step_s=0.005)

    async def main():
        async with client(process) as watcher:
            fds = num_fds(process.pid)
            other = RemoteEngine(process.socket)
            await other.start()
            await other.facts()
            tasks = [asyncio.ensure_future(hear(other, asked(other, 400, prompt=(n, 1)))) for n in range(5)]

            async def running() -> bool:
                return (await watcher.load()).running == 5

            await until(running, "all run")
            # As when its process is killed: the socket is gone, and nothing was said.
            other._link.cut()
            other._keeper.cancel()
            await at_rest(watcher)
            load = await watcher.load()
            assert load.counters["dropped_requests"] == 5 and load.counters["bad_frames"] == 0
            assert num_fds(process.pid) == fds
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            async with client(process) as again:
                same(await hear(again, asked(again, **CASES["seeded"])), here("seeded"))

    run(main)


def test_closing_ends_what_is_inside(engine):
    process = engine(step_s=0.01)

    async def main():
        remote = RemoteEngine(process.socket)
        await remote.start()
        await remote.facts()
        task = asyncio.ensure_future(hear(remote, asked(remote, 400)))
        waiting = asyncio.ensure_future(remote.call("stats"))
        await asyncio.sleep(0.1)
        await remote.close()
        await remote.close()
        heard = await task
        assert heard.chunks[-1].finish is Finish.ERROR and "closed" in heard.chunks[-1].error
        assert (await asyncio.gather(waiting, return_exceptions=True))[0] is not None
        with pytest.raises(EngineClosed):
            await anext(remote.submit(asked(remote)))
        assert not await remote.ready()

    run(main)


def test_draining_a_client_waits_for_its_readers(engine):
    process = engine(step_s=0.005)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            await asyncio.sleep(0.02)
            draining = asyncio.ensure_future(remote.drain())
            await asyncio.sleep(0)
            assert not await remote.ready()
            with pytest.raises(EngineClosed, match="draining"):
                await anext(remote.submit(asked(remote)))
            await draining
            assert task.done()
            same(await task, here("seeded"))

    run(main)


def test_a_reader_that_does_not_read_costs_no_more_than_its_tokens(engine):
    process = engine(step_s=0.0)

    async def main():
        async with client(process) as remote:
            stream = remote.submit(asked(remote, 400))
            first = await anext(stream)
            held = next(iter(remote._streams.values()))

            async def over() -> bool:
                return held.left == 0

            await until(over, "the end")
            assert len(held._chunks) < 40
            rest = [chunk async for chunk in stream]
            tokens = [t for chunk in (first, *rest) for t in chunk.tokens]
            assert len(tokens) == 400 and rest[-1].finish is Finish.LENGTH
            assert tokens == (await hear(remote, asked(remote, 400))).tokens()

    run(main)


# -- what should not come over the socket


def raw(process: EngineProcess, data: bytes) -> bytes:
    """Sends bytes on a connection of its own; what comes back until the engine cuts it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(process.socket))
        got = b""
        with contextlib.suppress(OSError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                got += piece
        return got


HELLO = wire.frame(wire.Hello(wire.VERSION, 1), 1000)


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def test_garbage_is_cut_off_and_counted_and_harms_nobody(engine):
    process = engine(step_s=0.002)
    chance = random.Random(7)
    submit = wire.frame(wire.submit(3, Request(1, (Tokens((1,)),), SamplingParams(max_tokens=400)), 0.0), 1000)
    bad = [
        chance.randbytes(50),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        HELLO + b"\xff\xff\xff\xff",
        HELLO + b"\xff\xff\xff\xff" + chance.randbytes(1000),
        HELLO + framed(chance.randbytes(100)),
        HELLO + framed(msgspec.msgpack.encode({"valid": "messagepack", "of": "another type"})),
        HELLO + framed(msgspec.msgpack.encode(["submit", "x"])),
        HELLO + framed(msgspec.msgpack.encode(["nothing", 1])),
        HELLO + HELLO,
        HELLO + submit + submit,
        HELLO + wire.frame(wire.Watch(("Nothing",)), 1000),
        HELLO + wire.frame(wire.Abort(wire.MAX_ID), 1000),
        HELLO + wire.frame(wire.Abort(-1), 1000),
        wire.frame(wire.Hello(wire.VERSION + 1, 1), 1000),
        submit,
        HELLO + b"".join(wire.frame(wire.Ask(n, "stats", {}), 1000) for n in range(200)),
    ]

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            fds = num_fds(process.pid)
            await asyncio.gather(*(asyncio.to_thread(raw, process, data) for data in bad[:-1]))
            same(await task, here("seeded"))

            async def counted() -> bool:
                return (await remote.load()).counters["bad_frames"] >= len(bad) - 1

            await until(counted, "all are counted")
            await asyncio.to_thread(raw, process, bad[-1])
            await at_rest(remote)
            assert num_fds(process.pid) == fds

    run(main)
    assert process.process.poll() is None


def test_one_that_says_nothing_is_cut_off_and_so_is_one_too_many(engine, monkeypatch):
    process = engine()
    eventually(process.socket.exists, "the socket")
    start = time.monotonic()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(17)]
    try:
        for sock in silent:
            sock.connect(str(process.socket))
            sock.settimeout(WAIT_S)
        # The last one is one too many, and hears that at once.
        with contextlib.suppress(ConnectionResetError):
            assert silent[-1].recv(10) == b""
        assert time.monotonic() - start < 1.5
        for sock in silent[:-1]:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(10) == b""
        assert time.monotonic() - start > 1.5
    finally:
        for sock in silent:
            sock.close()


def test_a_client_that_reads_nothing_is_cut_off_before_it_costs_much(monkeypatch):
    """In this process, with a small limit."""
    from millstream.engine import process as module

    monkeypatch.setattr(module, "MAX_UNREAD", 10_000)
    import tempfile
    from pathlib import Path

    async def main():
        with tempfile.TemporaryDirectory() as folder:
            server = module.EngineServer(Path(folder) / "run" / "e.sock")
            await server.open()
            server.attach(*make_null({"step_s": 0.0}))
            _reader, writer = await asyncio.open_unix_connection(server.path, limit=64)
            writer.write(HELLO)
            for n in range(40):
                request = Request(n, (Tokens((1, n)),), SamplingParams(max_tokens=400, logprobs=20))
                writer.write(wire.frame(wire.submit(n, request, 0.0), 1000))
            await until(lambda: server.counters["slow_clients"] == 1, "it is cut off")
            await until(lambda: not server.thread.busy, "its requests are gone")
            assert server.counters["dropped_requests"] > 0
            writer.close()
            await server.close()

    run(main)


def test_what_is_too_long_for_a_frame_ends_that_request_only(monkeypatch):
    from millstream.engine import process as module

    monkeypatch.setattr(module.wire, "MAX_TO_CLIENT", 3000)
    import tempfile
    from pathlib import Path

    async def main():
        with tempfile.TemporaryDirectory() as folder:
            server = module.EngineServer(Path(folder) / "run" / "e.sock")
            await server.open()
            server.attach(*make_null({"step_s": 0.0}))
            remote = RemoteEngine(server.path)
            await remote.start()
            await remote.facts()
            long = asked(remote, 5, prompt=tuple(n % 50 for n in range(100)), prompt_logprobs=20)
            heard, other = await asyncio.gather(hear(remote, long), hear(remote, asked(remote, **CASES["seeded"])))
            assert heard.chunks[-1].finish is Finish.ERROR and "too much to send" in heard.chunks[-1].error
            same(other, here("seeded"))
            await at_rest(remote)
            await remote.close()
            await server.close()

    run(main)


# -- how it ends


def test_it_drains_when_told_to_stop(engine):
    process = engine(step_s=0.005)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, **CASES["seeded"])))
            await asyncio.sleep(0.02)
            process.kill(signal.SIGTERM)
            await until(lambda: not_ready(remote), "it drains")
            late = await hear(remote, asked(remote))
            assert isinstance(late.error, EngineClosed)
            same(await task, here("seeded"))
            assert await asyncio.to_thread(process.wait) == Exit.DONE

    run(main)
    assert not process.socket.exists()


@pytest.mark.parametrize("how", ["second signal", "time is over"])
def test_draining_ends_at_the_second_signal_or_when_its_time_is_over(engine, how):
    process = engine("--drain-s", "0.4" if how == "time is over" else "60", step_s=0.02)

    async def main():
        async with client(process) as remote:
            task = asyncio.ensure_future(hear(remote, asked(remote, 400)))
            await asyncio.sleep(0.1)
            start = time.monotonic()
            process.kill(signal.SIGTERM)
            if how == "second signal":
                await asyncio.sleep(0.1)
                process.kill(signal.SIGINT)
            assert await asyncio.to_thread(process.wait) == Exit.CUT
            assert time.monotonic() - start < 5.0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main)


def test_it_ends_with_the_code_that_says_why(engine, tmp_path):
    idle = engine()
    eventually(idle.socket.exists, "the socket")
    idle.kill(signal.SIGTERM)
    ends = {
        "told while it loads": (engine(load_s=30.0), Exit.DONE),
        "usage": (engine(fail_start="usage"), Exit.USAGE),
        "model": (engine(fail_start="model"), Exit.MODEL),
        "crash": (engine(fail_start="crash"), Exit.FAILED),
        # Its parent is this process, and not process 1.
        "orphan": (engine("--parent", "1"), Exit.ORPHANED),
        "idle": (idle, Exit.DONE),
    }
    loading = ends["told while it loads"][0]
    eventually(loading.socket.exists, "the socket")
    time.sleep(0.1)
    loading.kill(signal.SIGTERM)
    for name, (process, code) in ends.items():
        assert process.wait() == code, f"{name}: {process.told()}"
    assert "is damaged" in ends["model"][0].told() and "no such setting" in ends["usage"][0].told()
    assert "ZeroDivisionError" in ends["crash"][0].told()
    blocked = EngineProcess(tmp_path)
    blocked.socket.parent.mkdir()
    blocked.socket.parent.chmod(0o755)
    try:
        assert blocked.start().wait() == Exit.ADDRESS
    finally:
        blocked.end()


def test_it_tells_how_the_loading_gets_on(engine):
    process = engine(load_s=0.6)

    async def main():
        remote = RemoteEngine(process.socket)
        await remote.start()
        await until(lambda: remote._beat is not None, "a beat while it loads")
        assert remote._beat.phase == "loading" and not await remote.ready()
        with pytest.raises(EngineAway, match="loaded"):
            await anext(remote.submit(asked(remote)))
        await remote.facts()
        await until(remote.ready, "it is ready")
        assert len((await hear(remote, asked(remote))).tokens()) == 20
        await remote.close()

    run(main)


def test_the_vocabulary_of_these_tests_spells_tokens():
    assert VOCABULARY.token_bytes(12) == b"12 "
