"""A server of canned answers on loopback, in a thread: what a load generator must get right, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Seen:
    """A request as it came in; `at` on the perf_counter clock."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


@dataclass(slots=True)
class Answer:
    """`pieces` are written `gap_s` apart after `wait_s`; a head without a length is chunked. `cut` ends it before."""

    pieces: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    gap_s: float = 0.0
    chunked: bool = True
    cut: bool = False


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def completion(tokens: int, gap_s: float = 0.0, wait_s: float = 0.0, num_prompt: int = 7) -> Answer:
    """A stream of `tokens` texts after an empty first event, then the usage."""
    texts = ["", *(f" w{i}" for i in range(tokens))]
    chunks = [event({"choices": [{"index": 0, "text": text, "finish_reason": None}]}) for text in texts]
    usage = {"prompt_tokens": num_prompt, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}}
    chunks.append(event({"choices": [], "usage": usage}))
    chunks.append(event(b"[DONE]"))
    return Answer(chunks, headers={"content-type": "text/event-stream; charset=utf-8"}, gap_s=gap_s, wait_s=wait_s)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(value).encode()
    return Answer([body], status, {"content-type": "application/json", "content-length": str(len(body)), **headers})


class CannedServer:
    """`answer(seen)` decides what each request gets; `seen` keeps them all, `most` is how many were open at once."""

    def __init__(self, answer: Callable[[Seen], Answer]) -> None:
        self._answer = answer
        self.seen: list[Seen] = []
        self.connections = self.open = self.most = 0
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        seen = Seen(method, path, headers, json.loads(raw) if raw else None, time.perf_counter())
        self.seen.append(seen)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            answer = as_json({"data": [{"id": "canned", "max_model_len": 4096}]}) if method == "GET" else None
            return await self._write(writer, answer or self._answer(seen))
        finally:
            self.open -= 1

    async def _write(self, writer: asyncio.StreamWriter, answer: Answer) -> bool:
        await asyncio.sleep(answer.wait_s)
        chunked = answer.chunked and "content-length" not in answer.headers
        headers = {**answer.headers, **({"transfer-encoding": "chunked"} if chunked else {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} So\r\n{lines}\r\n".encode())
        for place, piece in enumerate(answer.pieces):
            if place and answer.gap_s:
                await asyncio.sleep(answer.gap_s)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        if answer.cut:
            return False
        if chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return chunked or "content-length" in answer.headers


@contextlib.contextmanager
def serving(answer: Callable[[Seen], Answer]) -> Iterator[CannedServer]:
    server = CannedServer(answer)
    loop = asyncio.new_event_loop()
    up = threading.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server._serve, "127.0.0.1", 0, backlog=1024)
        server.port = listening.sockets[0].getsockname()[1]
        up.set()
        with contextlib.suppress(asyncio.CancelledError):
            await listening.serve_forever()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(main())
        loop.run_until_complete(task)
        for left in asyncio.all_tasks(loop):
            left.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(10)
