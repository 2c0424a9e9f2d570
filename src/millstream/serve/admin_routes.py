"""The routes of the admin listener: what stops, empties or reconfigures the server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.cluster.client import ClusterClient
from millstream.core.client import EngineClient
from millstream.core.errors import BadRequest
from millstream.serve.config import without_secrets
from millstream.serve.policy import LogLevelAsk

LEVELS = ("debug", "info", "warning", "error")

_decode = msgspec.json.Decoder(LogLevelAsk).decode
_log = logging.getLogger("millstream.serve")


def routes(client: EngineClient, tree: Mapping[str, Any], stop_server: Callable[[], None]) -> list[Route]:
    """Handlers raise BadRequest, EngineClosed and msgspec's errors."""

    async def drain(request: Request) -> Response:
        _log.warning("told by the admin to drain")
        stop_server()
        return _json({"status": "draining"}, 202)

    async def reset(request: Request) -> Response:
        return _json(await client.call("reset_prefix_cache"))

    async def replicas(request: Request) -> Response:
        if not isinstance(client, ClusterClient):
            return _json({"wanted": 1, "lost": 0, "migrations": 0, "replicas": []})
        counts = {"wanted": client.target, "lost": client.lost, "migrations": client.migrations}
        return _json({**counts, "replicas": client.members()})

    async def replace(request: Request) -> Response:
        name = request.path_params["name"]
        found = client.members() if isinstance(client, ClusterClient) else []
        places = {one.name: one.place for one in found}
        if name not in places or not isinstance(client, ClusterClient):
            raise BadRequest("replica", name, ", ".join(sorted(places)) or "none: there is one engine, and no cluster")
        _log.warning("told by the admin to replace engine %s", name)
        client.let_go(places[name])
        return _json({"status": "draining", "replica": name}, 202)

    async def config(request: Request) -> Response:
        return _json(without_secrets(tree))

    async def log_level(request: Request) -> Response:
        ask = _decode(await request.body())
        level = ask.level.lower()
        if level not in LEVELS:
            raise BadRequest("level", ask.level, ", ".join(LEVELS))
        if ask.logger != "millstream" and not ask.logger.startswith("millstream."):
            raise BadRequest("logger", ask.logger, "millstream, or a logger below it")
        logging.getLogger(ask.logger).setLevel(level.upper())
        return _json({"logger": ask.logger, "level": level})

    return [
        Route("/admin/drain", drain, methods=["POST"]),
        Route("/admin/cache/reset", reset, methods=["POST"]),
        Route("/admin/replicas", replicas, methods=["GET"]),
        Route("/admin/replicas/{name}/drain", replace, methods=["POST"]),
        Route("/admin/config", config, methods=["GET"]),
        Route("/admin/log-level", log_level, methods=["POST"]),
    ]


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, {"Cache-Control": "no-store"}, "application/json")
