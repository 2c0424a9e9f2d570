"""Files and batches over HTTP, without a model: forms cut anywhere, limits before memory, keys apart."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from batch_bench import ENDPOINT, Bench, as_lines, request
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from millstream.core.errors import BadRequest, UnknownName
from millstream.serve.batch_routes import routes
from millstream.serve.files import FileLimits, TooLarge
from millstream.serve.upload import read_upload


def told(status):
    async def handler(request, error):
        return JSONResponse({"error": str(error), "param": getattr(error, "param", None)}, status)

    return handler


def run(folder, work, **given):
    """`work(bench, client)` against the routes; the header `owner` says whose request it is."""

    async def go():
        async with Bench(folder, **given) as bench:
            app = Starlette(
                routes=routes(bench.files, bench.batches, lambda one: one.headers.get("owner", "a")),
                exception_handlers={BadRequest: told(400), UnknownName: told(404), TooLarge: told(413)},
            )
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await work(bench, client)

    return asyncio.run(go())


def test_a_file_and_a_batch_from_upload_to_result(tmp_path):
    async def work(bench, client):
        lines = as_lines(request("x", "one"), request("y", "bad"))
        answer = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", lines)})
        assert answer.status_code == 200, answer.text
        file = answer.json()
        assert file["object"] == "file" and file["bytes"] == len(lines) and file["filename"] == "in.jsonl"
        assert (await client.get(f"/v1/files/{file['id']}")).json() == file
        assert (await client.get(f"/v1/files/{file['id']}/content")).content == lines
        ask = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h", "metadata": {"k": "v"}}
        batch = (await client.post("/v1/batches", json=ask)).json()
        assert batch["status"] == "validating" and batch["metadata"] == {"k": "v"} and batch["object"] == "batch"
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.005)
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        out = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text
        assert json.loads(out)["custom_id"] == "x"
        listed = (await client.get("/v1/batches")).json()
        assert [one["id"] for one in listed["data"]] == [batch["id"]] and listed["has_more"] is False
        files = (await client.get("/v1/files", params={"limit": 2})).json()
        assert len(files["data"]) == 2 and files["has_more"] and files["last_id"] == files["data"][1]["id"]
        rest = (await client.get("/v1/files", params={"after": files["last_id"]})).json()
        assert [one["id"] for one in rest["data"]] == [file["id"]]
        assert (await client.delete(f"/v1/files/{file['id']}")).json()["deleted"] is True
        assert (await client.get(f"/v1/files/{file['id']}")).status_code == 404
        for path in (f"/v1/files/{batch['output_file_id']}", f"/v1/batches/{batch['id']}"):
            assert (await client.get(path, headers={"owner": "b"})).status_code == 404
        cancelled = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert cancelled.status_code == 200 and cancelled.json()["status"] == "completed"

    run(tmp_path, work)


@pytest.mark.parametrize(
    "fields, param",
    [({}, "purpose"), ({"purpose": "fun"}, "purpose"), ({"purpose": "batch", "expires_after[anchor]": "x"}, "expires")],
)
def test_fields_of_a_form_are_checked_and_nothing_is_left(tmp_path, fields, param):
    async def work(bench, client):
        answer = await client.post("/v1/files", data=fields, files={"file": ("f", b"x")})
        assert answer.status_code == 400 and param in answer.json()["param"]
        assert not list(bench.files.folder.iterdir())

    run(tmp_path, work)


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path):
    sent = [0]

    async def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while True:
            sent[0] += 1 << 16
            yield b"x" * (1 << 16)

    async def work(bench, client):
        with pytest.raises(TooLarge):
            await read_upload("multipart/form-data; boundary=b", endless(), bench.files.begin, 1 << 20)
        assert sent[0] <= (1 << 20) + (1 << 17) and not list(bench.files.folder.iterdir())
        answer = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"x" * 5000)})
        assert answer.status_code == 413

    run(tmp_path, work, file_limits=FileLimits(file_bytes=4000))


@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
def test_a_form_is_the_same_however_it_is_cut(tmp_path, size):
    content = bytes(range(256)) * 4 + b"\r\n--bound\r\n-"
    body = (
        b'--boundary\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--boundary\r\nContent-Disposition: form-data; name="file"; filename="\xc3\xa9.jsonl"\r\n'
        b"Content-Type: application/jsonl\r\n\r\n" + content + b"\r\n--boundary--\r\n"
    )

    async def pieces():
        for at in range(0, len(body), size):
            yield body[at : at + size]

    async def work(bench, client):
        found = await read_upload("multipart/form-data; boundary=boundary", pieces(), bench.files.begin, 1 << 20)
        assert found.fields == {"purpose": "batch"} and found.filename == "é.jsonl"
        kept = await bench.files.keep(found.draft, "a", "batch", found.filename)
        assert bench.files.path(kept.id).read_bytes() == content

    run(tmp_path, work)


@pytest.mark.parametrize(
    "content_type, body",
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=b", b"no form at all"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx',
        ),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--b--\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 9000 + b"\r\n--b--\r\n",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="other"; filename="f"\r\n\r\nx\r\n--b--\r\n',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"A" * 20_000 + b": x\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b"".join(b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n' % i for i in range(50))
            + b"--b--\r\n",
        ),
    ],
)
def test_what_is_no_form_is_a_bad_request(tmp_path, content_type, body):
    async def work(bench, client):
        answer = await client.post("/v1/files", content=body, headers={"content-type": content_type})
        assert answer.status_code == 400, answer.text
        assert not list(bench.files.folder.iterdir())

    run(tmp_path, work)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999999999", "order=up", "after=file-nothing"])
def test_wrong_queries_are_bad_requests(tmp_path, query):
    async def work(bench, client):
        assert (await client.get(f"/v1/files?{query}")).status_code == 400

    run(tmp_path, work)
