"""The app as a whole: what a server says of itself, errors, overload, tenants, browsers, the admin's listener."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from millstream.core.errors import ConfigError
from millstream.core.request import Slo
from millstream.serve.app import App
from millstream.serve.auth import sealed
from millstream.serve.caller import Caller
from serving import AppServer, app_server, until

ALICE, BOB, ADMIN = "ms-" + "a" * 43, "ms-" + "b" * 43, "the-admins-key"
PAGE = "https://page.example"
TREE: dict[str, Any] = {
    "serve": {
        "auth": {"keys": [sealed(f"alice:{ALICE}"), sealed(f"bob:{BOB}")]},
        "admin": {"port": 0, "key": sealed(f"root:{ADMIN}")},
        "allowed_origins": [PAGE],
        "root_path": "/llm",
        "api": {"model_names": ["small", "org/small"]},
        "admission": {"queued_requests": 2},
    }
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(tmp_path_factory.mktemp("app"), TREE) as found:
        found.key = ALICE
        yield found


# -- what it says of itself


def test_it_lives_is_ready_and_computes(server: AppServer) -> None:
    assert server.get("/health").json == server.get("/ping").json == {"status": "ok"}
    assert server.get("/ready").json == {"status": "ready"}
    deep = server.get("/health/deep")
    assert deep.status == 200 and deep.json["status"] == "computed"
    assert server.ask("HEAD", "/health").body == b""


def test_its_model_by_all_names(server: AppServer) -> None:
    found = server.get("/v1/models").json["data"]
    assert [one["id"] for one in found[:2]] == ["small", "org/small"]
    assert {one["max_model_len"] for one in found} == {2048}
    assert server.get("/v1/models/org/small").json["id"] == "org/small"
    missing = server.get("/v1/models/smal")
    assert missing.status == 404 and "'small'" in missing.error["message"]
    assert missing.error["code"] == "model_not_found"
    assert server.chat(model="small").json["model"] == "small"


def test_version_and_load(server: AppServer) -> None:
    assert server.get("/version").json["version"]
    load = server.get("/load").json
    assert load["server_load"] == load["running"] == load["queued_requests"] == 0


def test_paths_below_the_root_path_are_the_same(server: AppServer) -> None:
    for prefix in ("", "/llm", "/llm/llm"):
        assert server.get(f"{prefix}/health").status == 200
    assert server.get("/llmhealth").status == 404


def test_the_description_of_the_api_is_one(server: AppServer) -> None:
    found = server.get("/openapi.json").json
    assert found["openapi"] == "3.1.0" and found["servers"] == [{"url": "/llm"}]
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/models/{model}", "/metrics"} <= set(found["paths"])
    assert not [path for path in found["paths"] if path.startswith("/admin")]
    names: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                names.append(node["$ref"].rpartition("/")[2])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(found)
    assert set(names) <= set(found["components"]["schemas"])
    chat = {**found["components"]["schemas"]["ChatAsk"], "components": found["components"]}
    jsonschema.validate({"messages": [{"role": "user", "content": "hi"}]}, chat)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"messages": "hi"}, chat)
    card = {**found["components"]["schemas"]["ModelList"], "components": found["components"]}
    jsonschema.validate(server.get("/v1/models").json, card)
    ids = [operation["operationId"] for path in found["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


# -- errors


def test_a_fault_of_ours_says_nothing_and_is_logged_once(
    server: AppServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*given: Any) -> Any:
        raise ZeroDivisionError("secret words of /some/path")

    monkeypatch.setattr(server.app.client, "load", broken)
    with caplog.at_level(logging.ERROR, "millstream"):
        answer = server.get("/load")
    assert answer.status == 500 and answer.error["code"] == "internal_error"
    assert "secret" not in answer.body.decode() and "Traceback" not in answer.body.decode()
    logged = [record for record in caplog.records if answer.headers["x-millstream-request-id"] in record.getMessage()]
    assert len(logged) == 1 and logged[0].exc_info


def test_errors_of_messages_have_anthropics_shape(server: AppServer) -> None:
    for answer in (
        server.with_key("").post("/v1/messages", {}),
        server.post("/v1/messages", {}),
        server.post("/v1/messages", b"x", headers={"Content-Type": "text/plain"}),
    ):
        assert answer.json["type"] == "error" and answer.json["error"]["message"], answer
        assert answer.json["request_id"] == answer.headers["x-request-id"]


def test_prompts_are_in_no_log(server: AppServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.chat("sesame words")
        server.post("/v1/chat/completions", {"messages": "sesame words"})
        server.post("/v1/completions", {"prompt": "sesame words", "max_tokens": -1})
        server.post("/v1/responses", {"model": "small", "input": "sesame words", "max_output_tokens": 3})
        server.get("/sesame%20words")
    assert caplog.records and "sesame" not in caplog.text
    assert "sesame" not in server.get("/metrics").body.decode()


# -- overload


def hold(server: AppServer, count: int) -> list[Any]:
    """Takes places in the queue that are never served."""
    caller = Caller("held", "alice")
    return server.call(lambda: [server.app.gate.enter(caller, 1, 1, Slo()) for _ in range(count)])


def test_a_full_queue_is_429_with_a_time_to_come_back(server: AppServer) -> None:
    places = hold(server, 2)
    try:
        before = len(server.records)
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/messages", {"model": "small", "max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"model": "small", "input": "a"}),
            ("/generate", {"token_ids": [5]}),
        ):
            answer = server.post(path, body)
            assert answer.status == 429, (path, answer)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert [record.shed for record in server.records[before:]] == ["queue_full"] * 5
        assert server.get("/v1/models").status == server.get("/ready").status == 200
    finally:
        server.call(lambda: [place.leave() for place in places])
    assert server.chat().status == 200


def test_a_429_costs_less_than_a_millisecond(server: AppServer) -> None:
    places = hold(server, 2)
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 10}).encode()
    headers = [
        (b"host", b"x"), (b"authorization", f"Bearer {ALICE}".encode()), (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]  # fmt: skip
    statuses: list[int] = []

    async def once() -> None:
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": headers, "root_path": "", "scheme": "http", "http_version": "1.1", "client": None,
            "server": None,
        }  # fmt: skip
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await server.app(scope, receive, send)

    async def many() -> float:
        began = time.thread_time()
        for _ in range(500):
            await once()
        return (time.thread_time() - began) / 500

    try:
        took_s = asyncio.run_coroutine_threadsafe(many(), server.loop).result(30)  # type: ignore[arg-type]
    finally:
        server.call(lambda: [place.leave() for place in places])
    assert set(statuses) == {429}
    assert took_s < 1e-3, took_s


# -- tenants


def test_what_one_tenant_has_another_does_not_see(server: AppServer) -> None:
    bob = server.with_key(BOB)
    form = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\nContent-Disposition: form-data; '
        b'name="file"; filename="a.jsonl"\r\n\r\n{"custom_id": "1", "method": "POST", "url": "/v1/completions", '
        b'"body": {"prompt": "a", "max_tokens": 2}}\r\n--x--\r\n'
    )
    kept = server.post("/v1/files", form, headers={"Content-Type": "multipart/form-data; boundary=x"}).json
    batch = server.post(
        "/v1/batches",
        {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"},
    ).json
    response = server.post("/v1/responses", {"model": "small", "input": "a", "max_output_tokens": 2}).json
    said = server.chat()
    paths = [
        f"/v1/files/{kept['id']}", f"/v1/files/{kept['id']}/content", f"/v1/batches/{batch['id']}",
        f"/v1/responses/{response['id']}", f"/v1/requests/{said.headers['x-millstream-request-id']}/timeline",
    ]  # fmt: skip
    for path in paths:
        assert server.get(path).status == 200, path
        assert bob.get(path).status == 404, path
    by_answer = server.get(f"/v1/requests/{said.json['id']}/timeline")
    assert by_answer.status == 200 and by_answer.json["id"] == said.headers["x-millstream-request-id"]
    assert bob.get("/v1/files").json["data"] == [] == bob.get("/v1/batches").json["data"]
    until(lambda: server.get(f"/v1/batches/{batch['id']}").json["status"] == "completed", "the batch")
    done = server.get(f"/v1/batches/{batch['id']}").json
    line = json.loads(server.get(f"/v1/files/{done['output_file_id']}/content").body)
    assert line["response"]["status_code"] == 200 and line["response"]["body"]["choices"]
    record = next(one for one in server.records if one.operation == "text_completion" and one.tenant == "alice")
    assert record.route == "/v1/completions"


def test_tenants_do_not_share_cached_prefixes(server: AppServer) -> None:
    """Nor can one name the salt of another."""
    text = "a text that is long enough to fill some blocks of the cache " * 3
    bob = server.with_key(BOB)

    def cached(client: Any, **given: Any) -> int:
        answer = client.chat(text, **given).json
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    server.admin(ADMIN).post("/admin/cache/reset")
    assert cached(server) < 10
    assert cached(server) > 100
    assert cached(bob) < 10
    assert cached(bob) > 100
    assert cached(bob, cache_salt=server.app.salts.of("alice")) < 10
    assert server.app.salts.of("alice") != server.app.salts.of("bob")


# -- browsers


def test_pages_of_allowed_origins_may_ask(server: AppServer) -> None:
    ahead = server.with_key("").ask(
        "OPTIONS", "/v1/chat/completions",
        headers={
            "Origin": PAGE, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )  # fmt: skip
    assert ahead.status == 200 and ahead.headers["access-control-allow-origin"] == PAGE
    for client in (server, server.with_key("")):
        assert client.get("/v1/models", headers={"Origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    other = server.ask(
        "OPTIONS", "/v1/models", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    )
    assert other.status == 400 and "access-control-allow-origin" not in other.headers


# -- the admin's listener


def test_the_admin_listener(server: AppServer) -> None:
    admin = server.admin(ADMIN)
    shown = admin.get("/admin/config").body.decode()
    assert "alice:***" in shown and "sha256" not in shown and "scrypt" not in shown
    server.chat("something that is kept in the cache for a while")
    assert admin.post("/admin/cache/reset").json["free_blocks"] > 0
    said = server.chat()
    assert admin.get(f"/admin/requests/{said.headers['x-millstream-request-id']}/timeline").status == 200
    level = logging.getLogger("millstream").level
    assert admin.post("/admin/log-level", {"level": "debug"}).json == {"logger": "millstream", "level": "debug"}
    logging.getLogger("millstream").setLevel(level)
    assert admin.post("/admin/log-level", {"level": "loud"}).status == 400
    assert admin.post("/admin/log-level", {"level": "info", "logger": "root"}).status == 400
    assert admin.get("/health").status == 404, "it has nothing but its own"
    assert server.with_key(ADMIN).get("/v1/models").status == 401
    assert server.admin(ALICE).get("/admin/config").status == 401


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": PAGE}, {"Origin": "http://localhost:1"}])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_browsers_have_no_business_there(server: AppServer, method: str, headers: dict[str, str]) -> None:
    assert server.admin(ADMIN).ask(method, "/admin/config", headers=headers).status in (403, 421)


def test_draining_refuses_what_is_new(server: AppServer) -> None:
    assert server.admin(ADMIN).post("/admin/drain").status == 202
    assert server.stopped.wait(5)
    server.draining = True
    try:
        assert server.get("/ready").status == 503 and server.get("/ready").json == {"status": "draining"}
        assert server.get("/health").status == 200
        answer = server.chat()
        assert answer.status == 503 and answer.error["code"] == "draining" and int(answer.headers["retry-after"]) > 0
    finally:
        server.draining = False
    assert server.chat().status == 200


# -- being told anew, and being told wrong


def test_keys_are_exchanged_while_it_runs(server: AppServer) -> None:
    fresh = "ms-" + "c" * 43
    tree = json.loads(json.dumps(server.tree))
    tree["serve"]["auth"]["keys"] = [sealed(f"alice:{fresh}")]
    server.call(lambda: server.app.reload(tree))
    try:
        assert server.get("/v1/models").status == 401
        assert server.with_key(fresh).get("/v1/models").status == 200
        with pytest.raises(ConfigError):
            bad = {"serve": {"auth": {"keys": ["short"]}}}
            server.call(lambda: server.app.reload(bad))
        assert server.with_key(fresh).get("/v1/models").status == 200
    finally:
        server.call(lambda: server.app.reload(server.tree))
    assert server.get("/v1/models").status == 200


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"host": "0.0.0.0"}, "no API keys"),
        ({"host": "::"}, "--allow-unauthenticated"),
        ({"prot": 1}, "the nearest is 'serve.port'"),
        ({"port": 70_000}, "serve.port"),
        ({"admin": {"port": 0}}, "serve.admin.key"),
        ({"limits": {"body_bytes": 0}}, "serve.limits.body_bytes"),
        ({"admission": {"max_wait_s": -1}}, "serve.admission.max_wait_s"),
        ({"allowed_origins": ["page.example"]}, "serve.allowed_origins"),
        ({"root_path": "llm/"}, "serve.root_path"),
        ({"tls": {"keyfile": "x"}}, "serve.tls.certfile"),
        ({"auth": {"keys": ["short"]}}, "an API key has"),
    ],
)
def test_a_wrong_configuration_is_said_before_anything_is_opened(
    tmp_path: Path, serve: dict[str, Any], said: str
) -> None:
    tree = {"serve": {"folder": str(tmp_path / "store"), **serve}}
    with pytest.raises(ConfigError, match=said):
        App(None, tree)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_two_servers_do_not_share_a_folder(server: AppServer) -> None:
    with pytest.raises(ConfigError, match="belongs to another server"):
        App(None, {"serve": {"folder": server.tree["serve"]["folder"]}})  # type: ignore[arg-type]
