"""Starts engine processes over the null runner, and sees to it that none is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NULL = Path(__file__).parent / "null_process.py"
WAIT_S = 20.0


class EngineProcess:
    """One engine process after the other at the same socket, in a folder of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.socket = folder / "run" / "engine.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.options = options

    def start(self, *arguments: str, **options: Any) -> EngineProcess:
        self.options |= options
        config = self.folder / "engine.json"
        config.write_text(json.dumps(self.options))
        self.log = (self.folder / "engine.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(NULL), "--socket", str(self.socket), "--config", str(config), *arguments],
            stderr=self.log,
            stdin=subprocess.DEVNULL,
        )
        self.log.close()
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def told(self) -> str:
        return (self.folder / "engine.log").read_text()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def eventually(check: Any, what: str, wait_s: float = WAIT_S) -> None:
    """Waits until `check()` holds."""
    end = time.monotonic() + wait_s
    while not check():
        assert time.monotonic() < end, f"not within {wait_s:g} s: {what}"
        time.sleep(0.01)
