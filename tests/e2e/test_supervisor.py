"""A server of two processes: whichever dies or hangs, and however it is told to stop, it says what is true and leaves
nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.core.client import Load
from millstream.core.errors import ConfigError
from millstream.engine import wire
from millstream.engine.exits import Exit, as_shell, told
from millstream.serve.supervisor import Backoff, Health, SupervisorConfig, reap_strangers

WAIT_S = 20.0
SERVER = Path(__file__).parent / "null_server.py"
ASK = {"prompt": [7, 7, 3, 1], "max_tokens": 60, "temperature": 1.0, "seed": 5}
# Quick to notice and quick to start again.
FAST = {"stall_s": 1.0, "silence_s": 1.0, "backoff_s": 0.05, "drain_s": 10.0}


class Connection:
    """One connection to the null API."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("rb")

    def say(self, ask: dict[str, Any]) -> None:
        self.sock.sendall(json.dumps(ask).encode() + b"\n")

    def line(self) -> dict[str, Any]:
        line = self.lines.readline()
        if not line:
            raise ConnectionResetError("the API is gone")
        return json.loads(line)

    def rest(self) -> tuple[list[int], str]:
        """The tokens of what is running on this connection, and how it ended."""
        tokens: list[int] = []
        while True:
            line = self.line()
            if "error" in line:
                return tokens, line["error"]
            tokens += line["tokens"]
            if line["finish"] is not None:
                return tokens, line["finish"]

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


class Server:
    """A supervisor and its children."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.api = folder / "run" / "api.sock"
        options["supervisor"] = {**FAST, **options.get("supervisor", {})}
        (folder / "launch.json").write_text(json.dumps(options))
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, str(SERVER), str(folder)], stderr=log)
        self.seen: set[int] = set()

    def children(self) -> dict[str, int]:
        """Process ids by the name of the script."""
        found = {Path(words[1]).stem: pid for pid, words in children_of(self.process.pid).items() if len(words) > 1}
        self.seen |= set(found.values())
        return found

    def pid(self, name: str) -> int:
        return self.children()[name]

    def connect(self) -> Connection:
        return Connection(self.api)

    def ready(self) -> bool:
        try:
            connection = self.connect()
        except OSError:
            return False
        try:
            connection.say({"ready": True})
            return bool(connection.line()["ready"])
        except OSError:
            return False
        finally:
            connection.close()

    def until(self, check: Any, what: str, wait_s: float = WAIT_S) -> None:
        end = time.monotonic() + wait_s
        while not check():
            assert time.monotonic() < end, f"not within {wait_s:g} s: {what}\n{self.log.read_text()}"
            time.sleep(0.01)

    def until_ready(self) -> None:
        self.until(self.ready, "it is ready")
        self.children()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.children()
        code = self.process.wait(WAIT_S)
        assert not [pid for pid in self.seen if alive(pid)], "a process is left behind"
        return code

    def end(self) -> None:
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> dict[int, list[str]]:
    """The process ids of a process's children, and the words of each one's command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def server(tmp_path_factory) -> Iterator[Any]:
    started: list[Server] = []

    def start(**options: Any) -> Server:
        started.append(Server(tmp_path_factory.mktemp("s"), **options))
        return started[-1]

    yield start
    for one in started:
        one.end()


def truth(server: Server, ask: dict[str, Any] = ASK) -> list[int]:
    connection = server.connect()
    connection.say(ask)
    tokens, end = connection.rest()
    connection.close()
    assert end == "length"
    return tokens


# -- the engine


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_engine_is_started_again_and_the_text_goes_on(server, seed):
    one = server(step_s=0.01)
    one.until_ready()
    want = truth(one)
    chance = random.Random(seed)
    connection = one.connect()
    connection.say(ASK)
    for _ in range(2):
        first = connection.line()
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(one.pid("null_process"), signal.SIGKILL)
        killed = time.monotonic()
        one.until(lambda: not one.ready(), "it is not ready")
        assert time.monotonic() - killed < 1.0
        late = one.connect()
        late.say(ASK)
        assert "EngineAway" in late.line()["error"]
        late.close()
        one.until_ready()
        want = want[len(first["tokens"]) :]
    tokens, end = connection.rest()
    assert end == "length" and want[-len(tokens) :] == tokens
    assert one.process.poll() is None and "killed by SIGKILL" in one.log.read_text()
    one.signal(signal.SIGTERM)
    assert one.wait() == Exit.DONE


def test_a_stopped_engine_is_killed_and_its_requests_go_on_elsewhere(server):
    one = server(step_s=0.01)
    one.until_ready()
    want = truth(one)
    connection = one.connect()
    connection.say(ASK)
    tokens = connection.line()["tokens"]
    stopped = one.pid("null_process")
    os.kill(stopped, signal.SIGSTOP)
    one.until(lambda: not one.ready(), "it is not ready")
    rest, end = connection.rest()
    assert [*tokens, *rest] == want and end == "length"
    assert not alive(stopped) and "no sign of life" in one.log.read_text()


def test_what_a_killed_engine_had_started_ends_with_it(server):
    one = server(helper=True)
    one.until_ready()
    engine = one.pid("null_process")
    (helper,) = children_of(engine)
    os.kill(engine, signal.SIGKILL)
    one.until(lambda: not alive(helper), "it ends")
    one.until_ready()
    (helper,) = children_of(one.pid("null_process"))
    one.signal(signal.SIGTERM)
    assert one.wait() == Exit.DONE and not alive(helper)


def test_an_engine_that_hangs_in_a_step_is_killed_though_it_beats(server):
    one = server(step_s=0.002, hang_at=150, supervisor={"silence_s": 10.0})
    one.until_ready()
    connection = one.connect()
    # The new engine has as many steps before it hangs as the first.
    connection.say({**ASK, "max_tokens": 200})
    tokens, end = connection.rest()
    assert len(tokens) == 200 and end == "length"
    assert "no step finished" in one.log.read_text()


def test_an_engine_that_cannot_step_says_so_and_is_started_again(server):
    one = server(step_s=0.002, break_at=40)
    one.until_ready()
    connection = one.connect()
    connection.say({**ASK, "max_tokens": 60})
    tokens, end = connection.rest()
    assert len(tokens) == 60 and end == "length"
    assert "exit code 4 (engine)" in one.log.read_text()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"fail_start": "usage"}, Exit.USAGE),
        ({"fail_start": "model"}, Exit.MODEL),
        ({"fail_start": "crash", "supervisor": {"give_up": 2}}, Exit.ENGINE),
        ({"api_code": Exit.ADDRESS}, Exit.ADDRESS),
        ({"api_code": 1, "supervisor": {"give_up": 2}}, Exit.API),
        ({"api_code": 0}, Exit.DONE),
    ],
)
def test_it_gives_up_with_a_code_that_says_why(server, options, code):
    one = server(**options)
    one.until(one.children, "children")
    assert one.wait() == code, one.log.read_text()


# -- the API


def test_a_killed_api_is_started_again_and_attaches_to_the_same_engine(server):
    one = server(step_s=0.01)
    one.until_ready()
    want = truth(one)
    connection = one.connect()
    connection.say(ASK)
    connection.line()
    engine, api = one.pid("null_process"), one.pid("null_api")
    os.kill(api, signal.SIGKILL)
    with pytest.raises(ConnectionResetError):
        connection.rest()
    one.until(lambda: one.children().get("null_api") not in (None, api), "a new API process")
    one.until_ready()
    assert one.pid("null_process") == engine and truth(one) == want


def test_an_api_whose_event_loop_does_not_turn_is_killed(server):
    one = server()
    one.until_ready()
    api = one.pid("null_api")
    connection = one.connect()
    connection.say({**ASK, "hang": 1000})
    one.until(lambda: not alive(api), "it is killed")
    one.until_ready()
    assert "the API process is killed: no sign of life" in one.log.read_text()


# -- signals


def test_sigterm_lets_requests_finish_and_takes_no_more(server):
    one = server(step_s=0.01)
    one.until_ready()
    want = truth(one)
    connection, late = one.connect(), one.connect()
    connection.say(ASK)
    first = connection.line()["tokens"]
    one.signal(signal.SIGTERM)
    time.sleep(0.1)
    late.say({"ready": True})
    assert late.line()["ready"] is False
    late.say(ASK)
    assert "draining" in late.line()["error"]
    tokens, end = connection.rest()
    assert [*first, *tokens] == want and end == "length"
    assert one.wait() == Exit.DONE


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_cuts_requests_off(server, first):
    one = server(step_s=0.05)
    one.until_ready()
    connection = one.connect()
    connection.say({**ASK, "max_tokens": 400})
    connection.line()
    one.signal(first)
    time.sleep(0.3)
    start = time.monotonic()
    one.signal(signal.SIGINT)
    assert one.wait() == Exit.CUT
    assert time.monotonic() - start < 8.0


def test_requests_are_cut_off_when_the_time_to_drain_is_over(server):
    one = server(step_s=0.05, supervisor={"drain_s": 0.3})
    one.until_ready()
    connection = one.connect()
    connection.say({**ASK, "max_tokens": 400})
    connection.line()
    one.signal(signal.SIGTERM)
    assert one.wait() == Exit.CUT


def test_an_engine_that_dies_while_it_drains_is_replaced(server):
    one = server(step_s=0.02)
    one.until_ready()
    connection = one.connect()
    connection.say(ASK)
    first = connection.line()["tokens"]
    one.signal(signal.SIGTERM)
    time.sleep(0.2)
    os.kill(one.pid("null_process"), signal.SIGKILL)
    tokens, end = connection.rest()
    assert len(first) + len(tokens) == 60 and end == "length"
    assert one.wait() == Exit.DONE


def test_told_to_stop_before_anything_is_ready_it_ends_at_once(server):
    one = server(load_s=30.0)
    one.until(lambda: len(one.children()) == 2, "both are started")
    one.signal(signal.SIGTERM)
    start = time.monotonic()
    assert one.wait() == Exit.DONE
    assert time.monotonic() - start < 8.0


def test_sighup_reads_the_configuration_again(server):
    one = server()
    one.until_ready()
    connection = one.connect()

    def greeting() -> Any:
        connection.say({"ready": True})
        return connection.line()["greeting"]

    assert greeting() is None
    one.signal(signal.SIGHUP)
    one.until(lambda: greeting() == "read again", "it is read")
    assert (one.folder / "launch.json").stat().st_mode & 0o777 == 0o600
    one.signal(signal.SIGTERM)
    assert one.wait() == Exit.DONE


def test_no_child_outlives_a_killed_supervisor(server):
    one = server()
    one.until_ready()
    children = one.children()
    one.process.kill()
    one.process.wait()
    one.until(lambda: not any(alive(pid) for pid in children.values()), "they end")


# -- its parts


def beat(turns: int, steps: int, busy: bool, running: int = 0, phase: str = "ready") -> wire.Beat:
    return wire.Beat(phase, turns, steps, busy, 0.0, Load(0, running, 1, 1))


def test_health_is_told_by_progress_and_not_by_beats():
    config = SupervisorConfig(stall_s=10.0, silence_s=3.0, startup_s=100.0)
    loading = Health(config, 0.0)
    loading.beat(1.0, beat(0, 0, False, phase="loading"))
    assert loading.wrong(99.0) is None and "not loaded" in loading.wrong(101.0)

    idle = Health(config, 0.0)
    for now in range(200):
        idle.beat(float(now), beat(7, 3, False))
        assert idle.wrong(float(now)) is None, "an engine without work may rest"
    assert idle.wrong(202.0) is None and "no sign of life" in idle.wrong(202.5)

    # Alive, and stuck in a step; or turning without ever finishing one.
    for turning in (False, True):
        stuck = Health(config, 0.0)
        stuck.beat(0.0, beat(1, 1, False))
        for now in range(1, 11):
            stuck.beat(float(now), beat(now if turning else 2, 1, True, running=1))
            assert stuck.wrong(float(now)) is None
        stuck.beat(12.0, beat(12 if turning else 2, 1, True, running=1))
        assert "no step finished" in stuck.wrong(12.0)

    # What waits at a gate is no reason, as long as the loop turns.
    gated = Health(config, 0.0)
    for now in range(100):
        gated.beat(float(now), beat(now, 1, True, running=0))
        assert gated.wrong(float(now)) is None

    slow = Health(config, 0.0)
    for now in range(0, 100, 2):
        slow.beat(float(now), beat(now // 8, now // 8, True, running=1))
        assert slow.wrong(float(now)) is None, "a step may take a while"


def test_the_pause_grows_and_ends_and_begins_anew():
    backoff = Backoff(SupervisorConfig(backoff_s=1.0, backoff_max_s=5.0, give_up=5, stable_s=60.0))
    assert [backoff.failed(0.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.failed(0.0) is None
    assert backoff.failed(61.0) == 1.0 and backoff.failed(0.0) == 2.0


def test_exit_codes_are_told_in_words():
    assert told(-9) == "killed by SIGKILL" and told(4) == "exit code 4 (engine)" and told(77) == "exit code 77"
    assert told(-99) == "killed by signal 99" and as_shell(-15) == 143 and as_shell(3) == 3


def test_orphans_that_are_handed_over_are_reaped_and_own_children_are_left():
    own = subprocess.Popen([sys.executable, "-c", ""])
    eventually_zombie(own.pid)
    reap_strangers({own.pid})
    assert own.wait(WAIT_S) == 0
    pids = [os.posix_spawn(sys.executable, [sys.executable, "-c", ""], dict(os.environ)) for _ in range(3)]
    for pid in pids:
        eventually_zombie(pid)
    reap_strangers(set())
    assert not any((Path("/proc") / str(pid)).exists() for pid in pids)
    reap_strangers(set())


def eventually_zombie(pid: int) -> None:
    end = time.monotonic() + WAIT_S
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_negative_times_are_refused():
    with pytest.raises(ConfigError, match=r"supervisor\.drain_s"):
        SupervisorConfig(drain_s=-1.0)


@pytest.mark.long
def test_half_a_minute_of_engines_killed_and_stopped_at_random_loses_no_text(server):
    one = server(step_s=0.004, blocks=800, supervisor={"give_up": 1000, "silence_s": 0.8, "backoff_max_s": 1.0})
    one.until_ready()
    chance = random.Random(11)
    asks = [
        {"prompt": [n, 1, 2], "max_tokens": 20 + 3 * n, "temperature": float(n % 2), "seed": n, "n": 1 + n % 3}
        for n in range(12)
    ]
    wants = [truths(one, ask) for ask in asks]
    fds = len(os.listdir(f"/proc/{one.pid('null_api')}/fd"))
    end = time.monotonic() + 30.0
    rounds = lost = 0
    while time.monotonic() < end:
        connections = [one.connect() for _ in asks]
        for connection, ask in zip(connections, asks, strict=True):
            connection.say(ask)
        for _ in range(chance.randrange(3)):
            time.sleep(chance.uniform(0.0, 0.3))
            engine = one.children().get("null_process")
            if engine is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        for connection, ask, want in zip(connections, asks, wants, strict=True):
            got, ends = everything(connection, ask["n"])
            if "error" in ends or any("EngineAway" in why for why in ends):
                lost += 1  # it met three losses, or was asked while there was no engine: it says so
            else:
                assert got == want
            connection.close()
        one.until_ready()
        rounds += 1
    assert rounds > 5 and lost < rounds * len(asks) / 4
    one.until(lambda: len(os.listdir(f"/proc/{one.pid('null_api')}/fd")) == fds, "no descriptor is left open")
    one.signal(signal.SIGTERM)
    assert one.wait() == Exit.DONE


def everything(connection: Connection, outputs: int) -> tuple[list[list[int]], list[str]]:
    """The tokens of every output, and how each ended; or the one error."""
    tokens: list[list[int]] = [[] for _ in range(outputs)]
    ends: list[str] = []
    while len(ends) < outputs:
        line = connection.line()
        if "error" in line:
            return tokens, [line["error"]]
        tokens[line["index"]] += line["tokens"]
        if line["finish"] is not None:
            ends.append(line["finish"])
    return tokens, ends


def truths(server: Server, ask: dict[str, Any]) -> list[list[int]]:
    connection = server.connect()
    connection.say(ask)
    tokens, ends = everything(connection, ask["n"])
    connection.close()
    assert set(ends) == {"length"}
    return tokens
