"""What the way to an engine costs: a process at a socket, the same behind a ClusterClient, a Ray actor, two actors.

    python benchmarks/cluster_path.py [--model smollm2-135m] [--rounds 8]

All engines are there at once and are asked in turn, in another order each round, so that whatever else the machine does
meets all of them alike. Each round is one request alone (`--prompt` tokens in, `--tokens` out) and then `--many` at
once. Prints medians over the rounds, and of the pairs of a round the median ratio to the first arm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from millstream.cluster.client import ClusterClient
from millstream.cluster.config import ClusterConfig, RayConfig
from millstream.cluster.ray_backend import RayBackend
from millstream.core import registry
from millstream.core.client import EngineClient
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.engine.remote import RemoteEngine

Closes = list[Callable[[], Awaitable[Any]]]


async def process(model: str, threads: int, folder: Path, closes: Closes) -> RemoteEngine:
    """An engine in a process of its own, as `serve` has it."""
    config, socket = folder / "engine.json", folder / "run" / "engine.sock"
    config.write_text(json.dumps({"model": model, "engine": {"runner": {"threads": threads}}}))
    words = ("-m", "millstream.engine.process", "--socket", str(socket), "--config", str(config))
    child = await asyncio.create_subprocess_exec(sys.executable, *words, "--parent", str(os.getpid()))
    engine = RemoteEngine(socket)
    await engine.start()

    async def end() -> None:
        await engine.close()
        child.terminate()
        await child.wait()

    closes.append(end)
    return engine


async def cluster(backend: RayBackend | None, replicas: int, closes: Closes) -> ClusterClient:
    found = ClusterClient(registry.make("router", "least-work"), ClusterConfig(replicas=replicas), backend)
    await found.start()
    closes.insert(0, found.close)
    return found


def actors(model: str, threads: int) -> RayBackend:
    tree = {"runner": {"threads": threads}, "cache": {"bytes": "512MiB"}}
    return RayBackend.of(model, tree, RayConfig("local"), log_to_driver=False)


async def ask(client: EngineClient, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    began, first = time.perf_counter(), 0.0
    async for _ in client.submit(Request(client.new_id(), (Tokens(tuple(prompt)),), params)):
        first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


async def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    cores = len(os.sched_getaffinity(0))
    closes: Closes = []
    chance = random.Random(0)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            engine = await process(args.model, cores, Path(folder), closes)
            await engine.facts()
            before = await cluster(None, 1, closes)
            await before.add(engine)
            one = await cluster(actors(args.model, cores), 1, closes)
            two = await cluster(actors(args.model, max(1, cores // 2)), 2, closes)
            arms: dict[str, EngineClient] = {
                "process": engine, "process, ClusterClient": before, "actor": one, "two actors": two,
            }  # fmt: skip
            for each in (one, two):
                await each.facts()
            while len(two.fleet.up) < 2:
                await asyncio.sleep(0.1)
            vocab = (await engine.facts()).limits.vocab_size
            for number in range(args.rounds + 1):
                order = list(arms.items())
                chance.shuffle(order)
                for name, client in order:
                    prompts = [[chance.randrange(vocab) for _ in range(args.prompt)] for _ in range(args.many + 1)]
                    first_s, total_s = await ask(client, prompts[0], args.tokens)
                    began = time.perf_counter()
                    many = await asyncio.gather(*(ask(client, prompt, args.tokens) for prompt in prompts[1:]))
                    wall_s = time.perf_counter() - began
                    if number == 0:
                        continue  # to warm up
                    own = found.setdefault(name, {})
                    for key, value in (
                        ("TTFT alone, ms", 1e3 * first_s),
                        ("tokens/s alone", (args.tokens - 1) / (total_s - first_s)),
                        (f"TTFT of {args.many}, ms", 1e3 * statistics.median(first for first, _ in many)),
                        (f"tokens/s of {args.many}", args.many * args.tokens / wall_s),
                    ):
                        own.setdefault(key, []).append(value)
        finally:
            for close in closes:
                await close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--many", type=int, default=8)
    found = asyncio.run(measure(parser.parse_args()))
    keys = list(next(iter(found.values())))
    base = next(iter(found[name] for name in found if name == "process"))
    print("| | " + " | ".join(keys) + " |\n" + "|---" * (len(keys) + 1) + "|")
    for name in ("process", "process, ClusterClient", "actor", "two actors"):
        cells = []
        for key in keys:
            ratio = statistics.median(own / first for own, first in zip(found[name][key], base[key], strict=True))
            cells.append(f"{statistics.median(found[name][key]):.1f} ({ratio:.2f}x)")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
