"""What each key may ask for: models by their names, and control tokens by their ids."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from millstream.config.load import build, tree_of
from millstream.core.errors import ConfigError
from millstream.serve.config import ServeConfig
from serving import AppServer, app_server

KEYS = {name: f"the-key-of-{name}" for name in ("alice", "bob", "carol")}
RIGHTS: dict[str, Any] = {"bob": {"models": ["other"]}, "carol": {"models": "small", "control_tokens": False}}
TREE: dict[str, Any] = {
    "serve": {
        "auth": {"keys": [f"{name}:{key}" for name, key in KEYS.items()], "rights": RIGHTS},
        "api": {"model_names": ["small", "org/small"]},
    }
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(tmp_path_factory.mktemp("rights"), TREE) as found:
        yield found


def special(server: AppServer, text: str = "<|im_end|>") -> int:
    found: int = server.llm.tokenizer.facts.specials[text].id
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions/render", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
        ("/generate", {"token_ids": [5], "max_tokens": 1}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_a_model_that_a_key_may_not_use_is_not_there(server: AppServer, path: str, body: dict[str, Any]) -> None:
    for name, want in (("alice", 200), ("bob", 404), ("carol", 200)):
        asked = {**body, "model": "org/small"}
        answer = server.with_key(KEYS[name]).post(path, asked)
        assert answer.status == want, answer.body
        assert want == 200 or b"small" not in answer.body.replace(b"org/small", b""), "it lists what is not for it"
    if path.partition("/v1/")[2].partition("/")[0] not in ("messages", "responses"):
        answer = server.with_key(KEYS["bob"]).post(path, body)
        assert answer.status == 403 and answer.error["code"] == "forbidden"


def test_a_key_is_shown_its_own_models(server: AppServer) -> None:
    shown = {name: server.with_key(key).get("/v1/models").json["data"] for name, key in KEYS.items()}
    assert [one["id"] for one in shown["alice"]] == [one["id"] for one in shown["carol"]] == ["small", "org/small"]
    assert shown["bob"] == []
    assert server.with_key(KEYS["bob"]).get("/v1/models/small").status == 404


def test_control_tokens_by_their_ids(server: AppServer) -> None:
    end, bos = special(server), server.llm.tokenizer.bos_id
    plain = server.llm.tokenizer.encode("the mill")
    whole = plain if bos is None or plain[:1] == [bos] else [bos, *plain]
    for path, name in (("/v1/completions", "prompt"), ("/generate", "token_ids")):
        for ids, want in ((whole, 200), ([*plain, end], 400), ([end, *plain], 400)):
            body = {name: ids, "max_tokens": 1}
            assert server.with_key(KEYS["alice"]).post(path, body).status == 200
            answer = server.with_key(KEYS["carol"]).post(path, body)
            assert answer.status == want, answer.body
            if want == 400:
                assert answer.error["param"] == name and str(end) in answer.error["message"]
    many = {"prompt": [plain, [end]], "max_tokens": 1}
    assert server.with_key(KEYS["carol"]).post("/v1/completions", many).error["param"] == "prompt[1]"
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert server.with_key(KEYS["carol"]).post("/v1/chat/completions", chat).status == 200


def test_a_line_of_a_batch_has_the_rights_of_its_key(server: AppServer) -> None:
    async def lines() -> list[int]:
        asked = json.dumps({"model": "small", "prompt": "a", "max_tokens": 1}).encode()
        answers = [await server.app.execute("/v1/completions", asked, name, "") for name in ("alice", "bob")]
        return [answer.status for answer in answers]

    assert server.loop is not None
    assert asyncio.run_coroutine_threadsafe(lines(), server.loop).result(30) == [200, 404]


def test_rights_of_nobody_are_a_mistake(tmp_path: Any) -> None:
    tree = {"serve": {"auth": {"keys": ["alice:the-key-of-alice"], "rights": {"alcie": {"models": ["small"]}}}}}
    said = r"rights\.alcie: there is no key of that name; the nearest is 'alice'"
    with pytest.raises(ConfigError, match=said), app_server(tmp_path, tree):
        pass
    with pytest.raises(ConfigError, match=r"serve\.auth\.rights\.alice\.model"):
        build(ServeConfig, {"auth": {"rights": {"alice": {"model": ["small"]}}}}, "serve")
    with pytest.raises(ConfigError, match=r"serve\.auth\.rights"):
        build(ServeConfig, {"auth": {"rights": ["alice"]}}, "serve")


def test_rights_change_with_the_keys(server: AppServer) -> None:
    body = {"model": "small", "prompt": "a", "max_tokens": 1}
    tree = json.loads(json.dumps(server.tree))
    tree["serve"]["auth"]["rights"] = {"alice": {"models": ["other"]}}
    server.call(lambda: server.app.reload(tree))
    try:
        assert server.with_key(KEYS["alice"]).post("/v1/completions", body).status == 404
        assert server.with_key(KEYS["bob"]).post("/v1/completions", body).status == 200
    finally:
        server.call(lambda: server.app.reload(server.tree))


def test_rights_are_shown_with_the_configuration() -> None:
    shown = tree_of(build(ServeConfig, {"auth": {"rights": RIGHTS}}, "serve"))["auth"]["rights"]
    assert shown["carol"] == {"models": ["small"], "control_tokens": False}
