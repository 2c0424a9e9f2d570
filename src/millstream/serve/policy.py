"""Every route of the server, and who may use it, how much it may be sent, and of what form.

The table is the only place where a route gets its key, its limits and its description: an app with a route that is not
in here cannot be built.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.routing import Route

from millstream.core.errors import ConfigError, nearest
from millstream.serve.anthropic import shapes as anthropic
from millstream.serve.anthropic.events import error_body, error_kind
from millstream.serve.batch_routes import BatchAsk
from millstream.serve.batches import BatchObject
from millstream.serve.caller import LOOK, Caller
from millstream.serve.errors import Refused, Told
from millstream.serve.files import FileObject
from millstream.serve.openai.shapes import (
    PROGRAM_HEADER,
    ChatAsk,
    CompletionAsk,
    DetokenizeAsk,
    TokenizeAsk,
    TokensAsk,
)
from millstream.serve.responses import shapes as responses
from millstream.serve.vector_routes import EmbeddingAsk, RerankAsk, ScoreAsk

# Bodies that say little.
SMALL_BYTES = 64 << 10


class Access(enum.Enum):
    """OPEN routes hold no data. KEY routes ask for a key where there are keys, ADMIN ones for the admin key, always."""

    OPEN = "open"
    KEY = "key"
    ADMIN = "admin"


class Body(enum.Enum):
    """What a request brings. JSON has the limit of `serve.limits`, an upload that of files, a small one a small one."""

    NONE = "none"
    JSON = "json"
    SMALL_JSON = "small json"
    UPLOAD = "upload"


ErrorShape = Callable[[Told, str], dict[str, Any]]
"""(error, request id) -> body."""


def openai_errors(told: Told, request_id: str) -> dict[str, Any]:
    return told.body


def anthropic_errors(told: Told, request_id: str) -> dict[str, Any]:
    return error_body(error_kind(told.status), told.message, request_id)


@dataclass(frozen=True, slots=True)
class Policy:
    """`asks` and `answers` are types of JSON bodies (Any: an object that the route's own documentation tells of);
    `media` is what an answer is otherwise. `streams`: it may answer with server-sent events. `batch`: lines of batches
    may ask for it. `query` names its parameters and `headers` those headers of a request that say what is to be done;
    `others` tells of more statuses whose bodies are answers too."""

    summary: str
    access: Access = Access.KEY
    body: Body = Body.NONE
    asks: Any = None
    answers: Any = dict[str, Any]
    media: str = "application/json"
    streams: bool = False
    batch: bool = False
    errors: ErrorShape = openai_errors
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)


def _ask(summary: str, asks: Any, **given: Any) -> Policy:
    return Policy(summary, body=Body.JSON, asks=asks, **given)


def _generate(summary: str, asks: Any, **given: Any) -> Policy:
    return _ask(summary, asks, streams=True, headers=("X-Request-Timeout", PROGRAM_HEADER), **given)


def _open(summary: str, **given: Any) -> Policy:
    return Policy(summary, access=Access.OPEN, **given)


def _admin(summary: str, **given: Any) -> Policy:
    return Policy(summary, access=Access.ADMIN, **given)


class Status(msgspec.Struct):
    status: str


class ModelCard(msgspec.Struct, kw_only=True):
    """A model as OpenAI's API lists it, with what vLLM adds. `root` is the model that the name stands for."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "millstream"
    root: str
    parent: str | None = None
    max_model_len: int
    kinds: list[str] = []


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class FileList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class BatchList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[BatchObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool


class LogLevelAsk(msgspec.Struct):
    """`logger` is a name as logs show it, such as millstream.serve."""

    level: str
    logger: str = "millstream"


_NOT_NOW = {"503": "Not now: the body says why"}
_PAGES = ("after", "limit", "order")

POLICIES: Mapping[tuple[str, str], Policy] = {
    # what a server says of itself
    ("GET", "/health"): _open("Whether this process lives", answers=Status),
    ("GET", "/ready"): _open("Whether a request sent now would be served", answers=Status, others=_NOT_NOW),
    ("GET", "/ping"): _open("The same as /health", answers=Status),
    ("POST", "/ping"): _open("The same as /health", answers=Status),
    ("GET", "/health/deep"): Policy("Whether the engine computes: one token within a time limit", others=_NOT_NOW),
    ("GET", "/version"): Policy("The version of the server"),
    ("GET", "/load"): Policy("How many requests are inside and how many wait"),
    ("GET", "/openapi.json"): Policy("This description"),
    ("GET", "/v1/models"): Policy("The served models, by all of their names", answers=ModelList),
    ("GET", "/v1/models/{model:path}"): Policy("One name of a served model", answers=ModelCard),
    # what generates
    ("POST", "/v1/chat/completions"): _generate("Answer a chat", ChatAsk, batch=True),
    ("POST", "/v1/chat/completions/render"): _ask("The prompt that a chat comes to", ChatAsk),
    ("POST", "/v1/completions"): _generate("Continue a text", CompletionAsk, batch=True),
    ("POST", "/v1/completions/render"): _ask("The prompts that a completion comes to", CompletionAsk),
    ("POST", "/generate"): _generate("Token ids in, token ids out", TokensAsk),
    ("POST", "/inference/v1/generate"): _generate("Token ids in, token ids out", TokensAsk),
    ("POST", "/tokenize"): _ask("The tokens of a text or a chat", TokenizeAsk),
    ("POST", "/detokenize"): _ask("The text of tokens", DetokenizeAsk),
    ("POST", "/v1/embeddings"): _ask("Vectors of texts", EmbeddingAsk, batch=True),
    ("POST", "/v1/rerank"): _ask("Order documents by how they fit a query", RerankAsk, batch=True),
    ("POST", "/v2/rerank"): _ask("The same as /v1/rerank", RerankAsk),
    ("POST", "/rerank"): _ask("The same as /v1/rerank", RerankAsk),
    ("POST", "/v1/score"): _ask("Scores of pairs of texts", ScoreAsk, batch=True),
    ("POST", "/score"): _ask("The same as /v1/score", ScoreAsk),
    ("POST", "/v1/messages"): _generate(
        "Answer a chat, as Anthropic's API does", anthropic.Ask, errors=anthropic_errors
    ),
    ("POST", "/v1/messages/count_tokens"): _ask(
        "The tokens of a chat, as Anthropic's API counts them", anthropic.Counted, errors=anthropic_errors
    ),
    ("POST", "/v1/responses"): _generate("Create a response", responses.Ask, batch=True),
    ("GET", "/v1/responses/{response_id}"): Policy(
        "A response that is kept", streams=True, query=("stream", "starting_after")
    ),
    ("DELETE", "/v1/responses/{response_id}"): Policy("Forget a response", answers=Deleted),
    ("POST", "/v1/responses/{response_id}/cancel"): Policy("End a response in the background", body=Body.SMALL_JSON),
    ("GET", "/v1/responses/{response_id}/input_items"): Policy("What a response was asked", query=_PAGES),
    # files and batches
    ("POST", "/v1/files"): Policy("Upload a file", body=Body.UPLOAD, answers=FileObject),
    ("GET", "/v1/files"): Policy("The files of this key", answers=FileList, query=("purpose", *_PAGES)),
    ("GET", "/v1/files/{file_id}"): Policy("A file", answers=FileObject),
    ("DELETE", "/v1/files/{file_id}"): Policy("Delete a file", answers=Deleted),
    ("GET", "/v1/files/{file_id}/content"): Policy("The content of a file", media="application/octet-stream"),
    ("POST", "/v1/batches"): Policy("Begin a batch", body=Body.SMALL_JSON, asks=BatchAsk, answers=BatchObject),
    ("GET", "/v1/batches"): Policy("The batches of this key", answers=BatchList, query=("after", "limit")),
    ("GET", "/v1/batches/{batch_id}"): Policy("A batch", answers=BatchObject),
    ("POST", "/v1/batches/{batch_id}/cancel"): Policy("Cancel a batch", body=Body.SMALL_JSON, answers=BatchObject),
    # what watches
    ("GET", "/"): _open("The playground", media="text/html"),
    ("GET", "/playground/{name}"): _open("A file of the playground's page", media="text/html"),
    ("GET", "/playground/state"): Policy("What the playground shows", query=("since",)),
    ("GET", "/metrics"): Policy("Metrics, for Prometheus", media="text/plain"),
    ("GET", "/v1/requests/{id}/timeline"): Policy("What happened to a request"),
    # the admin listener
    ("POST", "/admin/drain"): _admin("Finish what is inside, take nothing more, and end", body=Body.SMALL_JSON),
    ("POST", "/admin/cache/reset"): _admin("Forget all cached prefixes", body=Body.SMALL_JSON),
    ("GET", "/admin/replicas"): _admin("The engines of a cluster, and how they get on"),
    ("POST", "/admin/replicas/{name}/drain"): _admin(
        "Let an engine of a cluster finish what it has, and start another in its place", body=Body.SMALL_JSON
    ),
    ("GET", "/admin/config"): _admin("The configuration, without secrets"),
    ("GET", "/admin/requests/{id}/timeline"): _admin("What happened to a request of any key"),
    ("POST", "/admin/log-level"): _admin("How much is logged", body=Body.SMALL_JSON, asks=LogLevelAsk),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A route with its policy, for one method. `look` turns callers away for whom there is no room (Overloaded)."""

    method: str
    pattern: str
    policy: Policy
    route: Route
    look: Callable[[Caller], None] | None = None


class Table:
    """The routes of one app. Raises ConfigError for one without a policy, and for two of one path and method."""

    def __init__(self, routes: Iterable[Route], policies: Mapping[tuple[str, str], Policy] = POLICIES) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}
        self._fixed: dict[str, dict[str, Entry]] = {}
        self._patterns: dict[str, tuple[Any, dict[str, Entry]]] = {}
        for route in routes:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                key = (method, route.path)
                policy = policies.get(key)
                if policy is None:
                    raise ConfigError(
                        f"route {method} {route.path} has no policy: say in serve/policy.py who may use it"
                    )
                if key in self.entries:
                    raise ConfigError(f"route {method} {route.path} is there twice")
                entry = self.entries[key] = Entry(
                    method, route.path, policy, route, getattr(route.endpoint, LOOK, None)
                )
                if "{" in route.path:
                    self._patterns.setdefault(route.path, (route.path_regex, {}))[1][method] = entry
                else:
                    self._fixed.setdefault(route.path, {})[method] = entry

    @property
    def batch_paths(self) -> tuple[str, ...]:
        """Where lines of batches may go."""
        return tuple(path for (_, path), entry in self.entries.items() if entry.policy.batch)

    def find(self, method: str, path: str) -> tuple[Entry, dict[str, str]]:
        """The entry and the parameters in the path. Raises Refused: 404 with the nearest path, 405 with what goes."""
        methods, given = self._fixed.get(path), {}
        if methods is None:
            for regex, some in self._patterns.values():
                match = regex.match(path)
                if match is not None:
                    methods, given = some, match.groupdict()
                    break
        if methods is None:
            raise Refused(404, "not_found", self._nothing(path))
        entry = methods.get("GET" if method == "HEAD" else method)
        if entry is None:
            allow = ", ".join(sorted({*methods, *({"HEAD"} if "GET" in methods else ())}))
            said = f"{path[:200]} takes {allow}, not {method[:20]}"
            raise Refused(405, "method_not_allowed", said, headers={"Allow": allow})
        return entry, given

    def _nothing(self, path: str) -> str:
        shown = path[:100]
        close = nearest(shown, (*self._fixed, *self._patterns))
        return f"there is no {shown!r} here" + (f"; the nearest is {close!r}" if close else "")
