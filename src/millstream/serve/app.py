"""The API's app: every route over one engine, the door in front of them, and what is kept on disk."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.config.load import build, home
from millstream.core.client import EngineClient, ModelFacts
from millstream.core.errors import ConfigError, EngineAway, EngineClosed, MillstreamError
from millstream.core.request import Kind
from millstream.serve import admin_routes, base_routes, batch_routes, files, vector_routes, watch_routes
from millstream.serve import batches as batches_module
from millstream.serve.admission import Admission
from millstream.serve.anthropic import routes as messages
from millstream.serve.auth import Keyring, check_rights, entries_of
from millstream.serve.batch_lines import Answer
from millstream.serve.batches import Batches
from millstream.serve.caller import ALL_RIGHTS, Caller, caller_of
from millstream.serve.config import ServeConfig
from millstream.serve.door import Door, Receive, Salts, Scope, Send, new_request_id, pattern_of
from millstream.serve.errors import told
from millstream.serve.families import OTHER
from millstream.serve.files import Files
from millstream.serve.http_watch import HttpWatch
from millstream.serve.inside import ask
from millstream.serve.metrics import lost_times
from millstream.serve.observatory import Observatory
from millstream.serve.openai import routes as openai
from millstream.serve.openapi import describe
from millstream.serve.policy import Table
from millstream.serve.responses import kept
from millstream.serve.responses import routes as responses
from millstream.serve.responses.kept import Responses
from millstream.serve.responses.live import LiveResponses
from millstream.serve.service import Service, shown_name
from millstream.serve.store import Store

EXPOSED = ("X-Request-Id", "X-Millstream-Request-Id", "X-Millstream-Warning", "Retry-After", "WWW-Authenticate")

_log = logging.getLogger("millstream.serve")


def owner_of(request: Request) -> str:
    """The tenant whose key a request came with."""
    return caller_of(request).tenant


class App:
    """An ASGI app, between `start` and `stop` on one event loop; `admin` is that of the second listener.

    `embedding` is a second engine, of an embedding model. `stop_server` has the server drain and end. Raises
    ConfigError where the configuration is wrong, where a route has no policy, and where another server has the folder;
    BadFile where a file of keys cannot be read.
    """

    def __init__(
        self,
        client: EngineClient,
        tree: Mapping[str, Any],
        *,
        embedding: EngineClient | None = None,
        draining: Callable[[], bool] = lambda: False,
        stop_server: Callable[[], None] = lambda: None,
    ) -> None:
        self.client, self.tree, self.draining = client, tree, draining
        self.config = config = build(ServeConfig, tree.get("serve", {}), "serve")
        self.keys = Keyring(entries_of(config.auth))
        config.check(len(self.keys) > 0)
        check_rights(config.auth, self.keys)
        self.salts = Salts()
        name = config.api.model_names[0] if config.api.model_names else shown_name(str(tree.get("model", "")))
        self.watched = Observatory.of(config.watch, name)
        self.gate = Admission(config.admission, draining, losses=lambda: lost_times(client))
        self.service = Service(client, self.watched, self.gate, config.api)
        self.services, self.gates = [self.service], [self.gate]
        if embedding is not None:
            # A queue of its own: what waits for one engine says nothing of the other.
            beside = embedding
            self.gates.append(Admission(config.admission, draining, losses=lambda: lost_times(beside)))
            own = replace(config.api, model_names=())
            self.services.append(Service(embedding, self.watched, self.gates[-1], own))
            for one, other in (self.services, self.services[::-1]):
                one.beside = (other,)
        self.failed: MillstreamError | None = None
        self._loading: list[asyncio.Task[None]] = []
        self.folder, self._own_folder = _folder(config)
        self.store = Store(self.folder, files.SCHEMA, batches_module.SCHEMA, kept.SCHEMA)
        try:
            self.files = Files(self.store, config.files)
            self.responses, self.live = Responses(self.store, config.responses), LiveResponses()
            self._build(stop_server)
        except BaseException:
            self._close_folder()
            raise

    def _build(self, stop_server: Callable[[], None]) -> None:
        config, client, service = self.config, self.client, self.service
        chats, generating = openai.routes(service)
        routes: list[Route] = [
            *base_routes.routes(client, self.names, self.ready, self.draining, self.load),
            *generating,
            *vector_routes.routes(self.services),
            *messages.routes(chats, told),
            *responses.routes(chats, self.responses, self.live, owner_of),
            *watch_routes.routes(self.watched, client, owner_of),
        ]
        # The routes of batches need to know which of the others take lines of batches, and these are all there by now.
        self.batches = Batches(self.store, self.files, self.execute, Table(routes).batch_paths, limits=config.batches)
        routes += batch_routes.routes(self.files, self.batches, owner_of)
        routes.append(Route("/openapi.json", self.openapi, methods=["GET"]))
        self.table = Table(routes)
        self.door = Door(self.table, config, self.keys, self.salts)
        app: Any = self.door
        if config.allowed_origins:
            app = CORSMiddleware(
                app,
                allow_origins=config.allowed_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=EXPOSED,
            )
        self._app = HttpWatch(app, self.watched.metrics, pattern_of)
        self.admin: Door | None = None
        if config.admin.port is not None:
            table = Table(
                [*admin_routes.routes(client, self.tree, stop_server), *watch_routes.admin_routes(self.watched)]
            )
            self.admin = Door(table, config, Keyring([config.admin.key]), self.salts, admin=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    # -- life

    async def start(self) -> None:
        """Returns at once; the model is waited for meanwhile."""
        await self.files.start()
        await self.responses.start()
        await self.batches.start()
        self.watched.watch(self.client)
        self._loading = [asyncio.create_task(self._load(service)) for service in self.services]

    async def _load(self, service: Service) -> None:
        try:
            served = await service.load()
            if service is not self.service and Kind.EMBED not in served.facts.limits.kinds:
                raise ConfigError(f"embedding.model: {served.name} gives no vectors")
            self._look_at_rights()
        except EngineClosed:
            pass
        except MillstreamError as error:
            self.failed = error
            _log.error("the model cannot be served: %s", error)
        except Exception as error:
            self.failed = MillstreamError("the model cannot be served; the log says why")
            _log.exception("the model cannot be served: %s", type(error).__name__)

    def _look_at_rights(self) -> None:
        served = [service.served for service in self.services if service.served is not None]
        if len(served) < len(self.services):
            return
        known = sorted({name for one in served for name in one.names})
        for tenant, rights in self.door.rights.items():
            for name in rights.models:
                if name not in known:
                    _log.warning(
                        "serve.auth.rights.%s: no model is called %r here, only %s", tenant, name, ", ".join(known)
                    )

    async def drain(self) -> None:
        """The server takes nothing any more: work in the background stops, so that the rest has the engine alone."""
        await self.batches.stop()

    async def stop(self) -> None:
        for task in self._loading:
            task.cancel()
        await asyncio.gather(*self._loading, return_exceptions=True)
        await self.batches.stop()
        await self.live.stop()
        await self.watched.close()
        for service in self.services:
            service.close()
        self.keys.close()
        await asyncio.to_thread(self._close_folder)

    def _close_folder(self) -> None:
        self.store.close()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def reload(self, tree: Mapping[str, Any]) -> None:
        """Takes new keys and limits of the queue; for what else has changed it must be started anew."""
        config = build(ServeConfig, tree.get("serve", {}), "serve")
        keys = Keyring(entries_of(config.auth))
        config.check(len(keys) > 0)
        check_rights(config.auth, keys)
        old, self.keys = self.keys, keys
        self.door.keys, self.door.rights = keys, config.auth.rights
        self._look_at_rights()
        for gate in self.gates:
            gate.config = config.admission
        old.close()
        _log.info("there are %d API keys", len(keys))

    def refused(self, status: int) -> None:
        """A connection was turned away before there was a request."""
        self.watched.metrics.http("-", OTHER, status, 0.0, 0, 0)

    # -- what routes ask

    async def ready(self) -> bool:
        """Whether a request that is sent now would be served."""
        loaded = all(service.served is not None for service in self.services) and not self.draining()
        return loaded and all([await service.client.ready() for service in self.services])

    async def names(self) -> Sequence[tuple[ModelFacts, Sequence[str]]]:
        found = [(one.served.facts, one.served.names) for one in self.services if one.served is not None]
        if self.service.served is None:
            raise self.failed or EngineAway("the model is being loaded")
        return found

    async def openapi(self, request: Request) -> Response:
        document = describe(self.table.entries.values(), len(self.keys) > 0, self.config.root_path)
        return Response(document, media_type="application/json")

    async def load(self) -> dict[str, Any]:
        loads = [await service.client.load() for service in self.services]
        running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
        return {
            "server_load": running + waiting,
            "running": running,
            "waiting": waiting,
            "queued_requests": sum(gate.waiting_requests for gate in self.gates),
            "queued_tokens": sum(gate.waiting_tokens for gate in self.gates),
            "predicted_wait_s": round(max(gate.wait_s() for gate in self.gates), 3),
        }

    async def execute(self, endpoint: str, body: bytes, owner: str, label: str) -> Answer:
        """Answers a line of a batch as the route of `endpoint` would, in the background, in the name of `owner`."""
        entry, _ = self.table.find("POST", endpoint)
        rights = self.door.rights.get(owner, ALL_RIGHTS)
        caller = Caller(new_request_id(), owner, label, self.salts.of(owner), background=True, rights=rights)
        return await ask(entry.route.app, endpoint, body, caller)


def _folder(config: ServeConfig) -> tuple[Path, bool]:
    """Where the server keeps what is to outlive it; with a port that is not known before, nothing does."""
    if config.folder:
        return Path(config.folder).expanduser(), False
    if config.uds:
        return home() / "serve" / re.sub(r"[^A-Za-z0-9_.-]", "_", config.uds), False
    if config.port:
        return home() / "serve" / str(config.port), False
    return Path(tempfile.mkdtemp(prefix="millstream-serve-")), True
