"""The API process: `python -m millstream.serve.api --socket PATH --config FILE`, a client of the engine at that socket.

Without a socket it starts the engines itself, as many as `[cluster]` says.

The file holds `[serve]` (where to listen, for whom, how much) and `[supervisor]` (how long draining may take); what
else it holds is for others. The port is open at once: `/health` says that this process lives, `/ready` whether a
request sent now would be served, which waits for the model and is taken back when the engine is lost or the server
drains.

SIGTERM or SIGINT: `/ready` says no at once, new requests are refused, those inside are finished for at most `drain_s`
seconds, then the port is closed. A second signal cuts them off. SIGHUP reads the file again and hands it to whoever
asked for it. The exit code says how it ended (`engine/exits.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from millstream.cluster.client import ClusterClient
from millstream.cluster.config import ClusterConfig
from millstream.cluster.ray_backend import RayBackend
from millstream.config.load import build, log_by, merge, read_file
from millstream.core import registry
from millstream.core.client import EngineClient
from millstream.core.errors import EngineClosed, MillstreamError
from millstream.core.logs import set_up_logs
from millstream.core.request import Kind
from millstream.engine.exits import Exit, orphaned
from millstream.engine.process import leave
from millstream.engine.remote import RemoteEngine
from millstream.serve.app import App
from millstream.serve.config import LimitsConfig, ServeConfig, TlsConfig
from millstream.serve.connection import connections
from millstream.serve.listen import check_tls, places, url_of
from millstream.serve.supervisor import SupervisorConfig

CHECK_S = 0.25
# What responses whose last token is there may take to be written out.
FLUSH_S = 2.0
# Descriptors that are for other things than connections: files, the engine, the store.
OWN_FILES = 128
# Ids of requests to the second engine begin here, so that whoever watches does not take them for the first one's.
BESIDE = 1 << 40

_log = logging.getLogger("millstream.serve")


class Life:
    """What a server goes through, for those who answer requests. `on_reload` get the config's tree at SIGHUP,
    `on_drain` are called when nothing more is taken, and `stop` is as good as a SIGTERM. `embedding` is a second
    engine, of an embedding model."""

    def __init__(
        self,
        client: EngineClient,
        stop: Callable[[], None] = lambda: None,
        embedding: EngineClient | None = None,
    ) -> None:
        self.client, self.stop, self.embedding = client, stop, embedding
        self.draining = False
        self.on_reload: list[Callable[[Mapping[str, Any]], None]] = []
        self.on_drain: list[Callable[[], Awaitable[None]]] = []

    def reload(self, tree: Mapping[str, Any]) -> None:
        for hear in self.on_reload:
            try:
                hear(tree)
            except MillstreamError as error:
                _log.error("a part of the server could not take the new configuration: %s", error)
            except Exception:
                _log.exception("a part of the server could not take the new configuration")


def cluster_of(tree: Mapping[str, Any]) -> ClusterClient:
    """The engines that a config's tree asks for, on Ray. Raises ConfigError and UnknownName."""
    config = build(ClusterConfig, tree.get("cluster", {}), "cluster")
    engine = merge({}, tree.get("engine", {}))
    if config.ray.num_cpus >= 1:
        engine = merge({"runner": {"threads": int(config.ray.num_cpus)}}, engine)
    elif config.ray.local:
        # All of them are on this machine: together they may use its cores once.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        engine = merge({"runner": {"threads": max(1, cores // config.most)}}, engine)
    backend = RayBackend.of(str(tree["model"]), engine, config.ray, quiet_s=config.suspect_s, stall_s=config.stall_s)
    autoscaler = None if config.autoscaler is None else registry.make("autoscaler", config.autoscaler)
    return ClusterClient(registry.make("router", config.router), config, backend, autoscaler)


def make_app(life: Life, tree: Mapping[str, Any]) -> App:
    """All that is answered over HTTP. `tree` is the config's. Raises ConfigError and BadFile."""
    app = App(life.client, tree, embedding=life.embedding, draining=lambda: life.draining, stop_server=life.stop)
    life.on_reload.append(app.reload)
    life.on_drain.append(app.drain)
    return app


class _Server(uvicorn.Server):
    """Leaves signals to us: what they mean is more than the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: Any, config: ServeConfig, limits: LimitsConfig, refused: Callable[[int], None]) -> _Server:
    tls = config.tls
    return _Server(
        uvicorn.Config(
            app,
            http=connections(limits, refused),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ws="none",
            root_path=config.root_path,
            timeout_keep_alive=max(1, round(limits.idle_s)),
            ssl_certfile=tls.certfile or None,
            ssl_keyfile=tls.keyfile or None,
            ssl_ca_certs=tls.ca_certs or None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls.ca_certs else ssl.CERT_NONE,
        )
    )


def _room_for(limits: LimitsConfig) -> LimitsConfig:
    """Limits with no more connections than this process may have open files, of which it takes all that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + OWN_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN_FILES)
    if limits.connections > most:
        _log.warning("at most %d connections are taken: the process may have no more files open", most)
        return replace(limits, connections=most)
    return limits


async def serve(
    engine: Path | None,
    file: Path,
    parent: int | None = None,
    make: Callable[[Life, Mapping[str, Any]], App] = make_app,
    embedding: Path | None = None,
) -> Exit:
    """Serves until told to stop. Raises ConfigError and BadFile."""
    tree = read_file(file)
    config = build(ServeConfig, tree.get("serve", {}), "serve")
    drain_s = build(SupervisorConfig, tree.get("supervisor", {}), "supervisor").drain_s
    check_tls(config.tls)
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.put_nowait, number)
    client = cluster_of(tree) if engine is None else RemoteEngine(engine)
    beside = None if embedding is None else RemoteEngine(embedding, first_id=BESIDE)
    life = Life(client, lambda: told.put_nowait(signal.SIGTERM), beside)
    loop.add_signal_handler(signal.SIGHUP, _reload, life, file)
    async with contextlib.AsyncExitStack() as stack:
        socks: list[socket.socket] = []
        for where, open_one in places(config):
            try:
                socks.append(open_one())
            except OSError as error:
                _log.error("%s: %s", where, error)
                return Exit.ADDRESS
            stack.callback(socks[-1].close)
        app = make(life, tree)
        stack.push_async_callback(app.stop)
        for one in (client, beside):
            if one is not None:
                await one.start()
                stack.push_async_callback(one.close)
        await app.start()
        servers = _servers(app, config)
        serving = asyncio.ensure_future(_serve_all(servers, socks))
        stopped = asyncio.ensure_future(told.get())
        alone = asyncio.ensure_future(_alone(parent))
        given_up = asyncio.ensure_future(client.given_up() if isinstance(client, ClusterClient) else _never())
        greeting = asyncio.ensure_future(_announce(app, url_of(socks[0], bool(config.tls.certfile)), config))
        _log.info("listening at %s", url_of(socks[0], bool(config.tls.certfile)))
        if len(socks) > 1:
            _log.info("the admin listens at %s", url_of(socks[1]))
        try:
            await asyncio.wait((serving, stopped, alone, given_up), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                return Exit.FAILED
            if alone.done():
                return Exit.ORPHANED
            if given_up.done():
                _log.error("there is no engine, and there will be none: %s", given_up.result())
                return Exit.ENGINE
            return await _drain(life, servers, serving, told, drain_s)
        finally:
            for task in (stopped, alone, greeting, serving, given_up):
                task.cancel()
            await asyncio.gather(serving, greeting, return_exceptions=True)
            if config.uds:
                with contextlib.suppress(OSError):
                    os.unlink(config.uds)


def _servers(app: App, config: ServeConfig) -> list[_Server]:
    limits = _room_for(config.limits)
    servers = [http_server(app, config, limits, app.refused)]
    if app.admin is not None:
        plain = replace(config, tls=TlsConfig(), root_path="")
        servers.append(http_server(app.admin, plain, replace(limits, connections=16), app.refused))
    return servers


async def _serve_all(servers: Sequence[_Server], socks: Sequence[socket.socket]) -> None:
    async with asyncio.TaskGroup() as group:
        for server, sock in zip(servers, socks, strict=True):
            group.create_task(server.serve(sockets=[sock]))


async def _announce(app: App, url: str, config: ServeConfig) -> None:
    """Says once, on the standard output, that requests are served, and how to send one."""
    with contextlib.suppress(EngineClosed):
        await app.client.facts()
        while not await app.ready():
            await asyncio.sleep(CHECK_S)
        facts, names = (await app.names())[0]
        curl, base = "curl", url + config.root_path
        if config.uds:
            curl, base = f"curl --unix-socket {config.uds}", "http://localhost" + config.root_path
        elif config.tls.certfile:
            curl = "curl --cacert YOUR_CA.pem"
        key = ' -H "Authorization: Bearer $KEY"' if len(app.keys) else ""
        path, body = (
            "chat/completions",
            f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}',
        )
        if Kind.GENERATE not in facts.limits.kinds:
            path, body = "embeddings", f'{{"model": "{names[0]}", "input": "Hello!"}}'
        print(
            f"\n{names[0]} is served.\n"
            f"  playground   {base}/\n"
            f"  API          {base}/v1\n"
            f"  try          {curl} {base}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'\n",
            flush=True,
        )


async def _drain(
    life: Life, servers: Sequence[_Server], serving: asyncio.Future[None], told: asyncio.Queue[int], drain_s: float
) -> Exit:
    end = time.monotonic() + drain_s
    life.draining = True
    _log.info("told to stop; requests inside have %g s to finish", drain_s)
    finished = asyncio.ensure_future(_finish(life))
    forced = asyncio.ensure_future(told.get())
    await asyncio.wait((finished, forced), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    whole = finished.done()
    for server in servers:
        server.should_exit = True
    if whole:
        # The last words are still being written out, perhaps to somebody who reads slowly.
        left_s = max(FLUSH_S, end - time.monotonic())
        await asyncio.wait((serving, forced), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        whole = serving.done()
    for server in servers:
        server.force_exit = True
    for task in (finished, forced):
        task.cancel()
    return Exit.DONE if whole else Exit.CUT


async def _finish(life: Life) -> None:
    for stop in life.on_drain:
        await stop()
    await asyncio.gather(*(one.drain() for one in (life.client, life.embedding) if one is not None))


async def _beat(pipe: int) -> None:
    """Says that this event loop turns, to whoever reads the other end."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BrokenPipeError):
        while True:
            with contextlib.suppress(BlockingIOError):
                os.write(pipe, b".")
            await asyncio.sleep(CHECK_S)


async def _never() -> str:
    never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    return await never


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
    parser.add_argument("--socket", type=Path, help="the engine's; without one [cluster] says where the engines are")
    parser.add_argument("--config", type=Path, required=True, help="TOML, YAML or JSON: [serve] and [supervisor]")
    parser.add_argument("--embedding-socket", type=Path, help="that of a second engine, of an embedding model")
    parser.add_argument("--beat-fd", type=int, help="a pipe that is told that this process lives, where no engine is")
    parser.add_argument("--parent", type=int, help="end when the process of this id is no longer the parent")
    args = parser.parse_args(argv)
    # One text at a time is cut into tokens here; threads of the library's own would only take cores from the engine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_up_logs()
    # What it tells of every bad request is told to the client, and counted.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    try:
        log_by(read_file(args.config))
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            beating = None if args.beat_fd is None else runner.get_loop().create_task(_beat(args.beat_fd))
            code = int(runner.run(serve(args.socket, args.config, args.parent, embedding=args.embedding_socket)))
            if beating is not None:
                beating.cancel()
            return code
    except MillstreamError as error:
        _log.error("%s", error)
        return Exit.USAGE


if __name__ == "__main__":
    leave(main())
