"""Files and batches: nothing is lost, nothing is done twice, and nobody sees what is another's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_bench import ENDPOINT, Bench, as_lines, echo, request

from millstream.core.errors import BadFile, BadRequest, ConfigError
from millstream.serve.batch_lines import Answer, BatchLimits, LineError, parse_line
from millstream.serve.files import FileLimits, TooLarge, expiry, new_id
from millstream.serve.store import DiskTrouble, Store


def go(work, timeout_s: float = 30.0):
    async def bounded():
        async with asyncio.timeout(timeout_s):
            return await work

    return asyncio.run(bounded())


# -- a whole batch


def test_a_batch_is_answered_line_by_line(tmp_path):
    async def work():
        async with Bench(tmp_path) as bench:
            batch_id = await bench.submit(request("x", "one"), request("y", "bad"), b"", request("z", "three"))
            batch = await bench.until(batch_id, "completed")
            good, wrong = bench.rows(batch.output_file_id), bench.rows(batch.error_file_id)
            out = await bench.files.get("a", batch.output_file_id)
        return batch, good, wrong, out

    batch, good, wrong, out = go(work())
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    assert [row["custom_id"] for row in good] == ["x", "z"] and [row["custom_id"] for row in wrong] == ["y"]
    assert good[0]["response"]["status_code"] == 200 and good[0]["response"]["body"] == {"said": "one", "owner": "a"}
    assert good[0]["error"] is None and good[0]["id"].startswith("batch_req_")
    assert good[0]["response"]["request_id"].startswith("req_")
    assert wrong[0]["response"]["body"]["error"]["param"] == "messages" and wrong[0]["response"]["status_code"] == 400
    assert out.purpose == "batch_output" and out.bytes > 0
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at - batch.created_at == 86_400


@pytest.mark.parametrize(
    "rows, line, code",
    [
        ([request("a"), b"{nonsense"], 2, "invalid_json_line"),
        ([request("a"), b"\xff\xfe"], 2, "invalid_json_line"),
        ([b'{"custom_id": "a", "url": "/", "body": ' + b"[" * 900 + b"]" * 900 + b"}"], 1, "invalid_request_line"),
        ([b"[1]"], 1, "invalid_request_line"),
        ([{"custom_id": "a", "url": ENDPOINT}], 1, "invalid_request_line"),
        ([request("a"), request("b"), request("a")], 3, "duplicate_custom_id"),
        ([request("a", url="/v1/files")], 1, "mismatched_url"),
        ([request("a", method="GET")], 1, "invalid_method"),
        ([request("")], 1, "invalid_custom_id"),
        ([request("a" * 600)], 1, "invalid_custom_id"),
        ([request(7)], 1, "invalid_request_line"),
        ([request("a", body=[1])], 1, "invalid_request_line"),
        ([request("a", body={"stream": True})], 1, "invalid_request_line"),
        ([request("a"), request("b", "x" * 3000)], 2, "line_too_long"),
        ([request(f"c{i}") for i in range(9)], None, "too_many_requests"),
        ([], None, "empty_file"),
    ],
)
def test_wrong_lines_fail_the_batch_with_their_numbers(tmp_path, rows, line, code):
    async def work():
        async with Bench(tmp_path, limits=BatchLimits(requests=8, line_bytes=2000)) as bench:
            return await bench.until(await bench.submit(*rows), "failed")

    batch = go(work())
    assert [(one.line, one.code) for one in batch.errors.data] == [(line, code)]
    assert batch.output_file_id is None and batch.request_counts.completed == 0


def test_every_wrong_line_is_told_up_to_a_limit(tmp_path):
    async def work():
        async with Bench(tmp_path, limits=BatchLimits(errors=5)) as bench:
            return await bench.until(await bench.submit(*[b"x"] * 20), "failed")

    assert [one.line for one in go(work()).errors.data] == [1, 2, 3, 4, 5]


def test_an_endless_line_is_never_held(tmp_path):
    """100 MB without a line break: read past in pieces."""
    import resource

    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(as_lines(request("a")))
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + as_lines(request("b")))
    from millstream.serve.batch_lines import check_file

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, errors = check_file(path, ENDPOINT, BatchLimits())
    assert count == 3 and [(one.line, one.code) for one in errors] == [(2, "line_too_long")]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kilobytes


def test_a_param_of_a_line_is_named():
    found = parse_line(b'{"custom_id": "a", "url": "/x"}', 1)
    assert isinstance(found, LineError) and found.param == "body"


# -- whose it is


def test_keys_see_only_what_is_theirs(tmp_path):
    async def work():
        async with Bench(tmp_path) as bench:
            mine = await bench.upload(as_lines(request("a")), "a")
            with pytest.raises(BadRequest, match="input_file_id"):
                await bench.batches.create("b", mine.id, ENDPOINT)
            batch = await bench.batches.create("a", mine.id, ENDPOINT)
            done = await bench.until(batch.id, "completed")
            assert await bench.files.get("b", mine.id) is None
            assert await bench.files.get("b", done.output_file_id) is None
            assert await bench.batches.get("b", batch.id) is None
            assert await bench.batches.cancel("b", batch.id) is None
            assert not await bench.files.delete("b", mine.id)
            assert (await bench.files.listed("b"))[0] == [] and (await bench.batches.listed("b"))[0] == []
            with pytest.raises(BadRequest, match="after"):
                await bench.files.listed("b", after=mine.id)
            assert await bench.files.get("a", mine.id) is not None

    go(work())


def test_ids_cannot_be_guessed_and_names_are_labels(tmp_path):
    assert len({new_id("file-") for _ in range(1000)}) == 1000 and len(new_id("")) == 32

    async def work():
        async with Bench(tmp_path) as bench:
            found = await bench.upload(b"x", name="../../etc/\npass\x1b[31mwd")
            assert found.filename == "_pass_[31mwd" and bench.files.path(found.id).parent == tmp_path / "files"

    go(work())


def test_lists_come_in_pages(tmp_path):
    async def work():
        async with Bench(tmp_path) as bench:
            ids = [(await bench.upload(b"x", purpose="evals" if i % 2 else "batch")).id for i in range(7)]
            page, more = await bench.files.listed("a", limit=3)
            assert [one.id for one in page] == ids[::-1][:3] and more
            page, more = await bench.files.listed("a", limit=9, after=ids[4])
            assert [one.id for one in page] == ids[:4][::-1] and not more
            page, _ = await bench.files.listed("a", desc=False, purpose="evals")
            assert [one.id for one in page] == ids[1::2]

    go(work())


# -- limits


def test_files_have_limits_of_number_and_size(tmp_path):
    async def work():
        async with Bench(tmp_path, file_limits=FileLimits(owner_bytes=100, owner_files=3)) as bench:
            await bench.upload(b"x" * 60)
            with pytest.raises(TooLarge, match="bytes"):
                await bench.upload(b"x" * 60)
            await bench.upload(b"x" * 60, "b")
            small = [await bench.upload(b"x") for _ in range(2)]
            with pytest.raises(TooLarge, match="files"):
                await bench.upload(b"x")
            assert await bench.files.delete("a", small[0].id)
            await bench.upload(b"x")
        left = sorted(path.name for path in (tmp_path / "files").iterdir())
        assert len(left) == 4 and not any(name.endswith(".part") for name in left)

    go(work())


def test_results_are_kept_even_when_a_key_has_no_room_left(tmp_path):
    async def work():
        lines = as_lines(request("a"))
        async with Bench(tmp_path, file_limits=FileLimits(owner_bytes=len(lines), owner_files=1)) as bench:
            batch = await bench.until(await bench.submit(request("a")), "completed")
            assert len(bench.rows(batch.output_file_id)) == 1

    go(work())


def test_files_end_when_they_were_to_end(tmp_path):
    now = [1000.0]

    async def work():
        async with Bench(tmp_path, clock=lambda: now[0]) as bench:
            draft = bench.files.begin()
            draft.write(b"x")
            short = await bench.files.keep(draft, "a", "batch", "f", expiry("created_at", "3600"))
            long = await bench.upload(b"y")
            now[0] += 3601
            assert await bench.files.get("a", short.id) is None and await bench.files.get("a", long.id) is not None
            assert not bench.files.path(short.id).exists()

    go(work())
    for anchor, seconds in (("modified_at", 3600), ("created_at", 5), ("created_at", "x"), (None, 3600)):
        with pytest.raises(BadRequest, match="expires_after"):
            expiry(anchor, seconds)


def test_wrong_batches_are_refused(tmp_path):
    async def work():
        async with Bench(tmp_path) as bench:
            file, other = await bench.upload(as_lines(request("a"))), await bench.upload(b"x", purpose="evals")
            for wrong, param in (
                (("a", file.id, "/v1/other"), "endpoint"),
                (("a", "file-x", ENDPOINT), "input_file_id"),
                (("a", other.id, ENDPOINT), "input_file_id"),
                (("a", file.id, ENDPOINT, "24"), "completion_window"),
                (("a", file.id, ENDPOINT, "900d"), "completion_window"),
                (("a", file.id, ENDPOINT, "24h", {"k" * 65: "v"}), "metadata"),
                (("a", file.id, ENDPOINT, "24h", {str(i): "v" for i in range(17)}), "metadata"),
            ):
                with pytest.raises(BadRequest, match=param):
                    await bench.batches.create(*wrong)
            await bench.files.delete("a", file.id)
            with pytest.raises(BadRequest, match="input_file_id"):
                await bench.batches.create("a", file.id, ENDPOINT)

    go(work())


# -- ends


def test_a_cancelled_batch_keeps_what_it_has(tmp_path):
    ended = []

    async def slow(endpoint, body, owner, label):
        if b"fast" not in body:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                ended.append(label)
                raise
        return await echo(endpoint, body, owner, label)

    async def work():
        async with Bench(tmp_path, slow, at_once=3) as bench:
            batch_id = await bench.submit(request("a", "fast"), *(request(f"b{i}") for i in range(5)))
            while (await bench.batches.get("a", batch_id)).request_counts.completed < 1:
                await asyncio.sleep(0.005)
            first = await bench.batches.cancel("a", batch_id)
            await bench.batches.cancel("a", batch_id)
            batch = await bench.until(batch_id, "cancelled")
            again = await bench.batches.cancel("a", batch_id)
            return first, batch, again, bench.rows(batch.output_file_id), bench.batches.num_running

    first, batch, again, rows, _ = go(work())
    assert first.status == "cancelling" and again.status == "cancelled" and batch.cancelled_at is not None
    assert [row["custom_id"] for row in rows] == ["a"] and batch.request_counts.completed == 1
    assert len(ended) == 3  # those that were under way were ended, no further ones begun


def test_an_expired_batch_says_what_was_not_answered(tmp_path):
    started = time.time()

    async def slow(endpoint, body, owner, label):
        await asyncio.sleep(0 if b"fast" in body else 30)
        return await echo(endpoint, body, owner, label)

    async def work():
        # 60 seconds of a batch's time pass in 0.6.
        clock = lambda: started + (time.time() - started) * 100  # noqa: E731
        async with Bench(tmp_path, slow, at_once=1, clock=clock) as bench:
            timeout = asyncio.timeout
            asyncio.timeout = lambda seconds: timeout(seconds / 100)
            try:
                batch_id = await bench.submit(request("a", "fast"), request("b"), request("c"), window="1m")
                batch = await bench.until(batch_id, "expired", timeout_s=2000)
            finally:
                asyncio.timeout = timeout
            return batch, bench.rows(batch.output_file_id), bench.rows(batch.error_file_id)

    batch, good, late = go(work())
    assert [row["custom_id"] for row in good] == ["a"] and [row["custom_id"] for row in late] == ["b", "c"]
    assert {row["error"]["code"] for row in late} == {"batch_expired"} and batch.expired_at is not None


def test_a_server_that_has_no_moment_is_asked_again(tmp_path):
    said = iter([429, 503, 200])

    async def busy(endpoint, body, owner, label):
        status = next(said)
        return await echo(endpoint, body, owner, label) if status == 200 else Answer(status, b"{}", label)

    async def work():
        async with Bench(tmp_path, busy) as bench:
            return await bench.until(await bench.submit(request("a")), "completed")

    assert go(work()).request_counts.completed == 1


def test_an_answer_that_raises_fails_its_line_alone(tmp_path):
    async def broken(endpoint, body, owner, label):
        if b"boom" in body:
            raise RuntimeError("a secret path")
        return await echo(endpoint, body, owner, label)

    async def work():
        async with Bench(tmp_path, broken) as bench:
            batch = await bench.until(await bench.submit(request("a", "boom"), request("b")), "completed")
            return batch, bench.rows(batch.error_file_id)

    batch, (row,) = go(work())
    assert batch.request_counts.completed == 1 and row["response"]["status_code"] == 500
    assert "secret" not in json.dumps(row)


def test_a_file_that_was_deleted_fails_the_batch(tmp_path):
    async def work():
        async with Bench(tmp_path, num_batches=1) as bench:
            file = await bench.upload(as_lines(request("a")))
            batch = await bench.batches.create("a", file.id, ENDPOINT)
            bench.files.path(file.id).unlink()
            return await bench.until(batch.id, "failed", "completed")

    assert go(work()).errors.data[0].code == "file_not_found"


def test_lines_of_all_keys_get_their_turn(tmp_path):
    """One key has ten batches of many lines; another's single one does not wait for their end."""
    order = []

    async def slow(endpoint, body, owner, label):
        await asyncio.sleep(0.002)
        order.append(owner)
        return await echo(endpoint, body, owner, label)

    async def work():
        async with Bench(tmp_path, slow, at_once=2, num_batches=2) as bench:
            for _ in range(10):
                await bench.submit(*(request(f"c{i}") for i in range(40)), owner="greedy")
            small = await bench.submit(*(request(f"c{i}") for i in range(10)), owner="small")
            await bench.until(small, "completed", owner="small")

    go(work())
    assert Counter(order)["greedy"] < 200


# -- what happens to processes and disks


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    """kill -9 at several moments: every line has one result, and none that was committed is done again."""
    log, count = tmp_path / "log", 60
    folder = tmp_path / "state"
    command = [sys.executable, str(Path(__file__).with_name("batch_bench.py")), str(folder), str(log), str(count)]
    for lines in (5, 25, 45):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            end = time.monotonic() + 30
            while (len(log.read_text().splitlines()) if log.exists() else 0) < lines and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    batch_id = done.stdout.strip()

    async def work():
        async with Bench(folder) as bench:
            batch = await bench.batches.get("a", batch_id)
            return batch, bench.rows(batch.output_file_id)

    batch, rows = go(work())
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(count)]
    assert [row["response"]["body"]["said"] for row in rows] == [f"line {i}" for i in range(count)]
    assert batch.request_counts.completed == count and batch.error_file_id is None
    said = Counter(log.read_text().splitlines())
    # Two lines are under way at a time: only these can be done again after each of three kills.
    assert set(said) == {f"line {i}" for i in range(count)} and sum(said.values()) <= count + 6


def test_a_full_disk_stops_a_batch_until_there_is_room(tmp_path):
    """SQLite says that the disk is full after a few results; later it is not."""

    async def long(endpoint, body, owner, label):
        return Answer(200, json.dumps({"text": "y" * 20_000}).encode(), label)

    async def work():
        async with Bench(tmp_path, long, at_once=2) as bench:
            pages = (await bench.store.run(lambda db: db.execute("PRAGMA page_count").fetchone()))[0]
            await bench.store.run(lambda db: None)
            await asyncio.get_running_loop().run_in_executor(
                bench.store._thread, lambda: bench.store._db.execute(f"PRAGMA max_page_count = {pages + 30}").fetchone()
            )
            batch_id = await bench.submit(*(request(f"c{i}") for i in range(30)))
            async with asyncio.timeout(10):
                while not bench.batches.paused:
                    await asyncio.sleep(0.005)
            stuck = await bench.batches.get("a", batch_id)
            await asyncio.sleep(0.2)
            later = await bench.batches.get("a", batch_id)
            assert stuck.status == "in_progress" and later.paused and "written" in later.paused
            assert later.request_counts.completed == stuck.request_counts.completed < 30
            with pytest.raises(DiskTrouble):
                await bench.store.run(
                    lambda db: db.execute("CREATE TABLE big AS SELECT zeroblob(9000000) AS x").fetchall()
                )
            await asyncio.get_running_loop().run_in_executor(
                bench.store._thread, lambda: bench.store._db.execute("PRAGMA max_page_count = 100000").fetchone()
            )
            batch = await bench.until(batch_id, "completed")
            assert batch.paused is None and not bench.batches.paused
            return bench.rows(batch.output_file_id)

    assert [row["custom_id"] for row in go(work())] == [f"c{i}" for i in range(30)]


def test_a_disk_that_refuses_the_output_file_is_tried_again(tmp_path, monkeypatch):
    import errno

    from millstream.serve import files

    refuse = [3]
    real = files.Draft.write

    def write(draft, data):
        if refuse[0]:
            refuse[0] -= 1
            with files.disk_trouble():
                raise OSError(errno.ENOSPC, "full")
        real(draft, data)

    async def work():
        async with Bench(tmp_path) as bench:
            file = await bench.upload(as_lines(request("a"), request("b")))
            monkeypatch.setattr(files.Draft, "write", write)
            batch = await bench.batches.create("a", file.id, ENDPOINT)
            batch = await bench.until(batch.id, "completed")
            return bench.rows(batch.output_file_id), sorted(path.name for path in bench.files.folder.iterdir())

    rows, names = go(work())
    assert [row["custom_id"] for row in rows] == ["a", "b"] and refuse == [0]
    assert not any(name.endswith(".part") for name in names)


def test_an_upload_that_the_disk_refuses_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE in a process of its own: the third megabyte is refused."""
    code = (
        "import asyncio, resource, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from batch_bench import Bench\n"
        "from millstream.serve.store import DiskTrouble\n"
        "async def main():\n"
        "    async with Bench(Path(sys.argv[1])) as bench:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))\n"
        "        draft = bench.files.begin()\n"
        "        try:\n"
        "            for _ in range(9): draft.write(b'x' * (1 << 20))\n"
        "        except DiskTrouble: draft.drop()\n"
        "        else: sys.exit('it was taken')\n"
        "        small = await bench.upload(b'fine')\n"
        "        assert [p.name for p in bench.files.folder.iterdir()] == [small.id]\n"
        "asyncio.run(main())\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s"), here], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_a_dead_process_left_half_written_is_removed(tmp_path):
    async def work():
        async with Bench(tmp_path) as bench:
            kept = await bench.upload(b"x")
            bench.files.begin().write(b"half")
            (bench.files.folder / new_id("file-")).write_bytes(b"moved, and then the process died")
        async with Bench(tmp_path) as bench:
            assert [path.name for path in bench.files.folder.iterdir()] == [kept.id]

    go(work())


def test_a_folder_has_one_server(tmp_path):
    store = Store(tmp_path)
    try:
        with pytest.raises(ConfigError, match=str(os.getpid())):
            Store(tmp_path)
    finally:
        store.close()
    store.close()
    Store(tmp_path).close()


def test_a_folder_that_holds_something_else_is_told(tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"not a database, but long enough to look like one" * 50)
    with pytest.raises(BadFile, match="no store"):
        Store(tmp_path)


def test_a_statement_is_whole_or_nothing(tmp_path):
    async def work():
        store = Store(tmp_path, "CREATE TABLE IF NOT EXISTS t (x INTEGER) STRICT;")

        def half(db):
            db.execute("INSERT INTO t VALUES (1)")
            raise KeyError("no")

        with pytest.raises(KeyError):
            await store.run(half)
        with pytest.raises(sqlite3.OperationalError):
            await store.run(lambda db: db.execute("SELECT * FROM nothing"))
        assert await store.run(lambda db: db.execute("SELECT count(*) FROM t").fetchone()) == (0,)
        store.close()

    go(work())
