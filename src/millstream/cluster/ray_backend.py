"""Engines as Ray actors: one engine an actor, wherever Ray has room for it.

An actor hosts what an engine process does (`engine/process.py`: the engine on a thread, its server on the event loop),
and speaks the same frames (`engine/wire.py`); only the way between is another one: what goes to the engine are calls
of the actor, what comes back is a stream of it, all news of a step in one piece. Ray restarts nothing: an actor that
dies is replaced by a fresh one, under another place.

Ray is imported when the first engine is started, and by nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from millstream.cluster.config import RayConfig
from millstream.core.client import EngineClient, ModelFacts
from millstream.core.errors import ConfigError
from millstream.core.logs import set_up_logs
from millstream.engine.engine import Engine
from millstream.engine.process import BEAT_S, SWITCH_S, EngineServer, Make, make_of, making
from millstream.engine.remote import RemoteEngine

# Beats come four times a second: an engine that missed some of them is not ready.
QUIET_S = 1.5
# There is one Ray in a process.
_BEGINNING = threading.Lock()

_log = logging.getLogger("millstream.cluster")


# -- in the actor


class _Pipe(asyncio.Transport):
    """What a server writes for its one client, until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._out = bytearray()
        self._news = asyncio.Event()
        self._closing = False

    def write(self, data: Any) -> None:
        self._out += data
        self._news.set()

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True
        self._news.set()

    def abort(self) -> None:
        self.close()

    async def take(self) -> bytes:
        """All that there is; b"" when it was closed."""
        await self._news.wait()
        self._news.clear()
        out = bytes(self._out)
        self._out.clear()
        return out


class EngineHost:
    """The actor: an engine that `make` makes, and its server."""

    def __init__(self, make: Make) -> None:
        set_up_logs()
        sys.setswitchinterval(SWITCH_S)
        self._make = make
        self._pipe: _Pipe | None = None
        self._client: asyncio.Protocol | None = None
        self._early: dict[int, bytes] = {}
        self._next = 0

    async def hear(self, number: int, data: bytes) -> None:
        """Frames from the client. Calls may overtake each other, and come twice; what they say is taken in order."""
        if number >= self._next:
            self._early[number] = data
            self._pass_on()

    def _pass_on(self) -> None:
        while self._client is not None and (data := self._early.pop(self._next, b"")):
            self._next += 1
            self._client.data_received(data)

    async def news(self) -> AsyncIterator[bytes]:
        """Frames for the client, from the start of the engine to its end. Raises what the making raises, and
        RuntimeError when the engine can no longer step."""
        loop = asyncio.get_running_loop()
        server = EngineServer(Path("actor"))
        self._pipe, self._client = _Pipe(), server.client()
        self._client.connection_made(self._pipe)
        self._pass_on()
        made: asyncio.Future[tuple[Engine, ModelFacts]] = loop.create_future()
        threading.Thread(target=making, args=(self._make, loop, made), name="millstream-load", daemon=True).start()
        beating = loop.create_task(_beat(server, made))
        told = loop.create_task(self._pipe.take())
        try:
            while True:
                await asyncio.wait((told, beating, server.failed), return_when=asyncio.FIRST_COMPLETED)
                if beating.done():
                    beating.result()
                if server.failed.done():
                    raise RuntimeError(f"the engine can no longer step: {server.failed.result()}")
                if told.done():
                    data = told.result()
                    if not data:
                        return
                    told = loop.create_task(self._pipe.take())
                    yield data
        finally:
            told.cancel()
            beating.cancel()
            self._client.connection_lost(None)
            await server.close()


async def _beat(server: EngineServer, made: asyncio.Future[tuple[Engine, ModelFacts]]) -> None:
    """Attaches the engine when it is made, and beats for ever. Raises what the making raised."""
    while True:
        if server.thread is None:
            await asyncio.wait((made,), timeout=BEAT_S)
            if made.done():
                server.attach(*made.result())
                continue
        else:
            await asyncio.sleep(BEAT_S)
        server.beat()


# -- in the driver


class _Way(asyncio.Transport):
    """The driver's end of the way to an actor. What is written in one turn of the loop goes in one call."""

    def __init__(self, actor: Any, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._actor, self._protocol = actor, protocol
        self._out = bytearray()
        self._number = 0
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Task[None] | None = None

    def open(self) -> None:
        stream = self._actor.news.options(num_returns="streaming").remote()
        self._protocol.connection_made(self)
        self._reader = self._loop.create_task(self._read(stream))

    def write(self, data: Any) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += data

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._lost(None)

    def abort(self) -> None:
        self.close()

    def _flush(self) -> None:
        if self._closing or not self._out:
            return
        data, self._out = bytes(self._out), bytearray()
        # Nobody waits for what it gives, so that it need give nothing.
        self._actor.hear.options(num_returns=0).remote(self._number, data)
        self._number += 1

    async def _read(self, stream: Any) -> None:
        why = "the actor ended"
        try:
            async for piece in stream:
                data = await piece
                if self._closing:
                    return
                self._protocol.data_received(data)
        except asyncio.CancelledError:
            return
        except Exception as error:
            # Of a failed actor the first line says what it met; a traceback follows.
            why = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if not self._closing:
            self._lost(OSError(why))

    def _lost(self, error: Exception | None) -> None:
        self._closing = True
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._loop.call_soon(self._protocol.connection_lost, error)


class RayBackend:
    """A Backend of actors, all of which run what `make` gives (it is pickled). `environment` is set in each of them.

    An engine is not ready when it gave no sign of life for `quiet_s`, or has work and made no turn for `stall_s`.

    Raises ConfigError at the first start where Ray is not installed. Where Ray runs already in this process, that one
    is used, and left running.
    """

    def __init__(
        self,
        make: Make,
        config: RayConfig | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        quiet_s: float = QUIET_S,
        stall_s: float = 60.0,
        log_to_driver: bool = True,
    ) -> None:
        self.config = config or RayConfig()
        self.quiet_s, self.stall_s = quiet_s, stall_s
        self._make, self._environment, self._log_to_driver = make, dict(environment or {}), log_to_driver
        self._actors: dict[EngineClient, Any] = {}
        self._ray: Any = None
        self._own_ray = False
        self._starting = asyncio.Lock()

    @classmethod
    def of(cls, model: str, tree: Mapping[str, Any], config: RayConfig, **given: Any) -> RayBackend:
        """Engines of a model, with the settings of a tree `[engine]`."""
        return cls(partial(make_of, model, dict(tree)), config, **given)

    async def start(self, name: str) -> EngineClient:
        async with self._starting:
            if self._ray is None:
                self._ray = await asyncio.to_thread(self._begin)
        config = self.config
        options: dict[str, Any] = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "max_restarts": 0}
        if self._environment:
            options["runtime_env"] = {"env_vars": self._environment}
        # Where Ray's own service does not answer, this takes its time.
        actor = await asyncio.to_thread(lambda: self._ray.remote(EngineHost).options(**options).remote(self._make))
        connect = partial(_connect, actor)
        engine = RemoteEngine(
            f"Ray actor {name}", connect=connect, max_losses=1, quiet_s=self.quiet_s, stall_s=self.stall_s
        )
        self._actors[engine] = actor
        await engine.start()
        return engine

    def alive(self, client: EngineClient) -> bool:
        return not (isinstance(client, RemoteEngine) and client.closed)

    async def kill(self, client: EngineClient) -> None:
        actor = self._actors.pop(client, None)
        pid = client.engine_pid if isinstance(client, RemoteEngine) else None
        if actor is not None:
            await asyncio.to_thread(self._kill, actor, pid)
        await client.close()

    async def close(self) -> None:
        for client in list(self._actors):
            await self.kill(client)
        if self._ray is not None and self._own_ray:
            ray, self._ray = self._ray, None
            await asyncio.to_thread(ray.shutdown)

    def _kill(self, actor: Any, pid: int | None) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor, no_restart=True)
        # One that was stopped (SIGSTOP) hears nothing of it.
        if pid is not None and self.config.local and _is_actor(pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _begin(self) -> Any:
        ray = _import_ray()
        with _BEGINNING:
            return self._begin_alone(ray)

    def _begin_alone(self, ray: Any) -> Any:
        if ray.is_initialized():
            return ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        config = self.config
        given: dict[str, Any] = {}
        if not config.local:
            given["address"] = config.address
        else:
            given |= {
                "address": "local",
                "object_store_memory": config.object_store_bytes,
                "include_dashboard": False,
                # As many engines as are asked for, also on a machine with fewer cores.
                "num_cpus": max(os.cpu_count() or 1, 1) if config.num_cpus else 1,
            }
        ray.init(log_to_driver=self._log_to_driver, logging_level=logging.ERROR, **given)
        self._own_ray = True
        return ray


async def _connect(actor: Any, protocol: Callable[[], asyncio.Protocol]) -> None:
    _Way(actor, protocol()).open()


def _import_ray() -> Any:
    """Raises ConfigError."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"several engines run on Ray, which cannot be imported ({error}); pip install 'millstream[cluster]' has it"
        ) from None


def _is_actor(pid: int) -> bool:
    """Whether a process of this machine is an actor of ours: process ids are used again."""
    try:
        return b"EngineHost" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
