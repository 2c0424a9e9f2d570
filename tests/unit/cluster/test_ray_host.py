"""What lies between a server and an engine in an actor, without Ray: calls that overtake each other, ways that end."""

from __future__ import annotations

import asyncio
import random
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from harness import VOCAB
from null_process import make_null

from millstream.cluster.ray_backend import EngineHost, RayBackend, _connect, _import_ray
from millstream.core.errors import ConfigError, EngineClosed
from millstream.core.plan import SampleAsk
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.engine.remote import RemoteEngine
from millstream.runner.null_runner import expected

WAIT_S = 20.0


class Method:
    def __init__(self, call):
        self.call = call

    def options(self, **given):
        return self

    def remote(self, *given):
        return self.call(*given)


class Actor:
    """What Ray makes of a host, as far as a driver sees it; calls of it arrive in any order."""

    def __init__(self, make, seed=0):
        self.host = EngineHost(make)
        self.chance = random.Random(seed)
        self.calls = 0
        self.tasks = []
        self.gone = asyncio.Event()
        self.hear, self.news = Method(self._hear), Method(self._news)

    def _hear(self, number, data):
        self.calls += 1
        for _ in range(self.chance.choice([1, 1, 2])):
            self.tasks.append(asyncio.create_task(self._late(number, data)))

    async def _late(self, number, data):
        await asyncio.sleep(self.chance.choice([0.0, 0.0, 0.001, 0.004]))
        await self.host.hear(number, data)

    async def _news(self):
        async for data in self.host.news():
            if self.gone.is_set():
                raise RuntimeError("Traceback of an actor\nRuntimeError: the node is gone")

            async def piece(data=data):
                return data

            yield piece()


async def engine_of(actor):
    engine = RemoteEngine("an actor", connect=partial(_connect, actor), max_losses=1)
    await engine.start()
    return engine


async def read(engine, number, prompt, count, **params):
    request = Request(
        number, (Tokens(tuple(prompt)),), SamplingParams(max_tokens=count, **{"temperature": 1.0, "seed": 1, **params})
    )
    chunks = [chunk async for chunk in engine.submit(request)]
    own = SampleAsk(request.params, 1, 0, 0, request.num_prompt)
    return chunks, [token for chunk in chunks for token in chunk.tokens], expected(prompt, own, count, VOCAB)


def run(test):
    asyncio.run(asyncio.wait_for(test(), WAIT_S))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calls_that_overtake_each_other_or_come_twice_are_taken_once_and_in_order(seed):
    async def test():
        actor = Actor(partial(make_null, {"step_s": 0.001, "load_s": 0.05}), seed)
        engine = await engine_of(actor)
        facts = await engine.facts()
        assert facts.model == "null" and not engine.closed
        while not await engine.ready():
            await asyncio.sleep(0.01)
        for _, got, want in await asyncio.gather(*(read(engine, n, (n, 2), 30) for n in range(1, 20))):
            assert got == want
        assert (await engine.call("stats"))["steps"] > 0
        await engine.close()

    run(test)


def test_what_is_said_in_one_turn_goes_in_one_call():
    async def test():
        actor = Actor(partial(make_null, {}))
        engine = await engine_of(actor)
        await engine.facts()
        await asyncio.sleep(0.05)
        before = actor.calls
        asked = [asyncio.create_task(read(engine, n, (n,), 1)) for n in range(1, 50)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert actor.calls - before <= 2
        await asyncio.gather(*asked)
        await engine.close()

    run(test)


def test_an_actor_that_is_gone_does_not_come_back_and_says_why():
    async def test():
        actor = Actor(partial(make_null, {"step_s": 0.005}))
        engine = await engine_of(actor)
        await engine.facts()
        reading = asyncio.create_task(read(engine, 1, (1,), 400))
        await asyncio.sleep(0.1)
        actor.gone.set()
        chunks, got, want = await reading
        assert chunks[-1].finish is Finish.ERROR and got == want[: len(got)] and got
        assert engine.closed and not await engine.ready()
        with pytest.raises(EngineClosed, match="the node is gone"):
            await read(engine, 2, (1,), 4)

    run(test)


def test_an_engine_that_fails_ends_the_way_and_one_that_cannot_be_made_says_so():
    async def test():
        engine = await engine_of(Actor(partial(make_null, {"break_at": 5})))
        await engine.facts()
        chunks, _, _ = await read(engine, 1, (1,), 40)
        assert chunks[-1].finish is Finish.ERROR and engine.closed
        engine = await engine_of(Actor(partial(make_null, {"fail_start": "usage"})))
        with pytest.raises(EngineClosed, match="there is no such setting"):
            await engine.facts()

    run(test)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"millstream\[cluster\]"):
        _import_ray()

    async def test():
        backend = RayBackend(partial(make_null, {}))
        with pytest.raises(ConfigError, match=r"millstream\[cluster\]"):
            await backend.start("0")
        await backend.close()

    run(test)
