"""A supervisor of an API process that has engines of its own: nobody but the supervisor hears whether it lives."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest

from millstream.engine.exits import Exit
from millstream.serve.supervisor import Supervisor, SupervisorConfig

# Beats as the API does, and stops when it is told to by a signal.
API = """
import os, signal, sys, time
pipe, pids = int(sys.argv[sys.argv.index("--beat-fd") + 1]), sys.argv[1]
hung = []
signal.signal(signal.SIGUSR1, lambda *_: hung.append(1))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(pids, "a") as out:
    out.write(f"{os.getpid()}\\n")
while True:
    if not hung:
        os.write(pipe, b".")
    time.sleep(0.05)
"""
CONFIG = SupervisorConfig(silence_s=0.6, backoff_s=0.05, drain_s=2.0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGSTOP])
def test_an_api_that_gives_no_sign_of_life_is_started_again(tmp_path, number):
    pids = tmp_path / "pids"

    def started():
        return [int(line) for line in pids.read_text().split()] if pids.exists() else []

    async def until(count):
        end = time.monotonic() + 15.0
        while len(started()) < count:
            assert time.monotonic() < end, started()
            await asyncio.sleep(0.02)

    async def test():
        supervisor = Supervisor(None, (sys.executable, "-c", API, str(pids)), tmp_path / "none", CONFIG)
        running = asyncio.create_task(supervisor.run())
        await until(1)
        before = len(os.listdir("/proc/self/fd"))
        await asyncio.sleep(1.5)
        assert len(started()) == 1, "one that beats is left alone"
        os.kill(started()[0], number)
        await until(2)
        await asyncio.sleep(1.0)
        assert len(started()) == 2 and len(os.listdir("/proc/self/fd")) == before
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(running, 10.0) == Exit.DONE

    asyncio.run(test())
