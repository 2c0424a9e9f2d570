"""A supervisor over the null engine and the null API: `python null_server.py FOLDER`, options in FOLDER/launch.json."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from millstream.config.load import build
from millstream.serve.supervisor import Supervisor, SupervisorConfig, write_launch

HERE = Path(__file__).parent
ENGINE, API = HERE.parent / "unit" / "engine" / "null_process.py", HERE / "null_api.py"


def main() -> int:
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    launch, socket = folder / "launch.json", folder / "run" / "engine.sock"
    options = json.loads(launch.read_text())

    def reload() -> None:
        write_launch(launch, {**options, "greeting": "read again"})

    given = ["--socket", str(socket), "--config", str(launch), "--parent", str(os.getpid())]
    supervisor = Supervisor(
        [sys.executable, str(ENGINE), *given],
        [sys.executable, str(API), *given],
        socket,
        build(SupervisorConfig, options.get("supervisor", {}), "supervisor"),
        reload,
    )
    return int(asyncio.run(supervisor.run()))


if __name__ == "__main__":
    sys.exit(main())
