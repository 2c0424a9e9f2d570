"""A request names the program that it is a call of: on every route, by field or header, apart by tenant, and policies
and routers see it."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from null_process import VOCABULARY, make_null
from starlette.applications import Starlette

from millstream.cluster.client import ClusterClient
from millstream.core import registry
from millstream.core.request import Program, SamplingParams, Slo
from millstream.core.request import Request as Ask
from millstream.engine.thread import AsyncEngine, EngineThread
from millstream.serve.caller import Caller
from millstream.serve.inside import NoGate, ask
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Observatory
from millstream.serve.openai.routes import routes
from millstream.serve.service import Service
from serving import AppServer, app_server, until

HEADER = "X-Millstream-Program"
KEYS = {name: f"the-key-of-{name}" for name in ("alice", "bob")}
TREE: dict[str, Any] = {
    "serve": {
        "auth": {"keys": [f"{name}:{key}" for name, key in KEYS.items()]},
        "api": {"model_names": ["small"]},
    }
}
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/messages": {"model": "small", "messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"model": "small", "input": "hi", "max_output_tokens": 1},
    "/generate": {"token_ids": [5], "max_tokens": 1},
    "/inference/v1/generate": {"token_ids": [5], "max_tokens": 1},
}
PLACE = {"id": "walk", "call": 3, "thread": 1, "stage": "plan", "parents": [0, 2], "service_s": 1.5}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    policies = {"sched": {"step_tokens": 256, "policies": ["autellix", "fcfs"]}}
    with app_server(tmp_path_factory.mktemp("programs"), TREE, **policies) as found:
        found.key = KEYS["alice"]
        yield found


@pytest.fixture
def server(served: Any) -> Iterator[Any]:
    client = served.llm.client
    served.asked = []

    def submit(request: Ask) -> Any:
        served.asked.append(request)
        return AsyncEngine.submit(client, request)

    client.submit = submit
    yield served
    del client.submit


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("given", "headers", "want"),
    [
        ("walk", {}, Program("alice\0walk")),
        ({"id": "walk"}, {}, Program("alice\0walk")),
        ({"id": "walk", "call": None, "stage": "", "parents": []}, {}, Program("alice\0walk", parents=())),
        (PLACE, {}, Program("alice\0walk", 3, 1, "plan", (0, 2), 1.5)),
        (None, {HEADER: "walk"}, Program("alice\0walk")),
        ("walk", {HEADER: "walk"}, Program("alice\0walk")),
        (PLACE, {HEADER: "walk"}, Program("alice\0walk", 3, 1, "plan", (0, 2), 1.5)),
        ("ein Weg über Süd", {}, Program("alice\0ein Weg über Süd")),
    ],
)
def test_every_route_takes_it_by_field_and_by_header(
    server: Any, path: str, given: Any, headers: dict[str, str], want: Program
) -> None:
    answer = server.post(path, {**BODIES[path], "program": given}, headers=headers)
    assert answer.status == 200, answer.body
    assert [one.program for one in server.asked] == [want]
    assert "x-millstream-warning" not in answer.headers


@pytest.mark.parametrize("path", BODIES)
def test_the_completion_line_names_it_as_the_client_did(
    server: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "millstream.serve.requests"):
        assert server.post(path, {**BODIES[path], "program": PLACE}).status == 200
        assert server.post(path, BODIES[path]).status == 200
        until(lambda: len(caplog.records) == 2)
    named, bare = (record.fields for record in caplog.records)  # type: ignore[attr-defined]
    assert (named["tenant"], named["program"], named["stage"]) == ("alice", "walk", "plan")
    # Answers that are kept are programs by themselves.
    assert "stage" not in bare and ("program" in bare) == ("responses" in path)


@pytest.mark.parametrize("path", BODIES)
def test_every_route_takes_wishes_beside_it(server: Any, path: str) -> None:
    """The deadline of a workflow is the wish of its calls for the whole."""
    wishes = {"ttft_s": 1.0, "tpot_s": 0.5, "e2e_s": 30.0, "deadline_s": 60.0}
    answer = server.post(path, {**BODIES[path], "program": "walk", "slo": wishes})
    assert answer.status == 200, answer.body
    assert [one.slo for one in server.asked] == [Slo(1.0, 0.5, 60.0, 30.0)]
    assert server.post(path, {**BODIES[path], "slo": {"e2e_s": 0}}).status == 400


@pytest.mark.parametrize("path", [path for path in BODIES if "messages" not in path])
def test_a_key_of_the_prompt_cache_is_an_affinity_of_the_tenants_own(server: Any, path: str) -> None:
    answer = server.post(path, {**BODIES[path], "prompt_cache_key": "docs"})
    assert answer.status == 200, answer.body
    assert server.post(path, BODIES[path]).status == 200
    assert [one.affinity for one in server.asked] == ["alice\0docs", ""]
    assert "x-millstream-warning" not in answer.headers
    for bad in ("", "k" * 257, "a\nb", "bob\0docs", 7):
        refused = server.post(path, {**BODIES[path], "prompt_cache_key": bad})
        assert (refused.status, refused.json["error"]["param"]) == (400, "prompt_cache_key")


def test_who_names_none_has_none(server: Any) -> None:
    for path, body in BODIES.items():
        assert server.post(path, {**body, "store": False} if "responses" in path else body).status == 200
    assert [one.program for one in server.asked] == [None] * len(BODIES)


def test_all_prompts_of_a_request_are_of_its_program(server: Any) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 1, "program": "walk"}
    assert server.post("/v1/completions", body).status == 200
    assert [one.program for one in server.asked] == [Program("alice\0walk")] * 3


def test_it_may_lie_among_sampling_params(server: Any) -> None:
    body = {"token_ids": [5], "sampling_params": {"max_tokens": 1, "program": PLACE}}
    assert server.post("/generate", body).status == 200
    assert server.asked[0].program == Program("alice\0walk", 3, 1, "plan", (0, 2), 1.5)


BAD: dict[str, tuple[Any, dict[str, str], str]] = {
    "an empty id": ("", {}, "program"),
    "an id without end": ("p" * 257, {}, "program"),
    "a number": (7, {}, "program"),
    "a list": (["walk"], {}, "program"),
    "an id that breaks lines": ("a\nb", {}, "program"),
    "an id of another tenant": ("bob\0walk", {}, "program"),
    "an object without an id": ({"call": 1}, {}, "program"),
    "an empty id in an object": ({"id": ""}, {}, "program.id"),
    "an id in an object that breaks lines": ({"id": "a\x7f"}, {}, "program.id"),
    "an id in an object that is no text": ({"id": 5}, {}, "program.id"),
    "a field that there is not": ({"id": "walk", "parent": [1]}, {}, "program"),
    "a negative call": ({"id": "walk", "call": -1}, {}, "program.call"),
    "half a call": ({"id": "walk", "call": 0.5}, {}, "program.call"),
    "a call beyond all": ({"id": "walk", "call": 2**70}, {}, "program.call"),
    "a negative thread": ({"id": "walk", "thread": -1}, {}, "program.thread"),
    "a thread that is no number": ({"id": "walk", "thread": True}, {}, "program.thread"),
    "a stage without end": ({"id": "walk", "stage": "s" * 129}, {}, "program.stage"),
    "a stage of two lines": ({"id": "walk", "stage": "a\nb"}, {}, "program.stage"),
    "a negative parent": ({"id": "walk", "call": 1, "parents": [0, -1]}, {}, "program.parents"),
    "a parent that is no number": ({"id": "walk", "call": 1, "parents": ["0"]}, {}, "program.parents[0]"),
    "a parent of itself": ({"id": "walk", "call": 1, "parents": [1]}, {}, "program.parents"),
    "very many parents": ({"id": "walk", "parents": list(range(1, 1026))}, {}, "program.parents"),
    "negative service": ({"id": "walk", "service_s": -0.5}, {}, "program.service_s"),
    "service without end": ({"id": "walk", "service_s": 1e300}, {}, "program.service_s"),
    "an empty header": (None, {HEADER: ""}, HEADER),
    "a header without end": (None, {HEADER: "p" * 257}, HEADER),
    "a header with a tab": (None, {HEADER: "a\tb"}, HEADER),
    "a header of other letters": (None, {HEADER: "ü"}, HEADER),
    "two that differ": ("walk", {HEADER: "talk"}, HEADER),
    "two that differ, one with more": (PLACE, {HEADER: "Walk"}, HEADER),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_it_is_told_by_name(server: Any, name: str) -> None:
    given, headers, param = BAD[name]
    answer = server.post("/v1/completions", {**BODIES["/v1/completions"], "program": given}, headers=headers)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body
    assert param in answer.error["message"] and len(answer.error["message"]) < 300
    assert not server.asked


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["an empty id", "a field that there is not", "a negative call", "two that differ"])
def test_every_route_refuses_what_is_wrong(server: Any, path: str, name: str) -> None:
    given, headers, param = BAD[name]
    body = {**BODIES[path], "program": given, "stream": True}
    answer = server.post(path, body, headers=headers)
    assert answer.status == 400 and param in answer.error["message"], answer.body
    assert not server.asked


def test_numbers_that_are_none_are_no_json(server: Any) -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        body = b'{"prompt": "a", "program": {"id": "walk", "service_s": %s}}' % number
        answer = server.post("/v1/completions", body, headers={"Content-Type": "application/json"})
        assert answer.status == 400, answer.body
    assert not server.asked


def test_a_field_that_is_nearly_it_is_told(server: Any) -> None:
    answer = server.post("/v1/completions", {**BODIES["/v1/completions"], "programs": "walk"})
    assert answer.status == 200 and answer.headers["x-millstream-warning"] == "ignored: programs"
    assert server.asked[0].program is None


def test_one_name_of_two_tenants_is_two_programs(server: Any) -> None:
    for name in ("alice", "bob", "alice"):
        server.with_key(KEYS[name]).post("/v1/completions", {**BODIES["/v1/completions"], "program": "walk"})
    first, other, again = (one.program.id for one in server.asked)
    assert first == again != other


def test_a_line_of_a_batch_takes_it_too(server: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        body = json.dumps({**BODIES[path], "program": PLACE}).encode()
        work = server.app.execute(path, body, "bob", "line 1")
        answer = asyncio.run_coroutine_threadsafe(work, server.loop).result(30)
        assert answer.status == 200, answer.body
        assert server.asked[-1].program == Program("bob\0walk", 3, 1, "plan", (0, 2), 1.5)
        assert server.asked[-1].background


def test_a_policy_sees_it(server: Any) -> None:
    (policy, _) = server.llm.assembled.engine.scheduler.policy.policies
    server.post("/v1/completions", {**BODIES["/v1/completions"], "program": "seen"}, headers={})
    server.post("/v1/completions", BODIES["/v1/completions"], headers={HEADER: "seen"})
    name = "alice\0alice\0seen"
    until(lambda: name in policy._idle and policy._idle[name].calls == 0, "the policy has heard of no program")
    assert policy._idle[name].worked > 0


def test_what_the_client_says_of_service_is_what_the_policy_begins_at(server: Any) -> None:
    (policy, _) = server.llm.assembled.engine.scheduler.policy.policies
    body = {**BODIES["/v1/completions"], "program": {"id": "long", "service_s": 500.0}}
    server.post("/v1/completions", body)
    until(lambda: "alice\0alice\0long" in policy._idle, "the policy has heard of no program")
    assert policy._idle["alice\0alice\0long"].service >= 500


def test_python_names_it_as_it_is(server: Any) -> None:
    async def test() -> None:
        program = Program("offline", 1, parents=(0,))
        async for _ in server.llm.generate([5], SamplingParams(max_tokens=1), program=program):
            pass

    asyncio.run(test())
    assert [one.program for one in server.asked] == [Program("offline", 1, parents=(0,))]


# -- responses that go on from each other


def test_responses_that_go_on_from_each_other_are_one_program(server: Any) -> None:
    body = BODIES["/v1/responses"]
    first = server.post("/v1/responses", body).json
    second = server.post("/v1/responses", {**body, "previous_response_id": first["id"]}).json
    third = server.post("/v1/responses", {**body, "previous_response_id": second["id"], "store": False}).json
    fork = server.post("/v1/responses", {**body, "previous_response_id": first["id"]}).json
    assert {one["program"] for one in (first, second, third, fork)} == {first["id"]}
    assert {one.program for one in server.asked} == {Program(f"alice\0{first['id']}")}
    alone = server.post("/v1/responses", {**body, "store": False}).json
    assert alone["program"] is None and server.asked[-1].program is None


def test_a_response_that_names_its_program_names_that_of_those_after_it(server: Any) -> None:
    body = BODIES["/v1/responses"]
    first = server.post("/v1/responses", {**body, "program": PLACE}).json
    second = server.post("/v1/responses", {**body, "previous_response_id": first["id"]}).json
    assert first["program"] == second["program"] == "walk"
    assert server.asked[-1].program == Program("alice\0walk")
    third = server.post(
        "/v1/responses", {**body, "previous_response_id": second["id"]}, headers={HEADER: "another"}
    ).json
    assert third["program"] == "another" and server.asked[-1].program == Program("alice\0another")


# -- what it is described as


def test_the_description_of_the_api_tells_of_it(server: Any) -> None:
    found = server.get("/openapi.json").json
    schemas = found["components"]["schemas"]
    place = {**schemas["ProgramAsk"], "components": found["components"]}
    jsonschema.validate(PLACE, place)
    for wrong in ({}, {"id": "walk", "parent": [1]}, {"id": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, place)
    for path in BODIES:
        operation = found["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert {"$ref": "#/components/schemas/ProgramAsk"} in schemas[body]["properties"]["program"]["anyOf"]
        assert HEADER in [one["name"] for one in operation["parameters"] if one["in"] == "header"]
    assert "parameters" not in found["paths"]["/v1/embeddings"]["post"]


# -- several engines


class Engine(AsyncEngine):
    """The null runner's. `took`: what was sent to it."""

    def __init__(self) -> None:
        engine, facts = make_null({"step_s": 0.002})
        super().__init__(EngineThread(engine), facts)
        self.took: list[Ask] = []

    async def submit(self, request: Ask) -> AsyncIterator[Any]:
        self.took.append(request)
        async for chunk in super().submit(request):
            yield chunk


@asynccontextmanager
async def cluster(router: str) -> AsyncIterator[tuple[httpx.AsyncClient, list[Engine], Any]]:
    """A client of the API over two engines behind a router. What is sent as X-Tenant is the tenant."""
    fleet, engines = ClusterClient(registry.make("router", router)), [Engine(), Engine()]
    await fleet.start()
    for one in engines:
        await fleet.add(one)
    service = Service(fleet, Observatory(Metrics("null", process=False)), NoGate())
    tokenizer: Any = SimpleNamespace(vocabulary=VOCABULARY, stop_ids=frozenset())
    service.take(await fleet.facts(), tokenizer)
    inner = Starlette(routes=routes(service)[1])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tenant = dict(scope["headers"]).get(b"x-tenant", b"").decode()
        scope["state"] = {"caller": Caller(secrets.token_hex(16), tenant)}
        await inner(scope, receive, send)

    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://null") as http:
            yield http, engines, inner
    finally:
        service.close()
        await fleet.close()
        for one in engines:
            await one.close()


async def generate(http: httpx.AsyncClient, program: Any = None, **headers: str) -> None:
    body = {"token_ids": [1, 2, 3], "max_tokens": 8, "temperature": 0.0, "program": program}
    answer = await http.post("/generate", json=body, headers=headers)
    assert answer.status_code == 200, answer.text


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_router_sends_all_calls_of_a_program_to_one_engine() -> None:
    async def test() -> None:
        async with cluster("session") as (http, engines, _):
            names = [f"p{n}" for n in range(6)]
            # At once, so that they are spread; then one after the other, when both engines are equally free.
            await asyncio.gather(*(generate(http, name) for name in names))
            places = {one.program.id: place for place, engine in enumerate(engines) for one in engine.took}
            assert set(places) == set(names) and set(places.values()) == {0, 1}
            for name in names * 2:
                before = [len(engine.took) for engine in engines]
                await (generate(http, {"id": name, "call": 1}) if sum(before) % 2 else generate(http, **{HEADER: name}))
                grown = [len(engine.took) - count for engine, count in zip(engines, before, strict=True)]
                assert grown == [int(places[name] == place) for place in (0, 1)]

    run(test)


def test_a_router_does_not_take_programs_of_two_tenants_for_one() -> None:
    async def test() -> None:
        async with cluster("session") as (http, engines, _):
            one, other = {"X-Tenant": "one"}, {"X-Tenant": "other"}
            await asyncio.gather(generate(http, "a", **one), generate(http, "a", **other))
            for _ in range(3):
                await generate(http, "a", **one)
                await generate(http, "a", **other)
            found = [{request.program.id for request in engine.took} for engine in engines]
            assert found == [{"one\0a"}, {"other\0a"}] or found == [{"other\0a"}, {"one\0a"}]

    run(test)


def test_a_request_from_inside_names_its_program_in_its_body() -> None:
    """As `millstream run-batch` asks: there are no headers."""

    async def test() -> None:
        async with cluster("session") as (_, engines, app):
            body = json.dumps({"token_ids": [1], "max_tokens": 2, "program": "file"}).encode()
            answers = await asyncio.gather(*(ask(app, "/generate", body, Caller(f"r{n}")) for n in range(4)))
            assert [one.status for one in answers] == [200] * 4
            assert sorted(len(engine.took) for engine in engines) == [0, 4]

    run(test)
