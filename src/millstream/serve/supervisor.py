"""The parent of a server: starts the engine process and the API process, and starts them again.

    supervisor -+- engine    python -m millstream.engine.process   weights, steps; at a Unix socket
                +- engine    another one, of an embedding model, where one is asked for
                             (none of a cluster: the API process starts these, cluster/ray_backend.py)
                `- API       python -m millstream.serve.api        HTTP, tokenizers; a client of these sockets

It computes nothing itself, so that little can go wrong in it. A process that ended is started again after a pause that
grows; one that ends again and again, or for a reason that a new start cannot help, ends the server with an exit code
that says which (`engine/exits.py`). A process that lives and does nothing is killed: the engine when it has work and
finishes no step, or gives no sign of life; the API when its event loop no longer turns.

SIGTERM or SIGINT: the API stops taking requests and finishes those inside, then the engine is stopped; a second signal
cuts them off. SIGHUP: the configuration is read again, and passed on to the API.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millstream.cluster.config import ClusterConfig
from millstream.config.load import build, log_by, read_file, runtime_dir
from millstream.config.schema import EngineConfig
from millstream.core.errors import ConfigError, MillstreamError
from millstream.core.logs import set_up_logs
from millstream.engine import wire
from millstream.engine.exits import HOPELESS, Exit, told

CHECK_S = 0.25
# An engine that was stopped itself finds all clients silent, until it has read what they said meanwhile.
SILENT_BEATS = 3
# What a process may take to end after it was told to, when nothing is left to finish.
END_S = 5.0
# What the API may take beyond its own time to drain: it counts from when it heard of it.
GRACE_S = 2.0

_log = logging.getLogger("millstream.supervisor")

Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """Seconds, but for `give_up`: how many times in a row a process may fail.

    `drain_s`: what requests inside may take to finish once the server is told to stop. `startup_s`: from an engine's
    start until its model is loaded (a download included). `stall_s`: how long an engine with running requests may
    finish no step. `silence_s`: how long a process may give no sign of life. The pause before a new start doubles from
    `backoff_s` to `backoff_max_s`; after `stable_s` without a failure it begins anew.
    """

    drain_s: float = 30.0
    startup_s: float = 1800.0
    stall_s: float = 60.0
    silence_s: float = 20.0
    backoff_s: float = 0.2
    backoff_max_s: float = 10.0
    stable_s: float = 60.0
    give_up: int = 5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ConfigError(f"supervisor.{name}: got {getattr(self, name)}, allowed are numbers from 0")


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """A second engine, whose `model` gives vectors; none without one. `engine` holds its settings, as `[engine]` those
    of the first."""

    model: str = ""
    engine: EngineConfig = field(default_factory=EngineConfig)


class Health:
    """Whether an engine gets on, told from its beats. It is told the time, and measures by one clock only."""

    def __init__(self, config: SupervisorConfig, now: float) -> None:
        self._config = config
        self._started = self._heard = self._turned = self._stepped = now
        self._turns = self._steps = -1
        self.loaded = False

    def beat(self, now: float, beat: wire.Beat) -> None:
        self._heard = now
        self.loaded = self.loaded or beat.phase != "loading"
        if beat.turns != self._turns or not beat.busy:
            self._turns, self._turned = beat.turns, now
        if beat.steps != self._steps or beat.load.running == 0:
            self._steps, self._stepped = beat.steps, now

    def wrong(self, now: float) -> str | None:
        """Why it must be ended; None while it gets on."""
        config = self._config
        if not self.loaded:
            # Torch is imported and weights are converted now: signs of life may stay away.
            return None if now - self._started <= config.startup_s else f"not loaded within {config.startup_s:g} s"
        if now - self._heard > config.silence_s:
            return f"no sign of life for {config.silence_s:g} s"
        if now - self._turned > config.stall_s or now - self._stepped > config.stall_s:
            return f"work inside, and no step finished for {config.stall_s:g} s"
        return None


class Backoff:
    """How long to wait before a process is started again."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self.failures = 0

    def failed(self, ran_s: float) -> float | None:
        """It failed after `ran_s` seconds: the pause before the next start, None when there is to be none."""
        config = self._config
        self.failures = 1 if ran_s >= config.stable_s else self.failures + 1
        if self.failures > config.give_up:
            return None
        return min(config.backoff_max_s, config.backoff_s * 2.0 ** (self.failures - 1))


class Supervisor:
    """Runs its commands until told to stop, or until it must give up.

    `reload` is called at SIGHUP, before the API hears of it; where it raises OSError or an error of ours, nothing is.
    `engine` and `api` must serve, and use, the engine at `socket`; without `engine`, the API has engines of its own.
    `beside` has other engines by what they are called,
    and their sockets.
    """

    def __init__(
        self,
        engine: Command | None,
        api: Command,
        socket: Path,
        config: SupervisorConfig | None = None,
        reload: Callable[[], None] = lambda: None,
        beside: Mapping[str, tuple[Command, Path]] | None = None,
    ) -> None:
        self.config = config or SupervisorConfig()
        engines = {**({} if engine is None else {"engine": (engine, socket)}), **(beside or {})}
        self._sockets = {name: path for name, (_, path) in engines.items()}
        self._commands = {name: tuple(command) for name, (command, _) in engines.items()} | {"API": tuple(api)}
        self._reload = reload
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._health: dict[str, Health] = {}
        self._were_loaded: set[str] = set()
        self._had_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
        # Beats in a row in which an engine had heard nothing of the API for too long.
        self._api_silent = dict.fromkeys(self._sockets, 0)
        # When an API that no engine hears has last said that it lives.
        self._api_beat_at: float | None = None
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._stopping = False

    async def run(self) -> int:
        """Returns the exit code of the server."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        given_up = {**dict.fromkeys(self._sockets, Exit.ENGINE), "API": Exit.API}
        keepers = {name: asyncio.create_task(self._keep(name, code)) for name, code in given_up.items()}
        watch = asyncio.create_task(self._watch())
        try:
            return await self._until_told(keepers)
        finally:
            watch.cancel()
            for keeper in keepers.values():
                keeper.cancel()
            await self._end("API", signal.SIGTERM, END_S)
            await asyncio.gather(*(self._end(name, signal.SIGTERM, END_S) for name in self._sockets))

    async def _until_told(self, keepers: Mapping[str, asyncio.Task[int]]) -> int:
        while True:
            heard = asyncio.ensure_future(self._signals.get())
            done, _ = await asyncio.wait({heard, *keepers.values()}, return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers.values():
                if keeper in done:
                    heard.cancel()
                    return keeper.result()
            if heard.result() == signal.SIGHUP and not (self._had_terminal and _terminal_is_gone()):
                self._pass_on()
                continue
            return await self._stop(keepers)

    async def _stop(self, keepers: Mapping[str, asyncio.Task[int]]) -> int:
        """Lets the API finish what is inside. The engine is kept alive meanwhile."""
        self._stopping = True
        _log.info("told to stop: requests inside have %g s to finish", self.config.drain_s)
        self._send("API", signal.SIGTERM)
        end = time.monotonic() + self.config.drain_s + GRACE_S
        forced = False
        while not keepers["API"].done():
            if any(keepers[name].done() for name in self._sockets):
                _log.error("there is no engine to finish requests with")
                break
            left_s = end - time.monotonic()
            if left_s <= 0:
                _log.warning("requests are cut off: the time to finish them is over")
                break
            heard = asyncio.ensure_future(self._signals.get())
            done, _ = await asyncio.wait(
                {heard, *keepers.values()}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if heard not in done:
                heard.cancel()
            elif heard.result() != signal.SIGHUP and not forced:
                forced = True
                _log.warning("told a second time to stop: requests are cut off")
                self._send("API", signal.SIGTERM)
                end = min(end, time.monotonic() + GRACE_S)
        # One that SIGTERM itself has ended had not begun to serve.
        well = (Exit.DONE, -signal.SIGTERM)
        return Exit.DONE if keepers["API"].done() and keepers["API"].result() in well else Exit.CUT

    def _pass_on(self) -> None:
        try:
            self._reload()
        except (MillstreamError, OSError) as error:
            _log.error("the configuration stays as it was: %s", error)
            return
        self._send("API", signal.SIGHUP)

    # -- processes

    async def _keep(self, name: str, given_up: Exit) -> int:
        """Keeps a process going; returns, with the exit code of the server, when it need not or cannot be kept."""
        backoff = Backoff(self.config)
        while not (self._stopping and name == "API"):
            started = time.monotonic()
            if name in self._sockets:
                self._health[name] = Health(self.config, started)
            pipe = os.pipe() if name == "API" and not self._sockets else None
            try:
                child = await asyncio.create_subprocess_exec(
                    *self._commands[name],
                    *(() if pipe is None else ("--beat-fd", str(pipe[1]))),
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C in a terminal goes to all of its group; what it means is for this process to say.
                    start_new_session=True,
                    pass_fds=() if pipe is None else pipe[1:],
                )
            except OSError as error:
                _log.error("the %s process cannot be started: %s", name, error)
                return Exit.FAILED
            self._children[name] = child
            _log.info("the %s process is started: %d", name, child.pid)
            with self._beats(pipe):
                code = await child.wait()
            del self._children[name]
            _end_group(child.pid)
            if self._stopping and name == "API":
                return code
            if name == "API" and code == Exit.DONE:
                _log.info("the API process is done")
                return Exit.DONE
            was_well = name in self._were_loaded if name in self._sockets else backoff.failures > 0
            _log.error("the %s process ended: %s", name, told(code))
            if code in HOPELESS and not was_well:
                return code
            pause_s = backoff.failed(time.monotonic() - started)
            if pause_s is None:
                _log.error("giving up: the %s process failed %d times in a row", name, backoff.failures)
                return code if code in HOPELESS else given_up
            await asyncio.sleep(pause_s)
        return Exit.DONE

    @contextlib.contextmanager
    def _beats(self, pipe: tuple[int, int] | None) -> Iterator[None]:
        """Hears the signs of life of an API that has no engine process to hear them, until left."""
        if pipe is None:
            yield
            return
        source, other = pipe
        os.close(other)
        self._api_beat_at = None
        loop = asyncio.get_running_loop()

        def hear() -> None:
            if os.read(source, 4096):
                self._api_beat_at = time.monotonic()
            else:
                loop.remove_reader(source)

        loop.add_reader(source, hear)
        try:
            yield
        finally:
            loop.remove_reader(source)
            os.close(source)
            self._api_beat_at = None

    def _send(self, name: str, number: int) -> None:
        child = self._children.get(name)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    async def _end(self, name: str, number: int, wait_s: float) -> None:
        """Ends a process, gently first."""
        child = self._children.get(name)
        if child is None or child.returncode is not None:
            return
        self._send(name, number)
        try:
            await asyncio.wait_for(child.wait(), wait_s)
        except TimeoutError:
            self._send(name, signal.SIGKILL)
            await child.wait()
        _end_group(child.pid)

    # -- the watchdog

    async def _watch(self) -> None:
        """Listens to the engines' beats, and kills what lives and does nothing."""
        listening = [asyncio.create_task(self._listen(name)) for name in self._sockets]
        try:
            while True:
                await asyncio.sleep(CHECK_S)
                if os.getpid() == 1:
                    reap_strangers({child.pid for child in self._children.values()})
                now = time.monotonic()
                for name, health in list(self._health.items()):
                    why = health.wrong(now) if name in self._children else None
                    if why is not None:
                        self._kill(name, why)
                quiet = self._api_beat_at is not None and now - self._api_beat_at > self.config.silence_s
                if quiet or max(self._api_silent.values(), default=0) >= SILENT_BEATS:
                    self._api_silent = dict.fromkeys(self._sockets, 0)
                    self._api_beat_at = None
                    self._kill("API", f"no sign of life for {self.config.silence_s:g} s")
        finally:
            for one in listening:
                one.cancel()

    def _kill(self, name: str, why: str) -> None:
        _log.error("the %s process is killed: %s", name, why)
        # A stopped process hears no other signal.
        self._send(name, signal.SIGKILL)
        self._health.pop(name, None)

    async def _listen(self, name: str) -> None:
        while True:
            engine = self._children.get(name)
            if engine is not None:
                with contextlib.suppress(OSError, wire.WireError):
                    await self._listen_to(name, engine.pid)
            await asyncio.sleep(CHECK_S)

    async def _listen_to(self, name: str, pid: int) -> None:
        """Hears an engine's beats until the connection ends. Raises WireError where another process answers."""
        reader, writer = await asyncio.open_unix_connection(self._sockets[name])
        frames = wire.Frames(wire.MAX_TO_CLIENT)
        try:
            writer.write(wire.frame(wire.Hello(wire.VERSION, os.getpid()), wire.MAX_TO_ENGINE))
            while data := await reader.read(1 << 16):
                for payload in frames.feed(data):
                    message = wire.to_client(payload)
                    if isinstance(message, wire.Hello) and message.pid != pid:
                        raise wire.WireError(f"process {message.pid} answers, not {pid}")
                    if isinstance(message, wire.Beat):
                        self._beat(name, message)
                        writer.write(wire.frame(wire.Alive(), wire.MAX_TO_ENGINE))
        finally:
            writer.close()

    def _beat(self, name: str, beat: wire.Beat) -> None:
        now = time.monotonic()
        if (health := self._health.get(name)) is not None:
            health.beat(now, beat)
            if health.loaded:
                self._were_loaded.add(name)
        api = self._children.get("API")
        silent = any(
            api is not None and pid == api.pid and silent_s > self.config.silence_s for pid, silent_s in beat.clients
        )
        self._api_silent[name] = self._api_silent[name] + 1 if silent else 0


def _end_group(pid: int) -> None:
    """Ends what a process that has ended left behind: its own children are in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def reap_strangers(own: Collection[int]) -> None:
    """As process 1 of a container: orphans are handed to it, and stay as zombies until somebody asks how they ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
            os.waitpid(ended.si_pid, os.WNOHANG)


def _terminal_is_gone() -> bool:
    """Then a SIGHUP says so, and not that somebody wants a reload."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False


def write_launch(path: Path, tree: Mapping[str, Any]) -> None:
    """The file that both processes are started with; it may hold keys, so others cannot read it. Raises OSError."""
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump(tree, out)
    fresh.replace(path)


def supervise(read: Callable[[], Mapping[str, Any]]) -> int:
    """Runs a server as the tree that `read` gives says: `model`, and the tables `engine`, `embedding`, `cluster`,
    `serve` and `supervisor`.

    It is read again at SIGHUP; what is in `serve` may change then. Returns an exit code. Raises ConfigError, BadFile.
    """
    tree = read()
    config = build(SupervisorConfig, tree.get("supervisor", {}), "supervisor")
    embedding = tree.get("embedding", {})
    second = build(EmbeddingConfig, embedding, "embedding").model
    folder = Path(tempfile.mkdtemp(prefix="millstream-", dir=runtime_dir()))
    try:
        launch, socket = folder / "launch.json", folder / "engine.sock"
        write_launch(launch, tree)
        given = ("--config", str(launch), "--parent", str(os.getpid()))
        engine: Command | None = (sys.executable, "-m", "millstream.engine.process", "--socket", str(socket), *given)
        api: Command = (sys.executable, "-m", "millstream.serve.api", *given)
        if build(ClusterConfig, tree.get("cluster", {}), "cluster").wanted:
            engine = None
        else:
            api = (*api, "--socket", str(socket))
        beside: dict[str, tuple[Command, Path]] = {}
        if second:
            own, other = folder / "embedding.json", folder / "embedding.sock"
            write_launch(own, {**embedding, "log": tree.get("log", {})})
            words = ("--socket", str(other), "--config", str(own), "--parent", str(os.getpid()))
            beside["embedding engine"] = ((sys.executable, "-m", "millstream.engine.process", *words), other)
            api = (*api, "--embedding-socket", str(other))
        supervisor = Supervisor(
            engine,
            api,
            socket,
            config,
            lambda: write_launch(launch, read()),
            beside,
        )
        return int(asyncio.run(supervisor.run()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("millstream.serve.supervisor", description="A server: engine and API process.")
    parser.add_argument("--config", type=Path, required=True, help="TOML, YAML or JSON: model, and its tables")
    args = parser.parse_args(argv)
    set_up_logs()
    try:
        log_by(read_file(args.config))
        return supervise(lambda: read_file(args.config))
    except MillstreamError as error:
        _log.error("%s", error)
        return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
