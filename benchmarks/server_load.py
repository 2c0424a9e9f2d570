"""What the server itself can take, on the machine at hand: one table.

    python benchmarks/server_load.py [--only NAME] [--seconds 5] [--json]

The model is tiny and random (a few thousand numbers), so that what is measured is the path of a request and not the
model: HTTP, tokenizer, the way to the engine's process and back, scheduling, server-sent events. The client (`bench
serve`'s own, some 35 us a request) runs on the same cores, as do the server's three processes.

completions   1-token completions: as many as go through with 64 clients, and p99 at fixed rates (open loop)
streams       200 streams that get a token at every step, alone and beside 1,000 that wait for their first token
connections   latency of single requests beside 1,000 connections that are open and silent
overhead      TTFT of one request at a time over HTTP, less that of the same engine in this process
shed          CPU that the server spends on a request that it sheds with a 429
overload      goodput from below capacity to ten times above it, on a real model: smollm2-135m
tenants       a tenant with a request a second beside one with a hundred, under fcfs and vtc, on the same model
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from millstream.bench import serve
from millstream.bench.backends import BACKENDS, Options
from millstream.bench.http_client import HttpClient
from millstream.bench.samples import Sample
from millstream.sim.arrivals import arrival_times
from millstream.sim.metrics import percentile

NAMES = ("completions", "streams", "connections", "overhead", "shed", "overload", "tenants")
REAL = ("overload", "tenants")
CONTEXT = 4096
SETTLE_S = 12.0
PROMPT = "the mill stood at a bend of the stream"
BACKEND = BACKENDS["openai"]


def write_model(folder: Path) -> Path:
    """A llama of two layers with random weights, and a byte-level tokenizer of 300 tokens."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    width, heads, kv_heads, inner, layers, vocab = 32, 4, 2, 48, 2, tokenizer.get_vocab_size()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = width // heads * kv_heads
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj": (width, width) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj": (kv, width) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj": (inner, width) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (width, inner)}
        shapes |= {f"{layer}.{n}_layernorm": (width,) for n in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(4)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


class Server:
    """A server of its own in three processes; its port and its process ids."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"

    def cpu_s(self) -> float:
        """CPU seconds of all of its processes so far."""
        return sum(_cpu_s(pid) for pid in [self.process.pid, *_children(self.process.pid)])


@contextlib.contextmanager
def serving(model: Path | str, folder: Path, *words: str) -> Iterator[Server]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "millstream", "serve", str(model), "--port", str(port)]
    command += ["--served-model-name", "tiny"]
    log = (folder / f"server-{port}.log").open("wb")
    process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
    try:
        yield Server(process, port)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def _words(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the client


async def run(
    server: Server,
    samples: list[Sample],
    times: list[float] | None = None,
    *,
    clients: int | None = None,
    stream: bool = False,
    extra: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> serve.Outcome:
    """One load; without `times` as many requests at once as there are `clients`."""
    client = HttpClient(server.url, headers)
    try:
        options = Options("tiny", stream, True, None, extra or {})
        load = serve.Load(times or [0.0] * len(samples), clients)
        if clients:
            await client.connect(clients)
        return await serve.Run(client, BACKEND, BACKEND.endpoint, options, None).load(samples, load)
    finally:
        await client.close()


async def ready(server: Server, key: str | None = None) -> None:
    client = HttpClient(server.url, {"Authorization": f"Bearer {key}"} if key else None)
    try:
        waiting = serve.Run(client, BACKEND, BACKEND.endpoint, Options("tiny", False, True), None)
        await waiting.wait_ready(one(0), 60.0, lambda text: None)
        await waiting.warm_up(one(0), 200, 16)
    finally:
        await client.close()


def one(place: int, max_tokens: int = 1) -> Sample:
    return Sample(f"{place} {PROMPT}", 20, max_tokens)


def ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def latencies(outcome: serve.Outcome) -> list[float]:
    return sorted(call.ended - call.due for call in outcome.calls if call.error is None)


# -- what is measured; each gives rows of (what, number)


async def completions(server: Server, seconds: float) -> list[tuple[str, str]]:
    rows = []
    count = int(1000 * seconds)
    before = server.cpu_s()
    outcome = await run(server, [one(i) for i in range(count)], clients=64)
    failed = sum(call.error is not None for call in outcome.calls)
    cpu_us = (server.cpu_s() - before) / count * 1e6
    rows.append(("1-token completions/s, 64 clients", f"{count / outcome.duration:.0f} ({failed} failed)"))
    rows.append(("server CPU a request", f"{cpu_us:.0f} us"))
    for rate in (300, 1000):
        count = int(rate * seconds)
        outcome = await run(server, [one(i) for i in range(count)], arrival_times(count, rate, seed=1))
        found = latencies(outcome)
        told = f"p50 {ms(percentile(found, 50))} ms, p99 {ms(percentile(found, 99))} ms ({count - len(found)} failed)"
        rows.append((f"at {rate} requests/s, Poisson", told if found else "all failed"))
    return rows


async def streams(server: Server, seconds: float) -> list[tuple[str, str]]:
    """The engine has 200 seats, so that what comes after the first 200 waits in its queue with its stream open."""
    rows = []
    for idle in (0, 1000):
        stop = asyncio.Event()
        waiting = asyncio.create_task(_hold_streams(server, idle, stop))
        active = [one(i, 60) for i in range(200)]
        outcome = await run(server, active, stream=True, extra={"priority": 0})
        stop.set()
        left = await waiting
        gaps = sorted(gap for call in outcome.calls for gap in call.timing(False).gaps_s)
        tokens = sum(call.num_output or 0 for call in outcome.calls)
        failed = sum(call.error is not None for call in outcome.calls)
        pace = f"gaps p50 {ms(percentile(gaps, 50))}, p99 {ms(percentile(gaps, 99))} ms"
        told = f"{tokens / outcome.duration:.0f} tokens/s, {pace}"
        beside = f" beside {left} idle ones" if idle else ""
        rows.append((f"200 active streams{beside}", f"{told} ({failed} failed)"))
    return rows


async def _hold_streams(server: Server, count: int, stop: asyncio.Event) -> int:
    """Opens `count` streams that get no token before `stop`; how many were open at the end."""
    if not count:
        return 0
    writers = []
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "stream": True, "priority": 100}
    body = json.dumps(asked).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    await asyncio.sleep(0.5)  # the active ones have their seats
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head.encode() + body)
            writers.append(writer)
        await stop.wait()
        return sum(not writer.transport.is_closing() for writer in writers)
    finally:
        for writer in writers:
            writer.transport.abort()


async def connections(server: Server, seconds: float) -> list[tuple[str, str]]:
    rows = []
    for silent in (0, 1000):
        client = HttpClient(server.url)
        try:
            await client.connect(silent)
            count = int(100 * seconds)
            outcome = await run(server, [one(i) for i in range(count)], arrival_times(count, 100, seed=2))
        finally:
            await client.close()
        found = latencies(outcome)
        what = f"1-token completion at 100/s beside {silent} open connections"
        rows.append((what, f"p50 {ms(percentile(found, 50))}, p99 {ms(percentile(found, 99))} ms"))
    return rows


async def overhead(server: Server, seconds: float, model: Path) -> list[tuple[str, str]]:
    """The two are interleaved, so that what else the machine does falls on both."""
    from millstream.core.request import SamplingParams
    from millstream.engine.llm import AsyncLLM

    llm = AsyncLLM(str(model), cache={"blocks": 4096, "block_size": 16}, runner={"threads": 1})
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    async def in_process(place: int) -> float:
        start = time.perf_counter()
        ids = llm.prompt_ids(one(place).prompt)[1]
        async for _ in llm.client.submit(llm.request(ids, params)):
            break
        return time.perf_counter() - start

    client = HttpClient(server.url)
    over_http: list[float] = []
    inside: list[float] = []
    try:
        asking = serve.Run(client, BACKEND, BACKEND.endpoint, Options("tiny", True, True), None)
        for place in range(int(100 * seconds) + 20):
            call = await asking._once(one(place))
            took = await in_process(place)
            if place >= 20 and call.times:
                over_http.append(call.times[0] - call.due)
                inside.append(took)
    finally:
        await client.close()
        await llm.close()
    a, b = sorted(over_http), sorted(inside)
    differences = [x - y for x, y in zip(over_http, inside, strict=True)]
    return [
        ("TTFT over HTTP, one request at a time", f"p50 {ms(percentile(a, 50))}, p99 {ms(percentile(a, 99))} ms"),
        ("TTFT of the engine in this process", f"p50 {ms(percentile(b, 50))}, p99 {ms(percentile(b, 99))} ms"),
        (
            "overhead, median of the differences",
            f"{ms(statistics.median(differences))} ms",
        ),
    ]


async def shed(server: Server, seconds: float) -> list[tuple[str, str]]:
    """The queue takes four. The engine is stopped, so that all CPU is that of the refusals."""
    engine = next(pid for pid in _children(server.process.pid) if "engine.process" in _words(pid))
    os.kill(engine, signal.SIGSTOP)
    try:
        holding = asyncio.create_task(run(server, [one(i, 20) for i in range(4)], stream=True))
        await asyncio.sleep(0.5)
        before = server.cpu_s()
        count = int(400 * seconds)
        outcome = await run(server, [one(i) for i in range(count)], arrival_times(count, 400, seed=3))
        used = server.cpu_s() - before
    finally:
        os.kill(engine, signal.SIGCONT)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    refused = [call for call in outcome.calls if call.shed]
    found = sorted(call.ended - call.due for call in refused) or [0.0]
    return [
        ("requests shed with a 429, of those sent", f"{len(refused)} of {count}"),
        ("server CPU of a 429", f"{used / max(1, len(refused)) * 1e6:.0f} us"),
        ("latency of a 429, at 400/s", f"p50 {ms(percentile(found, 50))}, p99 {ms(percentile(found, 99))} ms"),
    ]


async def overload(server: Server, seconds: float) -> list[tuple[str, str]]:
    """Goodput is requests a second whose answer was whole within its SLO: 5 s for all of it, from when it was due.

    Each request tells the server so (in the header X-Request-Timeout). What was due in the first `SETTLE_S` of a load
    is not counted: that is how long it takes to find out how many are too many.
    """
    tokens, slo_s = 48, 5.0
    told = {"X-Request-Timeout": f"{slo_s:g}"}
    count = int(8 * seconds)
    start = time.perf_counter()
    await run(server, [one(i, tokens) for i in range(count)], clients=32)
    capacity = count / (time.perf_counter() - start)
    rows = [(f"closed loop of 32 clients, {tokens} tokens each", f"{capacity:.1f} requests/s")]
    peak = 0.0
    for share in (0.8, 1.0, 1.25, 2.0, 10.0):
        rate = capacity * share
        count = int(rate * (seconds + SETTLE_S))
        times = arrival_times(count, rate, seed=4)
        outcome = await run(server, [one(i, tokens) for i in range(count)], times, headers=told)
        first = min(call.due for call in outcome.calls) + SETTLE_S
        calls = [call for call in outcome.calls if call.due >= first]
        ended = [call for call in calls if call.error is None and call.num_output == tokens]
        good = sum(call.ended - call.due <= slo_s for call in ended) / seconds
        kept = f", {100 * good / peak:.0f} % of the peak" if share > 1 and peak else ""
        peak = max(peak, good)
        refused = sum(call.shed for call in calls)
        rows.append(
            (f"goodput at {share:g} times that", f"{good:.1f} requests/s{kept}; {refused} of {len(calls)} shed")
        )
        await asyncio.sleep(3.0)
    return rows


VOCABULARY = [
    *PROMPT.split(),
    "water",
    "wheel",
    "turned",
    "slow",
    "and",
    "then",
    "fast",
    "with",
    "rain",
    "all",
    "night",
]
KEYS = {"victim": "victim-key-of-this-run", "aggressor": "aggressor-key-of-this-run"}


async def tenants(server: Server, seconds: float, policy: str) -> list[tuple[str, str]]:
    """The victim alone, and beside the aggressor, whose queue is full all the time; three times in turn."""
    told = {name: {"Authorization": f"Bearer {key}"} for name, key in KEYS.items()}
    count = max(10, int(seconds))

    def samples(seed: int, count: int, words: tuple[int, int]) -> list[Sample]:
        chance = random.Random(seed)
        return [
            Sample(" ".join(chance.choices(VOCABULARY, k=chance.randint(*words))), words[1], 16) for _ in range(count)
        ]

    async def load(name: str, rate: float, count: int, words: tuple[int, int], seed: int) -> list[serve.Call]:
        # Even, as in the experiment `vtc`: who sends three at once has three times its share for that moment.
        times = arrival_times(count, rate, burstiness=12.0, seed=seed)
        found = await run(server, samples(seed, count, words), times, stream=True, headers=told[name])
        return found.calls

    pairs = []
    lost = 0
    for turn in range(3):
        alone = await load("victim", 1.0, count, (320, 448), turn)
        flood = asyncio.create_task(load("aggressor", 100.0, 100 * (count + 40), (64, 128), 9))
        # Until its queue is full.
        await asyncio.sleep(8.0)
        beside = await load("victim", 1.0, count, (320, 448), turn)
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
        lost += sum(call.error is not None for call in (*alone, *beside))
        pairs.append([sorted(call.times[0] - call.due for call in calls if call.times) for calls in (alone, beside)])
        await asyncio.sleep(2.0)
    rows = []
    for place, where in enumerate(("alone", "beside the other")):
        p50, p99 = (statistics.median(percentile(pair[place], share) for pair in pairs) for share in (50, 99))
        rows.append((f"{policy}: the small tenant {where}", f"TTFT p50 {ms(p50)}, p99 {ms(p99)} ms"))
    ratios = sorted(percentile(beside, 99) / percentile(alone, 99) for alone, beside in pairs)
    told_ratios = f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return [*rows, (f"{policy}: p99 beside the other, of that alone", f"{told_ratios}; {lost} refused")]


TINY = ("--set", "cache.blocks=4096", "--set", "cache.block_size=16", "--set", "runner.threads=1")
SEATS = ("--set", "sched.max_rows=200")
WORDS: dict[str, tuple[str, ...]] = {
    "shed": (
        "--max-queued-requests",
        "4",
        *("--set", "supervisor.silence_s=300", "--set", "supervisor.stall_s=300"),
    ),
    "overload": ("--weights", "blocks", "--max-queued-requests", "32"),
    "tenants": (
        *("--weights", "blocks", "--no-enable-prefix-caching", "--max-queued-requests", "256"),
        *(word for name, key in KEYS.items() for word in ("--api-key", f"{name}:{key}")),
    ),
}
# A server for each policy.
POLICIES = {"tenants": ("fcfs", "vtc")}


def measure(names: list[str], seconds: float) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="millstream-load-") as scratch:
        folder = Path(scratch)
        model = write_model(folder / "tiny")
        for name, policy in [(one, policy) for one in names for policy in POLICIES.get(one, ("",))]:
            real = name in REAL
            words = () if real else (*TINY, *SEATS)
            words += ("--scheduling-policy", policy) if policy else ()
            with serving("smollm2-135m" if real else model, folder, *words, *WORDS.get(name, ())) as server:

                async def work(
                    name: str = name, policy: str = policy, server: Server = server
                ) -> list[tuple[str, str]]:
                    await ready(server, KEYS["victim"] if name == "tenants" else None)
                    how: Callable[..., Any] = globals()[name]
                    given = (model,) if name == "overhead" else (policy,) if policy else ()
                    found: list[tuple[str, str]] = await how(server, seconds, *given)
                    return found

                rows += uvloop.run(work())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="may be repeated")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.only or list(NAMES), args.seconds)
    if args.json:
        print(json.dumps(dict(rows), indent=1))
        return 0
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
