"""Hub models against a small hub on loopback: whole, interrupted, lying, gated, absent and out of reach."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save

from millstream.core.errors import DownloadError, UnknownModel, Unsupported
from millstream.models import hub, store
from millstream.models.source import open_source

from .conftest import tiny_llama

REVISION = "a" * 40


@dataclass
class FakeHub:
    """What the hub has, how it misbehaves, and what it was asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    break_after: dict[str, int] = field(default_factory=dict)  # file -> bytes sent before the connection is dropped
    down_after_break: bool = False
    failing: set[str] = field(default_factory=set)  # files answered with 503
    lying: set[str] = field(default_factory=set)  # files announced with another hash
    gated: set[str] = field(default_factory=set)
    token: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # file, Range
    url: str = ""

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.files[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            lie = b"lie" if name in self.lying else b""
            if name.endswith((".gguf", ".safetensors", ".bin")):
                digest = hashlib.sha256(content + lie).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
                entry["blobId"] = "0" * 40
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content + lie).hexdigest()
            siblings.append(entry)
        return {"id": repo, "sha": REVISION, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        fake = self.hub
        if fake.token and self.headers.get("Authorization") != f"Bearer {fake.token}":
            self._answer(401, b"{}", X_Error_Code="RepoNotFound")
            return
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/")
            if repo in fake.gated:
                self._answer(403, b"{}", X_Error_Code="GatedRepo")
            elif repo not in fake.files:
                self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            else:
                self._answer(200, json.dumps(fake.listing(repo)).encode(), Content_Type="application/json")
            return
        repo, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        fake.asked.append((name, self.headers.get("Range", "")))
        content = fake.files.get(repo, {}).get(name)
        if content is None:
            self._answer(404, b"", X_Error_Code="EntryNotFound")
            return
        if name in fake.failing:
            self._answer(503, b"down for the night")
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", '"x"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        stop = fake.break_after.pop(name, None)
        self.wfile.write(content[start:stop])
        if stop is not None:
            if fake.down_after_break:
                fake.failing.add(name)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    weights = {"model.norm.weight": torch.arange(4.0), "lm_head.weight": torch.ones(2, 4)}
    state.files["org/tiny"] = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "generation_config.json": b'{"top_k": 5}',
        "model.safetensors": save(weights),
        "pytorch_model.bin": b"pickle",
        "README.md": b"# read me",
        "modeling_tiny.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
        "original/params.json": b"{}",
    }
    packed = tiny_llama(tmp_path / "whole.gguf", np.random.default_rng(0))[0].read_bytes()
    state.files["org/packed-GGUF"] = {"tiny-q8.gguf": packed, "sub/tiny-q4.gguf": packed[:-1] + b"x", "README.md": b""}
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_is_pulled_without_what_is_not_the_model(fake: FakeHub, home: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = store.resolve("org/tiny", progress=lambda *step: told.append(step))
    assert path == home / "hub" / "org--tiny" / REVISION
    names = {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"}
    assert {p.name for p in path.iterdir()} == {*names, "complete.json"}
    source = open_source(path, "org/tiny")
    assert torch.equal(source.tensor("model.norm.weight"), torch.arange(4.0))
    assert source.generation_config == {"top_k": 5}
    total = sum(len(fake.files["org/tiny"][name]) for name in names)
    assert told[-1] == ("download", total, total) and [t[1] for t in told] == sorted(t[1] for t in told)


def test_a_model_that_is_here_asks_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.resolve("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert store.resolve("org/tiny") == store.resolve("org/tiny", download=False) == path


def test_one_gguf_file_is_pulled_by_its_name(fake: FakeHub) -> None:
    path = store.resolve("org/packed-GGUF:tiny-q8.gguf")
    assert path.name == "tiny-q8.gguf" and [name for name, _ in fake.asked] == ["tiny-q8.gguf"]
    open_source(path)
    nested = store.resolve("org/packed-GGUF:sub/tiny-q4.gguf")
    assert nested.parts[-2:] == ("sub", "tiny-q4.gguf")
    assert store.resolve("org/packed-GGUF:tiny-q8.gguf", download=False) == path


def test_shards_are_pulled_by_their_index(fake: FakeHub) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = json.dumps({"weight_map": {"a": one, "b": two}}).encode()
    fake.files["org/sharded"] = {
        "config.json": b"{}",
        "model.safetensors.index.json": index,
        one: save({"a": torch.zeros(1)}),
        two: save({"b": torch.ones(1)}),
        "consolidated.safetensors": b"the same again",
    }
    source = open_source(store.resolve("org/sharded"))
    assert torch.equal(source.tensor("b"), torch.ones(1))
    assert "consolidated.safetensors" not in {name for name, _ in fake.asked}


def test_a_dropped_connection_is_taken_up_where_it_broke(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    fake.break_after["tiny-q8.gguf"] = 5000
    open_source(store.resolve("org/packed-GGUF:tiny-q8.gguf"))
    assert [asked for _, asked in fake.asked] == ["", "bytes=5000-"]


def test_a_failed_pull_is_continued_by_the_next(fake: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    fake.break_after["tiny-q8.gguf"] = 7000
    fake.down_after_break = True
    with pytest.raises(DownloadError, match=r"tiny-q8\.gguf: http://127.* answered: .*503"):
        store.resolve("org/packed-GGUF:tiny-q8.gguf")
    part = home / "hub" / "org--packed-GGUF" / REVISION / "tiny-q8.gguf.part"
    assert part.stat().st_size == 7000
    assert not any(m.origin == "hub" for m in store.list_models())
    fake.failing.clear()
    open_source(store.resolve("org/packed-GGUF:tiny-q8.gguf"))
    assert [asked for _, asked in fake.asked] == ["", "bytes=7000-", "bytes=7000-"]
    assert not part.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_with_another_hash_is_discarded(name: str, fake: FakeHub, home: Path) -> None:
    fake.lying.add(name)
    with pytest.raises(DownloadError, match=rf"{name} has the hash .* announced .* discarded"):
        store.resolve("org/tiny")
    assert not list(home.rglob(f"{name}*"))
    assert store.list_models()[-1].origin != "hub"


def test_a_damaged_part_is_found_out_and_fetched_again(fake: FakeHub, home: Path) -> None:
    part = home / "hub" / "org--packed-GGUF" / REVISION / "tiny-q8.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 7000)
    with pytest.raises(DownloadError, match="discarded"):
        store.resolve("org/packed-GGUF:tiny-q8.gguf")
    open_source(store.resolve("org/packed-GGUF:tiny-q8.gguf"))


def test_a_model_that_the_hub_does_not_have_is_unknown(fake: FakeHub) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'org/nothing'.*no such model; if it is private, set HF_TOKEN"):
        store.resolve("org/nothing")


def test_a_file_that_the_model_does_not_have_is_answered_with_the_nearest(fake: FakeHub) -> None:
    with pytest.raises(UnknownModel, match=r"the nearest is 'org/packed-GGUF:tiny-q8\.gguf'"):
        store.resolve("org/packed-GGUF:tiny-q9.gguf")
    with pytest.raises(UnknownModel, match="several GGUF files; name one"):
        store.resolve("org/packed-GGUF")


def test_a_repository_with_one_gguf_file_is_that_file(fake: FakeHub) -> None:
    del fake.files["org/packed-GGUF"]["sub/tiny-q4.gguf"]
    path = store.resolve("org/packed-GGUF")
    assert path.name == "tiny-q8.gguf" and store.resolve("org/packed-GGUF", download=False) == path


def test_a_model_of_pickles_is_refused_before_a_byte_of_it(fake: FakeHub) -> None:
    del fake.files["org/tiny"]["model.safetensors"]
    with pytest.raises(Unsupported, match=r"no safetensors.*pytorch_model\.bin"):
        store.resolve("org/tiny")
    with pytest.raises(Unsupported, match="name org/tiny for the whole"):
        store.resolve("org/tiny:config.json")
    assert fake.asked == []


def test_a_gated_model_says_what_to_do(fake: FakeHub) -> None:
    fake.gated.add("org/tiny")
    with pytest.raises(DownloadError, match=r"accept its terms at http.*org/tiny; then set HF_TOKEN"):
        store.resolve("org/tiny")


def test_the_token_is_sent(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.token = "hf_secret"
    with pytest.raises(UnknownModel):
        store.resolve("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_source(store.resolve("org/tiny"))


def test_offline_says_so(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        store.resolve("org/tiny")
    assert fake.asked == []


def test_a_hub_out_of_reach_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        with pytest.raises(
            DownloadError, match=r"cannot be reached .* HF_ENDPOINT to a mirror, or name a model by its path"
        ):
            store.resolve("org/tiny")


def test_without_download_nothing_is_asked(fake: FakeHub) -> None:
    with pytest.raises(DownloadError, match="millstream pull org/tiny"):
        store.resolve("org/tiny", download=False)
    assert fake.asked == []


def test_a_model_in_the_librarys_own_cache_is_used_from_there(fake: FakeHub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / "b1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(b"{}")
    with pytest.raises(DownloadError):
        store.resolve("org/tiny", download=False)
    (snapshot / "model.safetensors").write_bytes(fake.files["org/tiny"]["model.safetensors"])
    assert store.resolve("org/tiny") == snapshot and fake.asked == []


def test_hub_models_are_listed_and_removed(fake: FakeHub, home: Path) -> None:
    store.resolve("org/tiny")
    store.resolve("org/packed-GGUF:tiny-q8.gguf")
    store.resolve("org/packed-GGUF:sub/tiny-q4.gguf")
    listed = {m.name: m for m in store.list_models() if m.origin == "hub"}
    assert set(listed) == {"org/tiny", "org/packed-GGUF:tiny-q8.gguf", "org/packed-GGUF:sub/tiny-q4.gguf"}
    size = len(fake.files["org/packed-GGUF"]["tiny-q8.gguf"])
    assert listed["org/packed-GGUF:tiny-q8.gguf"].size_bytes == size
    assert store.remove("org/packed-GGUF:tiny-q8.gguf") == size
    assert hub.find_local(hub.HubName("org/packed-GGUF", "tiny-q8.gguf")) is None
    assert hub.find_local(hub.HubName("org/packed-GGUF", "sub/tiny-q4.gguf")) is not None
    store.remove("org/tiny")
    assert not (home / "hub" / "org--tiny").exists()
    with pytest.raises(UnknownModel):
        store.remove("org/tiny")


def test_names_that_the_hub_must_not_be_asked_for() -> None:
    good = {"org/name": ("org/name", None), "o/n:a/b.gguf": ("o/n", "a/b.gguf"), "A-b/c.d_e": ("A-b/c.d_e", None)}
    for name, (repo, file) in good.items():
        assert hub.parse(name) == hub.HubName(repo, file)
    for name in ("name", "a/b/c", "../a", "a/..", "a--b/c", "a/b:../c", "a/b:/c", "a/b:", "/a/b", "a/b?x", "a b/c"):
        assert hub.parse(name) is None, name
