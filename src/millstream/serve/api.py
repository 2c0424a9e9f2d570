"""The API process: `python -m millstream.serve.api --socket PATH --config FILE`, a client of the engine at that socket.

The file holds `[serve]` (where to listen) and `[supervisor]` (how long draining may take); what else it holds is for
others. The port is open at once: `/health` says that this process lives, `/ready` whether a request sent now would be
served, which waits for the model and is taken back when the engine is lost or the server drains.

SIGTERM or SIGINT: `/ready` says no at once, new requests are refused, those inside are finished for at most `drain_s`
seconds, then the port is closed. A second signal cuts them off. SIGHUP reads the file again and hands it to whoever
asked for it. The exit code says how it ended (`engine/exits.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from millstream.config.load import build, read_file
from millstream.core.client import EngineClient
from millstream.core.errors import ConfigError, MillstreamError
from millstream.engine.exits import Exit, orphaned
from millstream.engine.process import leave
from millstream.engine.remote import RemoteEngine
from millstream.serve.supervisor import SupervisorConfig

CHECK_S = 0.25
BACKLOG = 2048
# What responses whose last token is there may take to be written out.
FLUSH_S = 2.0

_log = logging.getLogger("millstream.serve")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Where to listen. Port 0 takes a free one, which the log tells."""

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"serve.port: got {self.port}, allowed is 0 to 65535")


class Life:
    """What a server goes through, for those who answer requests. `on_reload` get the config's tree at SIGHUP."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.draining = False
        self.on_reload: list[Callable[[Mapping[str, Any]], None]] = []

    async def ready(self) -> bool:
        """Whether a request that is sent now would be served."""
        return not self.draining and await self.client.ready()

    def reload(self, tree: Mapping[str, Any]) -> None:
        for hear in self.on_reload:
            try:
                hear(tree)
            except Exception:
                _log.exception("a part of the server could not take the new configuration")


def make_app(life: Life, tree: Mapping[str, Any]) -> Starlette:
    """All that is answered over HTTP. `tree` is the config's."""

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> JSONResponse:
        if await life.ready():
            return JSONResponse({"status": "ready"})
        status = "draining" if life.draining else "the engine is not there"
        return JSONResponse({"status": status}, 503, headers={"Retry-After": "1"})

    return Starlette(routes=[Route("/health", health), Route("/ready", ready)])


class _Server(uvicorn.Server):
    """Leaves signals to us: what they mean is more than the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(config: ServeConfig) -> socket.socket:
    """Raises OSError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        # Who connects from now on is kept waiting for a moment, and not refused.
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve(
    engine: Path,
    file: Path,
    parent: int | None = None,
    app: Callable[[Life, Mapping[str, Any]], Any] = make_app,
) -> Exit:
    """Serves until told to stop. Raises ConfigError and BadFile."""
    tree = read_file(file)
    config = build(ServeConfig, tree.get("serve", {}), "serve")
    drain_s = build(SupervisorConfig, tree.get("supervisor", {}), "supervisor").drain_s
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.put_nowait, number)
    client = RemoteEngine(engine)
    life = Life(client)
    loop.add_signal_handler(signal.SIGHUP, _reload, life, file)
    try:
        sock = listen(config)
    except OSError as error:
        _log.error("%s:%d: %s", config.host, config.port, error)
        return Exit.ADDRESS
    await client.start()
    server = _Server(
        uvicorn.Config(
            app(life, tree), log_config=None, access_log=False, lifespan="off", server_header=False, ws="none"
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    stopped = asyncio.ensure_future(told.get())
    alone = asyncio.ensure_future(_alone(parent))
    host, port = sock.getsockname()[:2]
    _log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        await asyncio.wait((serving, stopped, alone), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            return Exit.FAILED
        if alone.done():
            return Exit.ORPHANED
        return await _drain(life, server, serving, told, drain_s)
    finally:
        for task in (stopped, alone, serving):
            task.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await client.close()


async def _drain(
    life: Life, server: _Server, serving: asyncio.Future[None], told: asyncio.Queue[int], drain_s: float
) -> Exit:
    end = time.monotonic() + drain_s
    life.draining = True
    _log.info("told to stop; requests inside have %g s to finish", drain_s)
    finished = asyncio.ensure_future(life.client.drain())
    forced = asyncio.ensure_future(told.get())
    await asyncio.wait((finished, forced), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    whole = finished.done()
    server.should_exit = True
    if whole:
        # The last words are still being written out, perhaps to somebody who reads slowly.
        left_s = max(FLUSH_S, end - time.monotonic())
        await asyncio.wait((serving, forced), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        whole = serving.done()
    server.force_exit = True
    for task in (finished, forced):
        task.cancel()
    return Exit.DONE if whole else Exit.CUT


async def _alone(parent: int | None) -> None:
    """Returns when the parent is gone."""
    while parent is None or not orphaned(parent):
        await asyncio.sleep(CHECK_S)


def _reload(life: Life, file: Path) -> None:
    try:
        tree = read_file(file)
    except MillstreamError as error:
        _log.error("the configuration stays as it was: %s", error)
        return
    life.reload(tree)
    _log.info("the configuration is read again")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, which needs half the CPU a message, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("millstream.serve.api", description="The API process of a server.")
    parser.add_argument("--socket", type=Path, required=True, help="the engine's")
    parser.add_argument("--config", type=Path, required=True, help="TOML, YAML or JSON: [serve] and [supervisor]")
    parser.add_argument("--parent", type=int, help="end when the process of this id is no longer the parent")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return int(runner.run(serve(args.socket, args.config, args.parent)))
    except MillstreamError as error:
        _log.error("%s", error)
        return Exit.USAGE


if __name__ == "__main__":
    leave(main())
