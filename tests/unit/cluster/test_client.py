"""Several engines as one: whatever happens to any of them, a client reads the text of an undisturbed run."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from harness import VOCAB
from null_process import make_null

from millstream.cluster.client import ClusterClient
from millstream.cluster.config import ClusterConfig
from millstream.cluster.protocol import Autoscaler
from millstream.core import registry
from millstream.core.errors import BadRequest, ConfigError, EngineAway, EngineClosed
from millstream.core.events import Admitted, Finished
from millstream.core.plan import SampleAsk
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Slo, Tokens
from millstream.core.sequence import Finish
from millstream.engine.thread import AsyncEngine, EngineThread
from millstream.runner.null_runner import expected

QUICK = ClusterConfig(check_s=0.02, suspect_s=0.1, lost_s=0.4, patience_s=2.0, stable_s=0.02)
WAIT_S = 20.0


class Here:
    """An engine of this process, with a way to it that can be cut: what was said meanwhile comes when it is healed."""

    def __init__(self, **options):
        engine, self._facts = make_null({"step_s": 0.002, **options})
        self.engine = engine
        self.thread = EngineThread(engine)
        self.inner = AsyncEngine(self.thread, self._facts)
        self.open = asyncio.Event()
        self.open.set()
        self.inside: set[int] = set()
        self.took = 0
        self.delay_s = 0.0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    async def submit(self, request):
        await self.open.wait()
        self.inside.add(request.id)
        self.took += 1
        try:
            async for chunk in self.inner.submit(request):
                await self.open.wait()
                await asyncio.sleep(self.delay_s)
                yield chunk
        finally:
            self.inside.discard(request.id)

    async def ready(self):
        await self.open.wait()
        return await self.inner.ready()

    async def load(self):
        await self.open.wait()
        return await self.inner.load()

    async def abort(self, request_id):
        await self.open.wait()
        await self.inner.abort(request_id)

    def cut(self):
        self.open.clear()

    def heal(self):
        self.open.set()

    def die(self):
        """As an engine whose device is gone."""

        def fail(ticket):
            raise RuntimeError("the device is gone")

        self.engine.runner.collect = fail


class House:
    """A backend: engines of this process, made on demand."""

    def __init__(self, **options):
        self.options, self.made, self.killed = options, [], []
        self.fails = 0

    async def start(self, name):
        if self.fails:
            self.fails -= 1
            raise EngineClosed("there is no room for it")
        self.made.append(Here(**self.options))
        return self.made[-1]

    def alive(self, client):
        return client.thread.alive

    async def kill(self, client):
        self.killed.append(client)
        await client.inner.close()

    async def close(self):
        for client in self.made:
            await client.inner.close()


def run(test):
    asyncio.run(asyncio.wait_for(test(), WAIT_S))


async def cluster_of(count, config=QUICK, router="least-work", **options):
    cluster = ClusterClient(registry.make("router", router), config)
    await cluster.start()
    engines = [Here(**options) for _ in range(count)]
    for one in engines:
        await cluster.add(one)
    return cluster, engines


def ask(cluster, prompt=(1, 2, 3), max_tokens=60, **given):
    params = {"temperature": 1.0, "max_tokens": max_tokens, **given.pop("params", {})}
    return Request(cluster.new_id(), (Tokens(tuple(prompt)),), SamplingParams(**params), **given)


class Read:
    """What came of a request."""

    def __init__(self, cluster, request, delay_s=0.0):
        self.cluster, self.request, self.delay_s = cluster, request, delay_s
        self.chunks = []
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        async for chunk in self.cluster.submit(self.request):
            self.chunks.append(chunk)
            await asyncio.sleep(self.delay_s)
        return self

    def tokens(self, index=0):
        return [token for chunk in self.chunks if chunk.index == index for token in chunk.tokens]

    def logprobs(self, index=0):
        return [one for chunk in self.chunks if chunk.index == index for one in chunk.logprobs]

    def finish(self, index=0):
        return [chunk.finish for chunk in self.chunks if chunk.index == index and chunk.finish is not None]

    async def until(self, count, index=0):
        while len(self.tokens(index)) < count:
            assert not self.task.done(), self.chunks[-1:]
            await asyncio.sleep(0.001)


def truth(request, index=0):
    own = SampleAsk(request.params, request.params.seed or 0, index, 0, request.num_prompt)
    return expected(request.prompt_ids, own, request.params.max_tokens, VOCAB)


async def close(cluster, engines=()):
    await cluster.close()
    for one in engines:
        one.heal()
        await one.inner.close()
        assert not one.inside
        assert not one.engine.scheduler.live
        one.engine.scheduler.ledger.index.clear()
        assert one.engine.scheduler.ledger.free() == one.engine.scheduler.ledger.total()


def of_place(cluster, request):
    place = cluster.fleet.place_of(request.id)
    assert place is not None
    return place


@pytest.mark.parametrize("seed", [0, 7, 12345])
def test_the_text_is_the_same_when_an_engine_dies_in_the_middle_of_it(seed):
    async def test():
        cluster, engines = await cluster_of(3)
        requests = [ask(cluster, (seed % 40, n, 2), params={"seed": seed + n, "n": 1 + n % 3}) for n in range(6)]
        reads = [Read(cluster, one) for one in requests]
        for read in reads:
            await read.until(7)
        place = of_place(cluster, requests[0])
        engines[place].die()
        await asyncio.gather(*(read.task for read in reads))
        for read in reads:
            for index in range(read.request.params.n):
                assert read.tokens(index) == truth(read.request, index)
                assert read.finish(index) == [Finish.LENGTH]
        assert cluster.migrations >= 1
        assert not cluster.fleet.members[place].up and len(cluster.fleet) == 0
        await close(cluster, [one for one in engines if one is not engines[place]])

    run(test)


def test_logprobs_and_those_of_the_prompt_come_once_whatever_dies():
    async def test():
        cluster, engines = await cluster_of(2)
        told = {"logprobs": 2, "prompt_logprobs": 1, "n": 2, "seed": 5}
        quiet = Read(cluster, ask(cluster, (4, 5, 6), params=told))
        await quiet.task
        read = Read(cluster, ask(cluster, (4, 5, 6), params=told))
        await read.until(10)
        engines[of_place(cluster, read.request)].die()
        await read.task
        for index in range(2):
            assert read.tokens(index) == quiet.tokens(index)
            assert read.logprobs(index) == quiet.logprobs(index)
            scores = [c.prompt_logprobs for c in read.chunks if c.index == index and c.prompt_logprobs is not None]
            assert len(scores) == 1
            last = [c for c in read.chunks if c.index == index][-1]
            before = [c for c in quiet.chunks if c.index == index][-1]
            assert last.usage.output_tokens == before.usage.output_tokens == 60
            assert last.cumulative_logprob == pytest.approx(before.cumulative_logprob)
        await cluster.close()
        for one in engines:
            await one.inner.close()

    run(test)


def test_a_request_without_a_seed_gets_one_that_it_keeps_when_it_moves():
    async def test():
        cluster, engines = await cluster_of(2)
        read = Read(cluster, ask(cluster))
        await read.until(5)
        sent = cluster._sent[read.request.id].stream.request
        engines[of_place(cluster, read.request)].die()
        await read.task
        assert read.tokens() == truth(sent)
        await cluster.close()
        for one in engines:
            await one.inner.close()

    run(test)


def test_what_a_cut_off_engine_still_says_is_not_heard():
    async def test():
        cluster, engines = await cluster_of(2, max_tokens=200)
        reads = [Read(cluster, ask(cluster, (n,), 200, params={"seed": n})) for n in range(4)]
        for read in reads:
            await read.until(5)
        place = of_place(cluster, reads[0].request)
        engines[place].cut()
        await asyncio.sleep(0.25)
        assert cluster.members()[place].state == "suspected"
        assert [member.place for member in cluster.fleet.up] == [1 - place]
        fresh = Read(cluster, ask(cluster, (9,), 5, params={"seed": 1}))
        await fresh.task
        await asyncio.sleep(0.3)
        assert cluster.lost == 1
        engines[place].heal()
        await asyncio.gather(*(read.task for read in reads))
        for read in [*reads, fresh]:
            assert read.tokens() == truth(read.request) and read.finish() == [Finish.LENGTH]
        # Somebody else keeps it: it comes back at another place, and its prefixes are nobody's business.
        while len(cluster.fleet.up) < 2:
            await asyncio.sleep(0.01)
        assert cluster.fleet.members[2].name == str(place)
        again = [Read(cluster, ask(cluster, (n, 3), 20, params={"seed": n})) for n in range(4)]
        await asyncio.gather(*(read.task for read in again))
        assert all(read.tokens() == truth(read.request) for read in again)
        await close(cluster, engines)

    run(test)


def test_while_all_engines_are_suspected_a_new_request_waits():
    async def test():
        cluster, engines = await cluster_of(2, replace(QUICK, lost_s=5.0))
        for one in engines:
            one.cut()
        await asyncio.sleep(0.25)
        assert not await cluster.ready()
        read = Read(cluster, ask(cluster, params={"seed": 3}))
        await asyncio.sleep(0.1)
        assert (await cluster.load()).waiting == 1
        engines[1].heal()
        await read.task
        assert read.tokens() == truth(read.request) and cluster.migrations == 0
        await close(cluster, engines)

    run(test)


def test_an_engine_that_answers_again_in_time_loses_nothing():
    async def test():
        cluster, engines = await cluster_of(2, replace(QUICK, lost_s=5.0))
        read = Read(cluster, ask(cluster, params={"seed": 3}))
        await read.until(5)
        place = of_place(cluster, read.request)
        engines[place].cut()
        await asyncio.sleep(0.25)
        assert cluster.members()[place].state == "suspected"
        engines[place].heal()
        await read.task
        assert read.tokens() == truth(read.request)
        assert cluster.migrations == cluster.lost == 0
        while cluster.members()[place].state != "up":
            await asyncio.sleep(0.01)
        await close(cluster, engines)

    run(test)


def test_a_slow_engine_gets_less():
    async def test():
        cluster, engines = await cluster_of(2)
        engines[0].delay_s = 0.03
        reads = []
        for n in range(60):
            reads.append(Read(cluster, ask(cluster, (n % 40, 1, 2, 3), 12, params={"seed": n})))
            await asyncio.sleep(0.02)
        await asyncio.gather(*(read.task for read in reads))
        assert cluster.fleet.members[0].speed < 0.5 * cluster.fleet.members[1].speed
        assert engines[0].took < 0.6 * engines[1].took
        await close(cluster, engines)

    run(test)


def test_draining_one_engine_loses_nothing_and_gives_it_nothing():
    async def test():
        cluster, engines = await cluster_of(2)
        reads = [Read(cluster, ask(cluster, (n,), params={"seed": n})) for n in range(6)]
        for read in reads:
            await read.until(3)
        before = engines[0].took
        drained = asyncio.create_task(cluster.remove(0))
        more = [Read(cluster, ask(cluster, (n, 1), params={"seed": n})) for n in range(6)]
        await drained
        assert engines[0].took == before and not engines[0].thread.alive
        await asyncio.gather(*(read.task for read in [*reads, *more]))
        assert all(read.tokens() == truth(read.request) for read in [*reads, *more])
        assert cluster.migrations == 0 and [one.place for one in cluster.members()] == [1]
        place = await cluster.add(Here())
        assert place == 2 and cluster.members()[1].name == "0"
        await cluster.remove(1, drain=False)
        await cluster.remove(1)
        await cluster.remove(99)
        await close(cluster, engines)

    run(test)


def test_taking_an_engine_away_at_once_moves_what_it_had():
    async def test():
        cluster, engines = await cluster_of(2)
        reads = [Read(cluster, ask(cluster, (n,), params={"seed": n})) for n in range(4)]
        for read in reads:
            await read.until(3)
        await cluster.remove(0, drain=False)
        await asyncio.gather(*(read.task for read in reads))
        assert all(read.tokens() == truth(read.request) for read in reads)
        assert cluster.migrations == 2
        await close(cluster, engines)

    run(test)


def test_draining_all_ends_when_the_last_has_ended():
    async def test():
        cluster, engines = await cluster_of(2)
        read = Read(cluster, ask(cluster, params={"seed": 1}))
        await read.until(3)
        drained = asyncio.create_task(cluster.drain())
        await asyncio.sleep(0)
        assert not await cluster.ready()
        with pytest.raises(EngineClosed, match="draining"):
            await Read(cluster, ask(cluster)).task
        await drained
        assert read.finish() == [Finish.LENGTH]
        await close(cluster, engines)

    run(test)


def test_with_all_engines_dead_there_is_a_clear_error_and_nobody_waits():
    async def test():
        cluster, engines = await cluster_of(2)
        begun = Read(cluster, ask(cluster, params={"seed": 1}))
        await begun.until(3)
        for one in engines:
            one.die()
        other = Read(cluster, ask(cluster))
        await begun.task
        assert begun.finish() == [Finish.ERROR] and "no engine" in begun.chunks[-1].error
        assert begun.tokens() == truth(begun.request)[: len(begun.tokens())]
        with pytest.raises(EngineAway, match="no engine"):
            await other.task
        assert not await cluster.ready()
        with pytest.raises(EngineAway, match="takes requests now"):
            await Read(cluster, ask(cluster)).task
        with pytest.raises(EngineAway):
            await cluster.call("stats")
        await cluster.close()

    run(test)


def test_a_request_that_kills_engines_is_not_sent_for_ever():
    async def test():
        house = House()
        config = replace(QUICK, replicas=2, max_losses=3)
        cluster = ClusterClient(registry.make("router", "least-work"), config, house)
        await cluster.start()
        await cluster.facts()
        read = Read(cluster, ask(cluster, max_tokens=400, params={"seed": 1}))
        for losses in range(3):
            await read.until(3 * losses + 3)
            place = of_place(cluster, read.request)
            cluster._nodes[place].client.die()
            while not read.task.done() and cluster.fleet.place_of(read.request.id) in (place, None):
                await asyncio.sleep(0.005)
        await read.task
        assert read.finish() == [Finish.ERROR] and "lost 3 times" in read.chunks[-1].error
        while len(cluster.fleet.up) < 2:
            await asyncio.sleep(0.01)
        await cluster.close()

    run(test)


@pytest.mark.parametrize("where", ["running", "suspected", "waiting"])
def test_an_abort_ends_a_request_wherever_it_is(where):
    async def test():
        cluster, engines = await cluster_of(1, replace(QUICK, lost_s=5.0))
        read = Read(cluster, ask(cluster, max_tokens=300, params={"n": 2}))
        await read.until(3)
        if where == "suspected":
            engines[0].cut()
            await asyncio.sleep(0.25)
        elif where == "waiting":
            cluster.backend = House()
            cluster._lose(cluster._nodes[0], "a test")
            assert read.request.id in cluster._waiting
        await cluster.abort(read.request.id)
        await cluster.abort(12345)
        await read.task
        assert read.finish(0) == read.finish(1) == [Finish.ABORT]
        assert len(cluster.fleet) == 0
        cluster.backend = None
        engines[0].heal()
        await asyncio.sleep(0.1)
        await close(cluster, engines)

    run(test)


def test_whoever_stops_reading_frees_what_the_engine_held():
    async def test():
        cluster, engines = await cluster_of(2)
        chunks = cluster.submit(ask(cluster, max_tokens=400))
        await chunks.__anext__()
        await chunks.aclose()
        for one in engines:
            while one.inside or one.engine.scheduler.live:
                await asyncio.sleep(0.005)
        assert len(cluster.fleet) == 0 and not cluster._sent
        await close(cluster, engines)

    run(test)


def test_a_deadline_holds_also_where_the_engine_is_cut_off():
    async def test():
        cluster, engines = await cluster_of(1, replace(QUICK, lost_s=10.0))
        read = Read(cluster, ask(cluster, max_tokens=400, slo=Slo(deadline_s=0.2)))
        await read.until(1)
        engines[0].cut()
        await read.task
        assert read.finish() == [Finish.TIMEOUT]
        engines[0].heal()
        await close(cluster, engines)

    run(test)


def test_bad_requests_are_told_and_doubt_no_engine():
    async def test():
        cluster, engines = await cluster_of(2)
        with pytest.raises(BadRequest):
            await Read(cluster, ask(cluster, (VOCAB + 1,))).task
        with pytest.raises(BadRequest, match="id"):
            first = Read(cluster, ask(cluster))
            await first.until(1)
            await Read(cluster, first.request).task
        await first.task
        assert len(cluster.fleet.up) == 2 and not cluster._sent
        await close(cluster, engines)

    run(test)


def test_engines_must_serve_the_same():
    async def test():
        cluster, engines = await cluster_of(1)
        other = Here()
        other.inner._facts = replace(other._facts, dtype="bfloat16")
        with pytest.raises(ConfigError, match="dtype"):
            await cluster.add(other)
        assert [one.place for one in cluster.members()] == [0]
        await other.inner.close()
        await close(cluster, engines)

    run(test)


def test_events_and_loads_and_calls_are_those_of_all():
    async def test():
        cluster, engines = await cluster_of(2, router="round-robin")
        seen = []

        async def listen():
            async for event in cluster.events(Admitted, Finished):
                seen.append(event)

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0.02)
        later = await cluster.add(Here())
        reads = [Read(cluster, ask(cluster, (n,), 8)) for n in range(6)]
        await asyncio.gather(*(read.task for read in reads))
        while len(seen) < 12:
            await asyncio.sleep(0.01)
        ids = {event.seq.request_id for event in seen}
        assert ids == {read.request.id for read in reads} and later == 2
        load = await cluster.load()
        assert load.total_blocks == 3 * engines[0].engine.scheduler.ledger.total()
        assert load.running == load.waiting == 0
        stats = await cluster.call("stats")
        assert stats["steps"] == load.counters["steps"] > 0
        freed = await cluster.call("reset_prefix_cache")
        assert freed["free_blocks"] == load.total_blocks
        steps = load.counters["steps"]
        await cluster.remove(0)
        assert (await cluster.load()).counters["steps"] >= steps, "counters never go back"
        listener.cancel()
        await close(cluster)
        for one in engines:
            await one.inner.close()

    run(test)


def test_a_backend_replaces_what_is_lost_and_backs_off_from_what_fails():
    async def test():
        house = House()
        house.fails = 2
        cluster = ClusterClient(registry.make("router", "least-work"), replace(QUICK, replicas=2), house)
        await cluster.start()
        facts = await cluster.facts()
        assert facts.model == "null"
        while len(cluster.fleet.up) < 2:
            await asyncio.sleep(0.01)
        assert sorted(one.name for one in cluster.members()) == ["0", "1"]
        victim = cluster.members()[0]
        cluster._nodes[victim.place].client.cut()
        while cluster.lost < 1 or len(cluster.fleet.up) < 2:
            await asyncio.sleep(0.01)
        assert sorted(one.name for one in cluster.members()) == ["0", "1"]
        assert cluster._nodes[victim.place].client in house.killed
        await cluster.close()

    run(test)


def test_a_replica_that_crashes_again_and_again_gets_no_traffic_and_is_tried_ever_more_seldom():
    async def test():
        house, scaler = House(), Asks()
        config = replace(QUICK, max_replicas=2, interval_s=0.02, stable_s=5.0)
        cluster = ClusterClient(registry.make("router", "round-robin"), config, house, scaler)
        await cluster.start()
        await cluster.facts()
        house.fails, scaler.wanted = 1000, 2
        end = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < end:
            read = Read(cluster, ask(cluster, max_tokens=5))
            await read.task
            assert read.finish() == [Finish.LENGTH]
        # Pauses of 0.2, 0.4 and 0.8 s: three starts, or four.
        assert 3 <= 1000 - house.fails <= 4
        assert cluster.migrations == 0 and len(house.made) == 1 and house.made[0].took > 10
        house.fails = 0
        while len(cluster.fleet.up) < 2:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(Read(cluster, ask(cluster)).task for _ in range(4)))
        assert house.made[1].took == 2
        await cluster.close()

    run(test)


def test_an_engine_that_is_lost_soon_after_it_was_up_counts_as_a_start_that_failed():
    async def test():
        house = House()
        cluster = ClusterClient(registry.make("router", "least-work"), replace(QUICK, stable_s=5.0), house)
        await cluster.start()
        came = []
        for _ in range(4):
            while not cluster.fleet.up:
                await asyncio.sleep(0.005)
            came.append(asyncio.get_running_loop().time())
            house.made[-1].die()
            await asyncio.gather(Read(cluster, ask(cluster)).task, return_exceptions=True)
        pauses = [after - before for before, after in itertools.pairwise(came)]
        assert pauses[0] >= 0.2 and pauses[1] >= 0.4 and pauses[2] >= 0.8
        await cluster.close()

    run(test)


def test_a_backend_that_never_makes_an_engine_is_given_up():
    async def test():
        house = House()
        house.fails = 100
        cluster = ClusterClient(registry.make("router", "least-work"), replace(QUICK, give_up=2), house)
        await cluster.start()
        with pytest.raises(EngineClosed, match="there is no room for it"):
            await cluster.facts()
        with pytest.raises(EngineClosed, match="none will be"):
            await Read(cluster, ask(cluster)).task
        await cluster.close()

    run(test)


@pytest.mark.parametrize("router", registry.names("router"))
def test_random_faults_of_all_kinds_lose_no_text(router):
    chance = random.Random(router)

    async def test():
        house = House(step_s=0.001)
        config = replace(QUICK, replicas=3, lost_s=0.2, max_losses=100, give_up=1000)
        cluster = ClusterClient(registry.make("router", router), config, house)
        await cluster.start()
        await cluster.facts()
        reads = []
        end = asyncio.get_running_loop().time() + 2.5
        while asyncio.get_running_loop().time() < end:
            while len([read for read in reads if not read.task.done()]) < 8 and await cluster.ready():
                n = len(reads)
                given = {"seed": n, "n": 1 + n % 3, "temperature": float(n % 2)}
                reads.append(Read(cluster, ask(cluster, (n % 40, 1, n % 7), 20 + 3 * (n % 30), params=given)))
                await asyncio.sleep(0)
            up = [node for node in cluster._nodes if node.ready and not node.gone]
            if up:
                node = chance.choice(up)
                fault = chance.choice(["die", "cut", "heal", "drain", "fail", "none"])
                if fault == "drain":
                    cluster.let_go(node.place)
                elif fault == "fail":
                    house.fails = 1
                elif fault != "none":
                    getattr(node.client, fault)()
            await asyncio.sleep(chance.uniform(0.0, 0.15))
        for one in house.made:
            one.heal()
        await asyncio.gather(*(read.task for read in reads), return_exceptions=True)
        wrong = 0
        for read in reads:
            if isinstance(read.task.exception(), EngineAway):
                wrong += 1  # nobody was up when it was sent
                continue
            for index in range(read.request.params.n):
                assert read.tokens(index) == truth(read.request, index)
                assert read.finish(index) == [Finish.LENGTH]
        assert len(reads) > 20 and wrong <= len(reads) / 4 and cluster.migrations > 5
        assert len(cluster.fleet) == 0 and not cluster._sent and not cluster._waiting
        assert all(member.requests == member.prompt_tokens == 0 for member in cluster.fleet.members)
        await cluster.close()
        assert not cluster._tasks

    run(test)


class Asks(Autoscaler):
    def __init__(self):
        self.wanted, self.views = 1, []

    def target(self, fleet, now):
        self.views.append(fleet)
        return self.wanted


def test_an_autoscaler_gets_what_it_asks_for_within_bounds():
    async def test():
        house, scaler = House(), Asks()
        config = replace(QUICK, replicas=1, min_replicas=1, max_replicas=3, interval_s=0.05)
        cluster = ClusterClient(registry.make("router", Choice("least-work")), config, house, scaler)
        await cluster.start()
        await cluster.facts()
        reads = [Read(cluster, ask(cluster, (n,), 300, slo=Slo(ttft_s=5.0, e2e_s=60.0))) for n in range(6)]
        scaler.wanted = 99
        while len(cluster.fleet.up) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(house.made) == 3
        more = [Read(cluster, ask(cluster, (n, 1), 200)) for n in range(6)]
        scaler.wanted = 0
        await asyncio.gather(*(read.task for read in [*reads, *more]))
        while len(cluster.members()) > 1:
            await asyncio.sleep(0.01)
        while sum(view.ended for view in scaler.views) < 12:
            await asyncio.sleep(0.01)
        assert sum(view.arrived for view in scaler.views) == sum(view.ended for view in scaler.views) == 12
        assert all(0 < view.interval_s < 5 and 0 <= view.kv <= 1 for view in scaler.views)
        assert all(read.finish() == [Finish.LENGTH] for read in [*reads, *more])
        assert cluster.migrations == 0 and cluster.lost == 0
        assert any(view.running for view in scaler.views) and any(view.busy > 0.5 for view in scaler.views)
        assert scaler.views[-1].attainment == 1.0
        await cluster.close()

    run(test)
