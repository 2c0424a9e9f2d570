"""The engine process as it is started for a server, on a tiny random model: files, torch, tokenizer and all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millstream.core.request import Request, SamplingParams, Structured, Tokens
from millstream.core.sequence import Finish
from millstream.engine.exits import Exit
from millstream.engine.outputs import OutputBuilder, RequestOutput
from millstream.engine.remote import RemoteEngine, load_tokenizer
from tiny_files import build_model

WAIT_S = 60.0
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.2},
    "sampled": {"temperature": 1.0, "seed": 3, "n": 2, "frequency_penalty": 0.5, "logprobs": 2},
    "a grammar": {
        "temperature": 1.0,
        "seed": 4,
        "n": 2,
        "structured": Structured("regex", r"[a-z]{3}( [a-z]{2,7}){12}"),
    },
    "stops": {"temperature": 1.2, "seed": 9, "n": 3, "stop": ["e", "xy", "q"]},
}
CONFIG = """
model = {model!r}

[engine.cache]
bytes = "32MB"

[engine.sched]
step_tokens = 64

[engine.runner]
ops = "ref"
attention = "torch-ref"

[serve]
anything = "is for others"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def start(tmp_path_factory, model, monkeypatch):
    folder = tmp_path_factory.mktemp("p")
    monkeypatch.setenv("MILLSTREAM_HOME", str(folder / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[subprocess.Popen[bytes]] = []

    def begin(config: str = CONFIG.format(model=str(model))) -> tuple[subprocess.Popen[bytes], Path]:
        file, sock = folder / "launch.toml", folder / "run" / "engine.sock"
        file.write_text(config)
        words = ["--socket", str(sock), "--config", str(file), "--parent", str(os.getpid())]
        started.append(subprocess.Popen([sys.executable, "-m", "millstream.engine.process", *words]))
        return started[-1], sock

    yield begin
    for one in started:
        if one.poll() is None:
            one.kill()
        one.wait()


async def whole(remote: RemoteEngine, tokenizer: Any, case: str) -> RequestOutput:
    ids = tuple(tokenizer.encode("the mill by the stream"))
    request = Request(remote.new_id(), (Tokens(ids),), SamplingParams(max_tokens=200, **ASKED[case]))
    builder = OutputBuilder(request.id, None, ids, request.params, request.params.n, tokenizer)
    async with contextlib.aclosing(remote.submit(request)) as chunks:
        async for chunk in chunks:
            builder.add(chunk)
    return builder.output


def words(output: RequestOutput) -> list[Any]:
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]


def test_texts_go_on_in_a_new_process_after_kill_9(start, model):
    process, sock = start()

    async def main() -> None:
        nonlocal process
        remote = RemoteEngine(sock)
        await remote.start()
        facts = await asyncio.wait_for(remote.facts(), WAIT_S)
        assert facts.model == str(model) and facts.family == "llama" and facts.limits.max_context == 2048
        assert facts.generation_config["top_k"] == 7 and facts.config["cache"]["bytes"] == "32MB"
        assert facts.num_parameters > 10_000 and facts.weight_bytes > 0 and facts.kv_bytes > 0
        assert any(name == "runner.plans" and reason for name, _, reason in facts.decisions)
        tokenizer = load_tokenizer(facts)
        wanted = await asyncio.gather(*(whole(remote, tokenizer, case) for case in ASKED))
        running = asyncio.gather(*(whole(remote, tokenizer, case) for case in ASKED))
        await asyncio.sleep(0.1)
        process.kill()
        process.wait()
        assert not running.done()
        process, _ = start()
        found = await asyncio.wait_for(running, WAIT_S)
        assert remote.resumed >= 1
        for want, got in zip(wanted, found, strict=True):
            assert words(got) == words(want)
            for a, b in zip(want.outputs, got.outputs, strict=True):
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
                for ours, theirs in zip(a.logprobs or [], b.logprobs or [], strict=True):
                    assert list(ours) == list(theirs)
                    assert [e.logprob for e in ours.values()] == pytest.approx(
                        [e.logprob for e in theirs.values()], abs=1e-4
                    )
        assert {one.finish_reason for out in found for one in out.outputs} <= {Finish.LENGTH.value, Finish.STOP.value}
        await remote.close()
        process.terminate()
        assert await asyncio.to_thread(process.wait, WAIT_S) == Exit.DONE

    asyncio.run(main())


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ('model = "no-such-model"', Exit.MODEL),
        ("model = 3", Exit.USAGE),
        ('model = "smollm2-135m"\n[engine]\ncach = 1', Exit.USAGE),
        ("model = ", Exit.USAGE),
    ],
)
def test_a_start_that_cannot_be_says_why_with_its_code(start, config, code):
    process, _ = start(config)
    assert process.wait(WAIT_S) == code


def test_client_supervisor_and_process_need_no_torch_and_no_web_server():
    heavy = {"torch", "triton", "numpy", "starlette", "uvicorn"}
    for modules, absent in (
        ("millstream.engine.process, millstream.engine.remote", heavy),
        ("millstream.serve.supervisor", heavy | {"tokenizers", "jinja2"}),
    ):
        code = f"import sys, {modules}; print(sorted({absent} & {{name.partition('.')[0] for name in sys.modules}}))"
        done = subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S, capture_output=True, text=True)
        assert done.stdout.strip() == "[]"
