"""A simulation as it is asked for: by flags, or by a file in TOML or YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millstream.core import registry
from millstream.core.errors import BadRequest, ConfigError
from millstream.core.registry import Choice
from millstream.core.request import Slo
from millstream.sched import profiles
from millstream.sched.profiles import Profile
from millstream.sim import workload
from millstream.sim.arrivals import Bursts, Diurnal
from millstream.sim.published import PUBLISHED
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Failure, Result, Simulation
from millstream.sim.traces import Row
from millstream.sim.workload import Call, Source


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """`[[tenants]]`: what one tenant sends. See `workload.Source`; what is not given is that of the scenario.

    `priority` and the wishes `ttft_s`, `tpot_s` and `e2e_s` are what policies read; a tenant with wishes is measured by
    these, not by those of the whole.
    """

    name: str
    trace: str = ""
    rate: float | None = None
    requests: int | None = None
    burstiness: float | None = None
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def wishes(self) -> bool:
        return not (self.ttft_s is None and self.tpot_s is None and self.e2e_s is None)


@dataclass(frozen=True, slots=True)
class FailureConfig:
    """`[[failures]]`: a replica that is lost at a second, for so many seconds."""

    replica: int
    at_s: float
    for_s: float
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class DiurnalConfig:
    """`[diurnal]`: a day of `period_s` seconds (None: none), with its lowest rate `low` times its highest, or with
    `points`: shares of the day and levels (`[[0, 0.2], [0.5, 1.0]]`)."""

    period_s: float | None = None
    low: float = 0.2
    points: tuple[tuple[float, ...], ...] = ()

    def diurnal(self) -> Diurnal | None:
        if any(len(point) != 2 for point in self.points):
            raise BadRequest("points", self.points, "pairs of a share of the day and a level")
        if self.period_s is None:
            return None
        return Diurnal(self.period_s, self.low, tuple((point[0], point[1]) for point in self.points))


@dataclass(frozen=True, slots=True)
class BurstsConfig:
    """`[bursts]`: one in `every_s` seconds (None: none) the rate is `times` itself for `for_s` seconds."""

    every_s: float | None = None
    for_s: float = 60.0
    times: float = 3.0

    def bursts(self) -> Bursts | None:
        return None if self.every_s is None else Bursts(self.every_s, self.for_s, self.times)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything a simulation is made of.

    `profiles` are the kinds of engines, `replicas` how many of each: one number for all, or one a profile. `rate` is
    requests a second (None: as recorded), `speed` a factor on recorded times, `burstiness` makes gaps random (1:
    Poisson). `requests` and `seconds` cut the trace. `deadline_s` ends requests; `e2e_s` is how long one is wished to
    take as a whole, or the workflow that it is part of. `noise` is the deviation of log step times. `lengths`
    guesses how long outputs will be. `blocks`,
    `step_tokens` and `max_rows` stand for the profile's own. `mix` shuffles lengths against arrivals. `hint_error`:
    requests come with a guess of their output that is off by a factor whose logarithm deviates by so much (0: exact),
    as expected length and as score.

    With an `autoscaler` there are `min_replicas` to `max_replicas`, an added one is ready after `cold_start_s`, and
    `replicas` is how many there are at the start. With `diurnal` or `bursts`, `rate` is a mean.
    """

    trace: str = "azure-conv"
    profiles: tuple[str, ...] = ("vidur-a100-llama3-8b-tp1",)
    replicas: tuple[int, ...] = (1,)
    policies: tuple[Choice, ...] = (Choice("fcfs"),)
    meters: tuple[Choice, ...] = ()
    router: Choice = Choice("least-work")
    prefix: Choice = Choice("radix")
    preemption: str = "recompute"
    lengths: Choice | None = None
    host_blocks: int = 0
    rate: float | None = None
    speed: float = 1.0
    burstiness: float | None = None
    mix: bool = False
    requests: int | None = 1000
    seconds: float | None = None
    max_tokens: int = 4096
    deadline_s: float | None = None
    e2e_s: float | None = None
    noise: float = 0.0
    blocks: int | None = None
    step_tokens: int | None = None
    max_rows: int | None = None
    plans: int = 1
    oracle: bool = False
    hint_error: float | None = None
    seed: int = 0
    tenants: tuple[TenantConfig, ...] = ()
    failures: tuple[FailureConfig, ...] = ()
    diurnal: DiurnalConfig = DiurnalConfig()
    bursts: BurstsConfig = BurstsConfig()
    autoscaler: Choice | None = None
    cold_start_s: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 8

    def __post_init__(self) -> None:
        if self.preemption not in ("recompute", "swap"):
            raise ConfigError(f"preemption: got {self.preemption!r}, allowed is recompute or swap")
        if len(self.replicas) not in (1, len(self.profiles)) or any(one < 1 for one in self.replicas):
            raise ConfigError(
                f"replicas: got {', '.join(map(str, self.replicas))}, allowed is one number from 1, or one a profile"
            )
        if self.plans not in (1, 2):
            raise ConfigError(f"plans: got {self.plans}, allowed is 1 or 2")
        if self.noise < 0 or self.host_blocks < 0 or self.max_tokens < 1 or (self.hint_error or 0) < 0:
            raise ConfigError("noise, host_blocks and hint_error are 0 or more, max_tokens is 1 or more")
        self.diurnal.diurnal()
        self.bursts.bursts()
        self._check_scaling()

    def _check_scaling(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas: got {self.min_replicas}, allowed is from 1 to max_replicas ({self.max_replicas})"
            )
        if not self.cold_start_s >= 0:
            raise ConfigError(f"cold_start_s: got {self.cold_start_s}, allowed is a number from 0")
        if self.autoscaler is None:
            return
        registry.options("autoscaler", self.autoscaler)
        if len(self.profiles) > 1:
            raise ConfigError(
                f"profiles: got {len(self.profiles)} kinds of engines, allowed is one where an autoscaler adds replicas"
            )


class Prepared:
    """A scenario whose data is read, to be run at any rate. Raises what reading traces and profiles raises.

    `promise` is what an autoscaler takes requests without wishes of their own to be promised.
    """

    def __init__(self, scenario: Scenario, promise: Slo | None = None) -> None:
        self.scenario, self.promise = scenario, promise
        counts = scenario.replicas * (len(scenario.profiles) if len(scenario.replicas) == 1 else 1)
        self.kinds: list[tuple[Profile, int]] = []
        for name, count in zip(scenario.profiles, counts, strict=True):
            profile = profiles.load(name, PUBLISHED)
            self.kinds.append((profile.sized(scenario.blocks, scenario.step_tokens, scenario.max_rows), count))
        tenants = scenario.tenants or (TenantConfig(""),)
        self._rows: list[tuple[TenantConfig, list[Row]]] = []
        read: dict[str, list[Row]] = {}
        for tenant in tenants:
            name = tenant.trace or scenario.trace
            if name not in read:
                read[name] = workload.load(name)
                if scenario.mix:
                    read[name] = workload.mixed(read[name], scenario.seed)
            self._rows.append((tenant, read[name]))

    def calls(self, rate: float | None = None) -> list[Call]:
        """With a `rate` that of all tenants together, else as the scenario has it. Raises BadRequest."""
        scenario = self.scenario
        sources = []
        for tenant, rows in self._rows:
            own = scenario.rate if tenant.rate is None else tenant.rate
            if rate is not None:
                own = rate / len(self._rows)
            sources.append(
                Source(
                    rows,
                    tenant.name,
                    own,
                    scenario.speed,
                    scenario.burstiness if tenant.burstiness is None else tenant.burstiness,
                    scenario.requests if tenant.requests is None else tenant.requests,
                    scenario.seconds,
                    self._wishes(tenant),
                    tenant.priority,
                    scenario.diurnal.diurnal(),
                    scenario.bursts.bursts(),
                )
            )
        # Every replica must be able to take every call.
        most = min(min(kind.max_context, kind.blocks * kind.block_size) for kind, _ in self.kinds)
        found = workload.calls(sources, most, scenario.seed)
        return found if scenario.hint_error is None else workload.hinted(found, scenario.hint_error, scenario.seed)

    def _wishes(self, tenant: TenantConfig) -> Slo | None:
        scenario = self.scenario
        if tenant.wishes:
            return Slo(tenant.ttft_s, tenant.tpot_s, scenario.deadline_s, tenant.e2e_s)
        return None if scenario.e2e_s is None else Slo(deadline_s=scenario.deadline_s, e2e_s=scenario.e2e_s)

    def run(
        self,
        rate: float | None = None,
        *,
        calls: list[Call] | None = None,
        counts: tuple[int, ...] | None = None,
        keep_steps: bool = False,
        progress: Callable[[], None] | None = None,
        scenario: Scenario | None = None,
    ) -> Result:
        """`counts` are numbers of replicas in the place of the scenario's. Another `scenario` may differ from it in
        what is no part of traffic and replicas."""
        scenario = scenario or self.scenario
        setting = EngineSetting(
            scenario.policies,
            scenario.meters,
            scenario.prefix,
            scenario.preemption,
            scenario.host_blocks,
            scenario.plans,
            scenario.noise,
            scenario.lengths,
        )
        replicas = []
        for place, (profile, count) in enumerate(self.kinds):
            number = count if counts is None else counts[place]
            if scenario.autoscaler is not None:
                number = max(scenario.min_replicas, min(scenario.max_replicas, number))
            replicas += [(f"{profile.name}/{one}", profile) for one in range(number)]
        simulation = Simulation(
            self.calls(rate) if calls is None else calls,
            replicas,
            setting,
            registry.make("router", scenario.router),
            slo=Slo(deadline_s=scenario.deadline_s),
            failures=[Failure(one.replica, one.at_s, one.for_s, one.crashes) for one in scenario.failures],
            seed=scenario.seed,
            oracle=scenario.oracle,
            max_tokens=scenario.max_tokens,
            keep_steps=keep_steps,
            progress=progress,
            autoscaler=None if scenario.autoscaler is None else registry.make("autoscaler", scenario.autoscaler),
            cold_start_s=scenario.cold_start_s,
            min_replicas=scenario.min_replicas if scenario.autoscaler is not None else 1,
            max_replicas=scenario.max_replicas if scenario.autoscaler is not None else None,
            promise=self.promise,
        )
        return simulation.run()
