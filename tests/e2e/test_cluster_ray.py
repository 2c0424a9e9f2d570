"""Engines as Ray actors: killed or stopped in the middle of an answer, and nobody can tell from the text."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from harness import VOCAB
from null_process import make_null

from millstream.cluster.client import ClusterClient
from millstream.cluster.config import ClusterConfig, RayConfig
from millstream.cluster.ray_backend import RayBackend
from millstream.core import registry
from millstream.core.errors import EngineClosed
from millstream.core.events import Finished
from millstream.core.plan import SampleAsk
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.runner.null_runner import expected
from tiny_files import build_model

ENGINES = Path(__file__).parents[1] / "unit" / "engine"
CONFIG = ClusterConfig(replicas=2, check_s=0.1, suspect_s=1.5, lost_s=3.0, max_losses=5)
# Actors import what this process does, the engine of tests included.
PATH = (str(ENGINES), str(ENGINES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")]))
HERE = {"PYTHONPATH": os.pathsep.join(PATH)}
WAIT_S = 55.0

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'millstream[cluster]'"
)


def cluster_of(make, config=CONFIG):
    backend = RayBackend(make, RayConfig(), environment=HERE, log_to_driver=False)
    return ClusterClient(registry.make("router", "round-robin"), config, backend)


async def until(true, what):
    for _ in range(int(WAIT_S / 0.02)):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(what)


async def started(make, config=CONFIG):
    cluster = cluster_of(make, config)
    await cluster.start()
    await cluster.facts()
    await until(lambda: len(cluster.fleet.up) == config.replicas, "all replicas up")
    return cluster


def ask(cluster, prompt, max_tokens, **params):
    given = {"temperature": 1.0, "max_tokens": max_tokens, **params}
    return Request(cluster.new_id(), (Tokens(tuple(prompt)),), SamplingParams(**given))


class Read:
    def __init__(self, cluster, request):
        self.request, self.chunks = request, []
        self.task = asyncio.create_task(self._read(cluster))

    async def _read(self, cluster):
        async for chunk in cluster.submit(self.request):
            self.chunks.append(chunk)

    def tokens(self, index=0):
        return [token for chunk in self.chunks if chunk.index == index for token in chunk.tokens]

    def finish(self, index=0):
        return [chunk.finish for chunk in self.chunks if chunk.index == index and chunk.finish is not None]


def truth(request, index=0):
    own = SampleAsk(request.params, request.params.seed or 0, index, 0, request.num_prompt)
    return expected(request.prompt_ids, own, request.params.max_tokens, VOCAB)


def pid_of(cluster, request):
    return cluster._nodes[cluster.fleet.place_of(request.id)].client.engine_pid


def test_an_actor_that_is_killed_and_one_that_is_stopped_change_no_text():
    async def test():
        cluster = await started(partial(make_null, {"step_s": 0.004, "context": 2048, "blocks": 2048}))
        seen = []

        async def listen():
            async for event in cluster.events(Finished):
                seen.append(event)

        listener = asyncio.create_task(listen())
        try:
            for number in (signal.SIGKILL, signal.SIGSTOP):
                migrations = cluster.migrations
                reads = [Read(cluster, ask(cluster, (n, 2, 3), 500, seed=n, n=1 + n % 2, logprobs=1)) for n in range(4)]
                await until(lambda: all(len(read.tokens()) > 20 for read in reads), "tokens")  # noqa: B023
                os.kill(pid_of(cluster, reads[0].request), number)
                await asyncio.gather(*(read.task for read in reads))
                for read in reads:
                    for index in range(read.request.params.n):
                        assert read.tokens(index) == truth(read.request, index)
                        assert read.finish(index) == [Finish.LENGTH]
                        assert sum(len(c.logprobs) for c in read.chunks if c.index == index) == 500
                assert cluster.migrations > migrations
                await until(lambda: len(cluster.fleet.up) == 2, "a fresh one in its place")
            assert cluster.lost == 2 and sorted(one.name for one in cluster.members()) == ["0", "1"]
            stats = await cluster.call("stats")
            assert stats["steps"] > 0 and (await cluster.load()).running == 0
            await until(lambda: len(seen) >= 6, "events of actors")
            read = Read(cluster, ask(cluster, (1,), 2000))
            await until(lambda: read.tokens(), "tokens")
            await cluster.abort(read.request.id)
            await read.task
            assert read.finish() == [Finish.ABORT]
        finally:
            listener.cancel()
            await cluster.close()

    asyncio.run(asyncio.wait_for(test(), WAIT_S))


def test_a_start_that_fails_says_what_was_wrong():
    async def test():
        config = ClusterConfig(replicas=1, check_s=0.05, give_up=1)
        cluster = cluster_of(partial(make_null, {"fail_start": "model"}), config)
        await cluster.start()
        try:
            with pytest.raises(EngineClosed, match=r"model\.gguf: is damaged"):
                await cluster.facts()
        finally:
            await cluster.close()

    asyncio.run(asyncio.wait_for(test(), WAIT_S))


def test_a_real_model_goes_on_in_another_actor_as_it_began(tmp_path):
    model = build_model(tmp_path / "tiny")
    tree = {"runner": {"threads": 1, "plans": 1}, "cache": {"blocks": 512, "block_size": 16}}

    async def test():
        backend = RayBackend.of(str(model), tree, RayConfig(), environment=HERE, log_to_driver=False)
        cluster = ClusterClient(registry.make("router", "least-work"), CONFIG, backend)
        await cluster.start()
        try:
            await cluster.facts()
            await until(lambda: len(cluster.fleet.up) == 2, "all replicas up")
            quiet = Read(cluster, ask(cluster, (5, 6, 7), 120, seed=3, ignore_eos=True))
            await quiet.task
            read = Read(cluster, ask(cluster, (5, 6, 7), 120, seed=3, ignore_eos=True))
            await until(lambda: len(read.tokens()) > 3, "tokens")
            os.kill(pid_of(cluster, read.request), signal.SIGKILL)
            await read.task
            assert read.tokens() == quiet.tokens() and len(read.tokens()) == 120
            assert cluster.migrations == 1
        finally:
            await cluster.close()

    asyncio.run(asyncio.wait_for(test(), WAIT_S))
