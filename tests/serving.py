"""Servers for tests: a whole one in its processes, and one in a thread of this process, both over a tiny random model.

with whole_server(folder, "--api-key", "alice:some-key-1") as server:
    status, body = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3})

with app_server(folder, {"serve": {"auth": {"keys": ["alice:some-key-1"]}}}) as server: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiny_files import build_model

WAIT_S = 60.0
MODULES = {"engine": "millstream.engine.process", "api": "millstream.serve.api"}
# A tiny model on half a core: what a test needs, and no more.
ENGINE = {
    "cache": {"blocks": 2048, "block_size": 16},
    "sched": {"step_tokens": 256},
    "runner": {"threads": 1, "plans": 1},
}


@dataclass(frozen=True)
class Answer:
    """A response that was read to its end. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found

    def events(self) -> list[Any]:
        """The data of server-sent events; [DONE] is left out."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Client:
    """Plain HTTP to one server; every request has a connection of its own."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key = url, key

    @property
    def port(self) -> int:
        return urllib.parse.urlsplit(self.url).port or 0

    def with_key(self, key: str) -> Client:
        return Client(self.url, key)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = WAIT_S,
    ) -> Answer:
        """`body`: bytes as they are, anything else as JSON."""
        with self.open(method, path, body, headers, timeout_s) as response:
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = WAIT_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """The response as it comes; leaving closes the connection."""
        where = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout_s)
        given = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            given["Content-Type"] = "application/json"
        try:
            connection.request(method, path, body, {**given, **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str, **given: Any) -> Answer:
        return self.ask("GET", path, **given)

    def post(self, path: str, body: Any = None, **given: Any) -> Answer:
        return self.ask("POST", path, body, **given)

    def status(self, path: str) -> int:
        """0 where nobody answers."""
        try:
            return self.get(path).status
        except OSError:
            return 0

    def chat(self, text: str = "hi", **given: Any) -> Answer:
        given = {"max_tokens": 4, "temperature": 0, **given}
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **given})


def until(true: Callable[[], Any], what: str = "it never came to be", limit_s: float = WAIT_S) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


# -- a whole server


class WholeServer(Client):
    """`millstream serve` on a free port: supervisor, engine process, API process."""

    def __init__(self, folder: Path, model: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.log_path = folder / "log"
        sets = [f"{room}.{name}={value}" for room, values in ENGINE.items() for name, value in values.items()]
        command = [sys.executable, "-m", "millstream", "serve", str(model), "--port", "0"]
        command += [word for one in sets for word in ("--set", one)]
        env = {**os.environ, **environment}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen([*command, *words], stdout=log, stderr=log, env=env)
        self.seen: set[int] = set()
        super().__init__("")

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def find_url(self) -> str:
        told = re.findall(r"millstream.serve listening at (http://\S+)", self.log)
        self.url = told[-1] if told else ""
        return self.url

    def admin(self, key: str) -> Client:
        told = re.findall(r"the admin listens at (http://\S+)", self.log)
        return Client(told[-1], key)

    def pids(self) -> dict[str, int]:
        """Process ids of the engine and the API."""
        found = children_of(self.process.pid)
        self.seen |= set(found)
        return {name: pid for pid, words in found.items() for name in MODULES if MODULES[name] in words}

    def until(self, true: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < end, f"{what}\n{self.log}"
            assert self.process.poll() is None, f"{what}: it ended with {self.process.returncode}\n{self.log}"
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until(lambda: self.find_url() and self.status("/ready") == 200, "ready")
        self.pids()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, limit_s: float = WAIT_S) -> int:
        """The exit code of the server, which leaves no process behind."""
        code = self.process.wait(limit_s)
        left = [pid for pid in self.seen if alive(pid)]
        assert not left, f"processes {left} are left behind"
        return code

    def end(self) -> None:
        pids = self.pids() if self.process.poll() is None else {}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in {*self.seen, *pids.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def whole_server(
    folder: Path,
    *words: str,
    model: Path | None = None,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
) -> Iterator[WholeServer]:
    """A server in its own processes until left. `words` are more of the command line; `folder` is its own."""
    folder.mkdir(parents=True, exist_ok=True)
    server = WholeServer(folder, model or tiny_model(folder), words, environment or {})
    try:
        if ready:
            server.until_ready()
        yield server
    finally:
        server.end()


def tiny_model(folder: Path) -> Path:
    path = folder / "tiny"
    return path if (path / "config.json").is_file() else build_model(path)


def children_of(pid: int) -> dict[int, str]:
    """Process ids of the children of a process, and their command lines."""
    found = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -- the app in a thread


class AppServer(Client):
    """The app as the API process has it, over an engine in a thread of this process. `records`: what has ended."""

    def __init__(self, folder: Path, tree: Mapping[str, Any], model: Path, engine: Mapping[str, Any]) -> None:
        from millstream.engine.llm import AsyncLLM

        super().__init__("")
        self.tree = {"model": str(model), **tree}
        serve = {"port": 0, "folder": str(folder / "store"), **self.tree.get("serve", {})}
        self.tree["serve"] = serve
        self.llm = AsyncLLM(str(model), {**ENGINE, **engine})
        self.draining = False
        self.stopped = threading.Event()
        self.records: list[Any] = []
        self.app: Any = None
        self.admin_url = ""
        self.loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        until(lambda: self.status("/ready") == 200, "ready")

    def admin(self, key: str) -> Client:
        return Client(self.admin_url, key)

    @property
    def load(self) -> Any:
        return self.llm.assembled.engine.load()

    def idle(self) -> bool:
        """Whether nothing is inside, and all that was held is given back."""
        load = self.load
        return load.running == load.waiting == self.app.gate.waiting_requests == 0

    def call(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on the server's event loop."""
        assert self.loop is not None

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(WAIT_S)

    async def _serve(self) -> None:
        from millstream.serve.api import http_server
        from millstream.serve.app import App
        from millstream.serve.listen import places, url_of

        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self.app = app = App(
                self.llm.client, self.tree, draining=lambda: self.draining, stop_server=self.stopped.set
            )
        except BaseException as error:
            self._error = error
            self._ready.set()
            return
        ended = app.watched.ended
        app.watched.ended = lambda record: (self.records.append(record), ended(record))
        await app.start()
        socks = [listen() for _, listen in places(app.config)]
        apps = [app] if app.admin is None else [app, app.admin]
        limits = app.config.limits
        servers = [http_server(one, replace(app.config, root_path=""), limits, app.refused) for one in apps]
        tasks = [asyncio.create_task(s.serve(sockets=[sock])) for s, sock in zip(servers, socks, strict=True)]
        self.url = url_of(socks[0])
        self.admin_url = url_of(socks[1]) if len(socks) > 1 else ""
        self._ready.set()
        await self._stop.wait()
        for server in servers:
            server.should_exit = server.force_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        await app.stop()
        for sock in socks:
            sock.close()

    def end(self) -> None:
        if self.loop is not None and self._error is None:
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self.llm.thread.close()


@contextlib.contextmanager
def app_server(
    folder: Path, tree: Mapping[str, Any] | None = None, *, model: Path | None = None, **engine: Any
) -> Iterator[AppServer]:
    """The app until left. `tree` is the configuration's; `engine` are tables of the engine's own."""
    folder.mkdir(parents=True, exist_ok=True)
    server = AppServer(folder, tree or {}, model or tiny_model(folder), engine)
    try:
        server.start()
        yield server
    finally:
        server.end()
