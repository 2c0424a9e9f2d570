"""A batch service over answers made here. As a program it runs one until it is killed: see test_batches.py."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from millstream.serve import batches as batches_module
from millstream.serve import files as files_module
from millstream.serve.batch_lines import Answer, BatchLimits
from millstream.serve.batches import Batches
from millstream.serve.files import FileLimits, FileObject, Files
from millstream.serve.store import Store

ENDPOINT = "/v1/chat/completions"


def request(custom_id: str, content: str = "hi", **changes: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **changes}


def as_lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


async def echo(endpoint: str, body: bytes, owner: str, label: str) -> Answer:
    """Says what it was asked; "bad" is refused."""
    said = json.loads(body)["messages"][0]["content"]
    if said == "bad":
        return Answer(400, json.dumps({"error": {"message": "no", "param": "messages"}}).encode(), label)
    return Answer(200, json.dumps({"said": said, "owner": owner}).encode(), label)


class Bench:
    """`async with Bench(folder) as bench`: a store, its files and its batches, started."""

    def __init__(
        self,
        folder: Path,
        execute: Callable[[str, bytes, str, str], Awaitable[Answer]] = echo,
        *,
        limits: BatchLimits | None = None,
        file_limits: FileLimits | None = None,
        **given: Any,
    ) -> None:
        self.store = Store(folder, files_module.SCHEMA, batches_module.SCHEMA)
        clock = {"clock": given["clock"]} if "clock" in given else {}
        self.files = Files(self.store, file_limits, **clock)
        self.batches = Batches(
            self.store,
            self.files,
            execute,
            (ENDPOINT, "/v1/completions"),
            limits=limits or BatchLimits(),
            retry_s=(0.01, 0.05),
            **given,
        )

    async def __aenter__(self) -> Bench:
        await self.files.start()
        await self.batches.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.batches.stop()
        self.store.close()

    async def upload(
        self, content: bytes, owner: str = "a", purpose: str = "batch", name: str = "in.jsonl"
    ) -> FileObject:
        draft = self.files.begin()
        draft.write(content)
        return await self.files.keep(draft, owner, purpose, name)

    async def submit(self, *rows: Any, owner: str = "a", **given: Any) -> str:
        file = await self.upload(as_lines(*rows), owner)
        return (await self.batches.create(owner, file.id, ENDPOINT, **given)).id

    async def until(self, batch_id: str, *statuses: str, owner: str = "a", timeout_s: float = 20.0) -> Any:
        async with asyncio.timeout(timeout_s):
            while True:
                batch = await self.batches.get(owner, batch_id)
                if batch.status in statuses:
                    return batch
                await asyncio.sleep(0.005)

    def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        return [json.loads(line) for line in self.files.path(file_id).read_bytes().splitlines()]


async def main(folder: Path, log: Path, count: int) -> None:
    """Answers a line every 10 ms and writes down which, so that a test sees what was done twice."""

    async def slow(endpoint: str, body: bytes, owner: str, label: str) -> Answer:
        await asyncio.sleep(0.01)
        answer = await echo(endpoint, body, owner, label)
        with log.open("a") as file:
            file.write(json.loads(body)["messages"][0]["content"] + "\n")
        return answer

    async with Bench(folder, slow, at_once=2) as bench:
        found, _ = await bench.batches.listed("a")
        batch_id = found[0].id if found else await bench.submit(*(request(f"c{i}", f"line {i}") for i in range(count)))
        await bench.until(batch_id, "completed", timeout_s=60)
        print(batch_id, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
