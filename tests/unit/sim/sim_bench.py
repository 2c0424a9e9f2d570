"""A small kind of engine, and traffic, for tests of the simulator."""

from __future__ import annotations

from typing import Any

from millstream.core.registry import Choice
from millstream.sched.predictors.linear import NAMES
from millstream.sched.predictors.piecewise import KNOTS
from millstream.sched.profiles import Profile
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Simulation
from millstream.sim.traces import Row
from millstream.sim.workload import Call, Source, calls

STATE = {"coefficients": dict(zip(NAMES, (5e-3, 1e-4, 1e-7, 0.0, 0.0, 1e-3, 2e-4), strict=True)), "residual": 0.0}
# Keys that rows share cost a tenth of those that one row reads.
SHARING = {
    "coefficients": {
        "constant": 5e-3,
        "prefill_pairs": 0.0,
        "decode_keys": 1e-5,
        "prefill_rows": 1e-3,
        "decode_rows": 2e-4,
        "sampled": 0.0,
        "shared_keys": 1e-6,
    },
    "slopes": {str(knot): 1e-4 for knot in KNOTS},
    "residual": 0.0,
}


def profile(**changes: Any) -> Profile:
    given = {
        "name": "toy",
        "model": "toy",
        "hardware": "none",
        "source": "made up for tests",
        "cost": "linear",
        "state": STATE,
        "blocks": 400,
        "block_size": 16,
        "step_tokens": 256,
        "max_rows": 32,
        "max_context": 4096,
        "token_bytes": 1000,
        "swap_bytes_per_s": 1e8,
        **changes,
    }
    return Profile(**given)


def traffic(rows: list[Row], **source: Any) -> list[Call]:
    return calls([Source(rows, **source)], 4096)


def rows(count: int = 60, gap_s: float = 0.05) -> list[Row]:
    return [Row(i * gap_s, 20 + 37 * i % 300, 1 + 13 * i % 40) for i in range(count)]


def simulate(
    found: list[Call], *, replicas: int = 1, policies: tuple[str, ...] = ("fcfs",), setting: Any = None, **given: Any
) -> Any:
    own = setting or EngineSetting(policies=tuple(map(Choice, policies)))
    kinds = given.pop("profiles", None) or [profile()] * replicas
    return Simulation(found, [(f"r{place}", kind) for place, kind in enumerate(kinds)], own, **given).run()
