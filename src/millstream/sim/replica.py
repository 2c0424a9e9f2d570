"""One simulated engine: the production engine, scheduler, ledger, policies, meters, and a formula for a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millstream.cluster.protocol import Member
from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.clock import VirtualClock
from millstream.core.events import Event
from millstream.core.registry import Choice
from millstream.core.request import Limits
from millstream.core.shape import StepShape
from millstream.engine.engine import Engine
from millstream.memory.ledger import Ledger
from millstream.sched.meters import usual
from millstream.sched.profiles import Profile
from millstream.sched.scheduler import Scheduler
from millstream.sim.sim_runner import STOP, VOCAB, SimRunner

GROUP = "full"


@dataclass(frozen=True, slots=True)
class EngineSetting:
    """What a configuration says of the deciding stack of each replica; plug-ins by their names, as the engine has them.

    `host_blocks` are what swapped-out requests may take. `noise` is the deviation of log step times.
    """

    policies: tuple[Choice, ...] = (Choice("fcfs"),)
    meters: tuple[Choice, ...] = ()
    prefix: Choice = Choice("radix")
    preemption: str = "recompute"
    host_blocks: int = 0
    plans: int = 1
    noise: float = 0.0
    lengths: Choice | None = None


@dataclass(slots=True)
class Replica:
    """An engine and what a simulation knows of it. `up` is false while it is lost."""

    name: str
    profile: Profile
    engine: Engine
    runner: SimRunner
    up: bool = True
    busy: bool = False
    epoch: int = 0
    served: int = 0
    inside: set[int] = field(default_factory=set)  # calls


def member_of(place: int, replica: Replica) -> Member:
    """What a router sees of it. Its speed is that of a step that is full of one prompt."""
    cost, tokens = replica.profile.step_cost(), replica.profile.step_tokens
    seconds = cost.seconds(StepShape(1, tokens, tokens * (tokens + 1) // 2))
    return Member(place, replica.name, tokens / max(seconds, 1e-9), cost)


def build(
    name: str,
    profile: Profile,
    setting: EngineSetting,
    clock: VirtualClock,
    seed: int,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Replica:
    """Raises ConfigError, UnknownName and what plug-ins raise for their options."""
    runner = SimRunner(
        clock,
        profile.step_cost(),
        {GROUP: profile.blocks},
        profile.block_size,
        {GROUP: setting.host_blocks},
        plans=setting.plans,
        block_s=profile.token_bytes * profile.block_size / profile.swap_bytes_per_s,
        noise=setting.noise,
        seed=seed,
    )
    ledger = Ledger(
        (CacheGroup(GROUP),),
        profile.block_size,
        {GROUP: profile.blocks},
        registry.make("prefix", setting.prefix),
        {GROUP: setting.host_blocks},
        ("sim", profile.model),
    )
    meters = setting.meters or usual(profile.step_tokens, profile.max_rows)
    scheduler = Scheduler(
        ledger,
        [registry.make("policy", choice) for choice in setting.policies],
        [registry.make("meter", choice, ledger=ledger) for choice in meters],
        setting.preemption,
        cost=profile.step_cost(),
    )
    limits = Limits(VOCAB, profile.max_context, profile.blocks * profile.block_size)
    lengths = None if setting.lengths is None else registry.make("length", setting.lengths, text=None)
    engine = Engine(
        scheduler,
        runner,
        clock,
        limits,
        stop_ids=frozenset({STOP}),
        listeners=listeners,
        seed=seed,
        lengths=lengths,
    )
    return Replica(name, profile, engine, runner)
