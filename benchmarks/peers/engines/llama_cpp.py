"""llama.cpp's server over the GGUF file itself; requests go to its own port on the loopback address."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peers.protocol import die_with_parent, imported, serve

LIMIT_S = 600


class LlamaCpp:
    def __init__(self, setup: Mapping[str, Any]) -> None:
        imported()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        batch, threads = setup["max_batch"], str(setup["threads"])
        command = [setup["binary"], "--model", setup["path"], "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--threads", threads, "--threads-batch", threads, "--parallel", str(batch)]
        command += ["--ctx-size", str(batch * setup["max_context"]), "--batch-size", "2048", "--ubatch-size", "512"]
        command += ["--flash-attn", "on", "--cache-ram", "0", "--no-webui"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent
        )
        self._pool = ThreadPoolExecutor(batch)
        self._wait()
        said = subprocess.run([setup["binary"], "--version"], capture_output=True, text=True, check=False)
        version = next((line for line in (said.stderr + said.stdout).splitlines() if "version" in line), "")
        self.told = {
            "engine": "llama.cpp",
            "version": version.removeprefix("version: ") or "unknown",
            "precision": "as the GGUF file stores them, activations int8",
            "set": "server, flash attention, KV float16, ubatch 512",
        }

    def _wait(self) -> None:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._server.returncode}")
            try:
                if self._call("GET", "/health").get("status") == "ok":
                    return
            except (OSError, http.client.HTTPException, ValueError):
                pass
            time.sleep(0.02)
        raise RuntimeError(f"llama-server was not ready in {LIMIT_S} s")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT_S)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer and method == "POST":
            raise RuntimeError(str(answer["error"])[:300])
        return answer

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        def one(ids: Sequence[int]) -> list[int]:
            body = {
                "prompt": list(ids),
                "n_predict": output_len,
                "temperature": 0.0,
                "top_k": 1,
                "samplers": ["top_k"],
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
            }
            return list(self._call("POST", "/completion", body)["tokens"])

        return list(self._pool.map(one, prompts))

    def close(self) -> None:
        self._pool.shutdown()
        self._server.terminate()
        self._server.wait(20)


if __name__ == "__main__":
    os.environ.setdefault("LLAMA_LOG_COLORS", "off")
    sys.exit(serve(LlamaCpp))
