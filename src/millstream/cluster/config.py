"""`[cluster]` of the configuration: how many engines there are behind one server, and what becomes of bad ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from millstream.core.errors import ConfigError
from millstream.core.registry import Choice


@dataclass(frozen=True, slots=True)
class RayConfig:
    """Where engines run. `address` is that of a Ray cluster ("auto": the one this machine is part of), or "local" for
    one of this server's own, with an object store of `object_store_bytes`; "" is that too, and one engine alone is then
    a plain process. Each engine asks for `num_cpus` and `num_gpus`; with 0 CPUs engines on one machine share its cores.
    """

    address: str = ""
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    object_store_bytes: int = 80_000_000

    @property
    def local(self) -> bool:
        """Whether it is a cluster of this server's own."""
        return self.address in ("", "local")

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise ConfigError(f"cluster.ray: got num_cpus {self.num_cpus} and num_gpus {self.num_gpus}, both from 0")
        if self.num_cpus >= 1 and self.num_cpus != int(self.num_cpus):
            raise ConfigError(f"cluster.ray.num_cpus: got {self.num_cpus}, allowed are whole numbers, and below 1 any")
        if self.object_store_bytes < 78_643_200:
            raise ConfigError(
                f"cluster.ray.object_store_bytes: got {self.object_store_bytes}, allowed are numbers from 78643200"
            )


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`replicas` engines behind `router`. With one, no `autoscaler` and no `ray.address` there is no cluster.

    An `autoscaler` is asked every `interval_s` how many there should be, from `min_replicas` to `max_replicas` (0: as
    many as `replicas`), and sees what requests were promised and got in the last `window_s`.

    An engine that gives no sign of life for `suspect_s`, or has work and made no turn for `stall_s`, gets no requests;
    `lost_s` after its last sign it is lost, what was inside goes on elsewhere, and another one is started. What was
    inside when `max_losses` engines were lost is not sent again. While no engine is up, requests that were inside one
    wait for `patience_s`. A start may take `start_s`; after `give_up` that failed in a row, with none up, no more are
    made. One that is lost sooner than `stable_s` after it was up counts as a start that failed: the pause before the
    next one grows. All are asked how they are every `check_s`.
    """

    replicas: int = 1
    router: Choice = Choice("least-work")
    autoscaler: Choice | None = None
    min_replicas: int = 1
    max_replicas: int = 0
    interval_s: float = 5.0
    window_s: float = 60.0
    check_s: float = 0.25
    suspect_s: float = 1.5
    lost_s: float = 10.0
    stall_s: float = 60.0
    patience_s: float = 120.0
    start_s: float = 1800.0
    stable_s: float = 10.0
    max_losses: int = 3
    give_up: int = 5
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        for name in ("replicas", "min_replicas", "max_losses", "give_up"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}: got {getattr(self, name)}, allowed are numbers from 1")
        seconds = ("interval_s", "window_s", "check_s", "suspect_s", "lost_s", "stall_s", "patience_s", "start_s")
        for name in (*seconds, "stable_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"cluster.{name}: got {getattr(self, name)}, allowed are numbers above 0")
        if self.lost_s < self.suspect_s:
            raise ConfigError(
                f"cluster.lost_s: got {self.lost_s}, allowed are numbers from suspect_s ({self.suspect_s})"
            )
        if self.max_replicas and self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"cluster.max_replicas: got {self.max_replicas}, allowed are numbers from min_replicas "
                f"({self.min_replicas}), or 0"
            )

    @property
    def wanted(self) -> bool:
        """Whether engines run on Ray: there is more than one, or may be, or it is asked for."""
        return self.replicas > 1 or self.autoscaler is not None or bool(self.ray.address)

    @property
    def most(self) -> int:
        return max(self.max_replicas, self.min_replicas) if self.max_replicas else max(self.replicas, self.min_replicas)
