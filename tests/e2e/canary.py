"""The canary oracle: what must hold after every bad input and fault, whatever was answered to it.

I1 a fixed request gives the same tokens as before. I2 processes, their files and the KV cache are as before within 5 s.
I3 a stream that runs beside it is not changed. I4 nothing but clear answers: no 5xx, no traceback, no path in a body.
I5 one terminal count a request. I6 `/health` and `/ready` tell the truth.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import httpx

SETTLE_S = 5.0
CANARY = {
    "prompt": "the mill by the stream",
    "temperature": 0,
    "max_tokens": 8,
    "ignore_eos": True,
    "return_token_ids": True,
}
LEAKS = re.compile(r"Traceback|File \"|/site-packages/|/src/millstream|0x[0-9a-f]{8,}|<[a-z_.]+ object at")


class Canary:
    """Over a server at `url` whose processes are `pids`; `headers` carry its key where it has keys."""

    def __init__(self, url: str, pids: list[int], headers: dict[str, str] | None = None) -> None:
        self.http = httpx.Client(base_url=url, timeout=30, headers=headers or {})
        self.pids = pids
        self.tokens = self._tokens()
        # The first requests open what stays open.
        for _ in range(3):
            self._tokens()
        self.fds, self.threads = self._fds(), self._threads()
        self.counted = self._counted()

    def close(self) -> None:
        self.http.close()

    def look(self, answers: list[tuple[int, str]], expected_requests: int | None = None) -> None:
        """Holds all invariants. `answers` are statuses and bodies of what was done."""
        for status, body in answers:
            assert status < 500 or status in (503, 504), (status, body[:300])
            assert not LEAKS.search(body), body[:500]
        assert self._tokens() == self.tokens, "the canary says something else"
        assert self.http.get("/health").status_code == 200 and self.http.get("/ready").status_code == 200
        end = time.monotonic() + SETTLE_S
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, left
        if expected_requests is not None:
            # The canary itself is one.
            found = self._counted()
            assert found == self.counted + expected_requests + 1, (found, self.counted, expected_requests)
        self.counted = self._counted()

    def _tokens(self) -> list[int]:
        answer = self.http.post("/v1/completions", json=CANARY)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def _left(self) -> str:
        """What is not as it was."""
        for pid in self.pids:
            if not os.path.exists(f"/proc/{pid}"):
                return f"process {pid} is gone"
        state = self.http.get("/playground/state").json()
        held = state["kv"]["used"] - state["kv"]["prefix"]
        if state["running"] or state["waiting"] or held > 0:
            return f"running {state['running']}, waiting {state['waiting']}, {held} blocks held"
        if self._fds() > self.fds + 2:
            return f"{self._fds()} files open, {self.fds} before"
        if self._threads() > self.threads + 4:
            return f"{self._threads()} threads, {self.threads} before"
        return ""

    def _fds(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids)

    def _threads(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids)

    def _counted(self) -> int:
        """Requests to generate that have ended, by the server's own count."""
        text = self.http.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("millstream_requests_total")]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def sse(text: str) -> list[Any]:
    """The events of a stream; [DONE] as that text."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            found.append("[DONE]" if block[6:] == "[DONE]" else json.loads(block[6:]))
    return found
