"""A small model in processes of its own behind the cluster client, as `millstream serve --replicas` has it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from millstream.cluster.client import ClusterClient
from millstream.cluster.config import ClusterConfig, RayConfig
from millstream.cluster.ray_backend import RayBackend
from millstream.core import registry
from millstream.core.registry import Choice

START_S = 60.0


@contextlib.asynccontextmanager
async def workers(
    model: str,
    engine: Mapping[str, Any],
    config: ClusterConfig,
    router: Choice = Choice("least-work"),
    autoscaler: Choice | None = None,
) -> AsyncIterator[ClusterClient]:
    """Engines on a Ray of this machine alone, once all that `config` begins with are up; closed in the end.

    Raises TimeoutError.
    """
    backend = RayBackend.of(model, engine, RayConfig("local"), log_to_driver=False)
    rule = None if autoscaler is None else registry.make("autoscaler", autoscaler)
    cluster = ClusterClient(registry.make("router", router), config, backend, rule)
    await cluster.start()
    try:
        async with asyncio.timeout(START_S):
            await cluster.facts()
            while len(cluster.fleet.up) < config.replicas:
                await asyncio.sleep(0.02)
        yield cluster
    finally:
        await cluster.close()
