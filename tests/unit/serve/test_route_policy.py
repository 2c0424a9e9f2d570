"""Every route of the whole app has a policy, and none that holds data answers without a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.routing import Route

from millstream.core.errors import ConfigError
from millstream.serve.policy import POLICIES, Access, Policy, Table
from serving import AppServer, app_server

KEY, ADMIN = "ms-a-key-that-is-long-enough-for-a-test", "an-admin-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    tree = {"serve": {"auth": {"keys": [f"alice:{KEY}"]}, "admin": {"port": 0, "key": f"root:{ADMIN}"}}}
    with app_server(tmp_path_factory.mktemp("policy"), tree) as found:
        yield found


def entries() -> list[Any]:
    return sorted(POLICIES)


async def nothing(request: Any) -> Response:
    return Response()


def test_a_route_without_a_policy_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match=r"GET /new has no policy"):
        Table([Route("/new", nothing, methods=["GET"])])
    with pytest.raises(ConfigError, match=r"PUT /health has no policy"):
        Table([Route("/health", nothing, methods=["GET", "PUT"])])
    with pytest.raises(ConfigError, match="twice"):
        Table([Route("/health", nothing, methods=["GET"])] * 2)


def test_the_table_has_the_routes_that_there_are_and_no_others(server: AppServer) -> None:
    there = {*server.app.table.entries, *server.app.admin.table.entries}
    assert there == set(POLICIES)


def test_only_these_are_open() -> None:
    found = {f"{method} {path}" for (method, path), policy in POLICIES.items() if policy.access is Access.OPEN}
    assert found == {
        "GET /health", "GET /ready", "GET /ping", "POST /ping", "GET /", "GET /playground/{name}",
    }  # fmt: skip


def test_every_policy_says_what_it_takes_and_gives() -> None:
    for (method, path), policy in POLICIES.items():
        assert policy.summary and policy.media, (method, path)
        assert not (method == "GET" and policy.body.value != "none"), (method, path)


def test_the_admin_listener_has_the_admins_routes_and_the_other_has_none(server: AppServer) -> None:
    for (_, path), entry in server.app.admin.table.entries.items():
        assert entry.policy.access is Access.ADMIN, path
    for (_, path), entry in server.app.table.entries.items():
        assert entry.policy.access is not Access.ADMIN, path


@pytest.mark.parametrize(("method", "path"), entries())
def test_no_route_answers_without_a_key(server: AppServer, method: str, path: str) -> None:
    policy: Policy = POLICIES[(method, path)]
    asked = path.replace("{name}", "app.js").replace(":path", "").replace("{", "").replace("}", "")
    client = server.admin("") if policy.access is Access.ADMIN else server
    good, other = (ADMIN, KEY) if policy.access is Access.ADMIN else (KEY, ADMIN)
    if policy.access is Access.OPEN:
        assert client.ask(method, asked).status == 200
        return
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {good}"},
        {"Authorization": f"Bearer {good[:-1]}"},
        {"Authorization": f"Bearer {good}x"},
        {"Authorization": f"Bearer {other}"},
        {"X-Api-Key": good.upper()},
        {"Cookie": f"key={good}"},
    ):
        answer = client.ask(method, f"{asked}?api_key={good}&key={good}", headers=headers)
        assert answer.status == 401, (headers, answer)
        assert answer.headers["www-authenticate"].startswith("Bearer"), headers
        assert answer.json["error"]["type"] == "authentication_error"
        assert good not in answer.body.decode()
    if path != "/admin/drain":
        known = client.ask(method, asked, headers={"Authorization": f"bearer {good}"})
        assert known.status not in (401, 403), known
        assert known.status < 500, known


def test_what_is_not_there_is_not_told_to_strangers(server: AppServer) -> None:
    assert server.get("/v1/nothing").status == 401
    answer = server.with_key(KEY).get("/v1/modles")
    assert answer.status == 404 and "/v1/models" in answer.error["message"]
    answer = server.with_key(KEY).ask("PUT", "/v1/models")
    assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/v1/../health", "//health", "/%2e%2e/health", "/health%00", "/health/", "/HEALTH"])
def test_paths_are_taken_as_they_are(server: AppServer, path: str) -> None:
    assert server.with_key(KEY).get(path).status == 404


def test_the_tiny_model_is_in_its_own_folder(tmp_path: Path, server: AppServer) -> None:
    assert server.with_key(KEY).get("/v1/models").json["data"][0]["root"].endswith("tiny")
