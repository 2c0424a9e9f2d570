"""What watches a server, over an engine in a process of its own: told of every step, and true after that was lost."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from engine_process import EngineProcess
from prometheus_client.parser import text_string_to_metric_families

from millstream.core.request import Request, SamplingParams, Tokens
from millstream.engine.remote import RemoteEngine
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Call, Observatory


@pytest.fixture
def process(tmp_path_factory):
    one = EngineProcess(tmp_path_factory.mktemp("e"), budget=16, step_s=0.004, blocks=512)
    yield one
    one.end()


async def serve(watched: Observatory, remote: RemoteEngine, prompt: int, max_tokens: int) -> Call:
    """One request, watched as the server does it."""
    number = remote.new_id()
    call = watched.begin(f"call-{number:032x}", "chat", "/v1/chat/completions")
    call.tenant = "me"
    call.inside(number)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ids = tuple((number + place) % 49 for place in range(prompt))
    async for chunk in remote.submit(Request(number, (Tokens(ids),), params, tenant="me")):
        call.heard(chunk)
    call.end(200)
    return call


async def until(check: Any) -> None:
    async with asyncio.timeout(20):
        while not check():
            await asyncio.sleep(0.01)


def samples(watched: Observatory) -> dict[str, float]:
    families = text_string_to_metric_families(watched.metrics.text().decode())
    return {
        sample.name: sample.value for family in families for sample in family.samples if not sample.labels.get("le")
    }


def test_steps_and_timelines_come_from_the_other_process(process):
    async def main() -> None:
        remote = RemoteEngine(process.start().socket)
        await remote.start()
        watched = Observatory(Metrics("null"))
        watched.watch(remote)
        await remote.facts()
        await asyncio.sleep(0.05)
        calls = await asyncio.gather(*(serve(watched, remote, 40, 6) for _ in range(4)))
        await until(lambda: all(watched.timelines.get(c.id).entries[-1]["what"] == "finished" for c in calls))
        for call in calls:
            told = watched.timelines.get(call.id, "me").as_dict()["entries"]
            whats = [entry["what"] for entry in told]
            assert whats[:2] == ["queued", "admitted"] and whats[-2:] == ["decode", "finished"]
            assert sum(entry["tokens"] for entry in told if entry["what"] == "prefill") == 40
            assert [entry["at_s"] for entry in told] == sorted(entry["at_s"] for entry in told)
            assert 0 <= told[0]["at_s"] < 5 and told[-2]["tokens"] == 6
        assert any(step["prefill_tokens"] and step["decode_tokens"] for step in watched.steps.since(0))
        load = await watched.look(remote)
        await until(lambda: watched.steps.last >= load.counters["steps"])
        got = samples(watched)
        assert got["millstream_generation_tokens_total"] == 24 and got["millstream_prompt_tokens_total"] == 160
        assert got["millstream_cache_config_info"] == got["vllm:cache_config_info"] == 1
        assert got["millstream_engine_up"] == got["millstream_ready"] == 1
        assert got["millstream_step_seconds_count"] == watched.steps.last > 10
        if sys.platform == "linux":
            assert got["millstream_engine_process_resident_memory_bytes"] > 1e6
        await watched.close()
        await remote.close()

    asyncio.run(main())


def test_a_lost_engine_is_counted_once_and_what_it_had_counted_stays(process):
    async def main() -> None:
        remote = RemoteEngine(process.start().socket)
        await remote.start()
        watched = Observatory(Metrics("null", process=False))
        await remote.facts()
        watched.watch(remote)
        await serve(watched, remote, 20, 4)
        await asyncio.sleep(0.5)  # the next beat says what was looked up
        await watched.look(remote)
        before = samples(watched)
        assert before["millstream_prefix_cache_queries_total"] == 19
        inside = asyncio.create_task(serve(watched, remote, 20, 200))
        await until(lambda: watched.metrics.generation_tokens.total() > 10)
        process.kill()
        process.wait()
        await until(lambda: remote.losses)
        await watched.look(remote)
        assert watched.metrics.engine_up.value() == 0 and watched.metrics.ready.value() == 0
        process.start()
        call = await inside
        await watched.look(remote)
        got = samples(watched)
        assert got["millstream_engine_restarts_total"] == 1 and got["millstream_resumed_requests_total"] == 1
        assert got["millstream_generation_tokens_total"] == 204, "no token is counted twice"
        assert got["millstream_prefix_cache_queries_total"] >= before["millstream_prefix_cache_queries_total"]
        assert watched.metrics.requests.total("chat", "200") == 2 and watched.metrics.success.total("length") == 2
        whats = [entry["what"] for entry in watched.timelines.get(call.id).as_dict()["entries"]]
        assert "engine_restarted" in whats and whats.count("queued") == 2
        await watched.close()
        await remote.close()

    asyncio.run(main())
