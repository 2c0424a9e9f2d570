"""An API process without HTTP, for tests of its supervisor: lines of JSON over a Unix socket beside the engine's.

A line with `ready` asks for readiness, one with `hang` blocks the event loop for as many seconds, all others are
requests. SIGTERM drains, a second one cuts off, SIGHUP reads the config's `greeting` again. `api_code`: exit at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

from millstream.core.errors import MillstreamError
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.engine.exits import Exit, orphaned
from millstream.engine.process import leave
from millstream.engine.remote import RemoteEngine


async def serve(args: argparse.Namespace) -> int:
    config = json.loads(args.config.read_text())
    if "api_code" in config:
        return int(config["api_code"])
    remote = RemoteEngine(args.socket, quiet_s=0.8)
    await remote.start()
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    cut = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (cut if told.is_set() else told).set())

    def reload() -> None:
        config.update(json.loads(args.config.read_text()))

    loop.add_signal_handler(signal.SIGHUP, reload)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(**line: Any) -> None:
            writer.write(json.dumps(line).encode() + b"\n")

        try:
            while line := await reader.readline():
                ask = json.loads(line)
                if "ready" in ask:
                    say(ready=await remote.ready(), greeting=config.get("greeting"), resumed=remote.resumed)
                    continue
                if "hang" in ask:
                    time.sleep(ask["hang"])
                prompt = Tokens(tuple(ask.pop("prompt")))
                try:
                    request = Request(remote.new_id(), (prompt,), SamplingParams(**ask))
                    async for chunk in remote.submit(request):
                        say(index=chunk.index, tokens=chunk.tokens, finish=chunk.finish and chunk.finish.value)
                        await writer.drain()
                except MillstreamError as error:
                    say(error=f"{type(error).__name__}: {error}")
        finally:
            writer.close()

    path = args.socket.with_name("api.sock")
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(answer, path)

    async def alone() -> None:
        while not orphaned(args.parent):
            await asyncio.sleep(0.1)

    gone = asyncio.create_task(alone())
    waits = asyncio.create_task(told.wait())
    await asyncio.wait({gone, waits}, return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        return Exit.ORPHANED
    drained = asyncio.create_task(remote.drain())
    await asyncio.wait({drained, asyncio.create_task(cut.wait())}, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    return Exit.DONE if drained.done() else Exit.CUT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--parent", type=int)
    leave(asyncio.run(serve(parser.parse_args())))


if __name__ == "__main__":
    main()
